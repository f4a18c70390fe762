"""What pseudo-labelling costs beside the network: images/s over those of the bare network, and memory over the images.

    python benchmarks/labelling.py [RECIPE] [--run FOLDER] [--size 360 480] [--images 48] [--rounds 5] [--threads 2]
                                   [--pools 1000 20000] [--no-memory] [--json]

Speed: `engine.pseudo.pseudo_label` on the first unlabelled images of the recipe, from the call to its return, with all
that it does: the weights' hash, two threads that decode, the network in eval mode on one image at a time, at the size
--size, one scale, two threads that write label and confidence map to a new folder, and the count of confidences from
the files. `bare` is the network's forward alone on the same images, one at a time, decoded and resized before: logits
of the image's size, no softmax, no label. `predicted` is that with softmax, resize to the file's size, label and
confidence (`engine.predict.Predictor`), still from memory and to memory. The three take turns; a ratio is the median of
those of the rounds. --threads are torch's. The network has the recipe's weights, or with --run those of a run's model:
how sure a network is decides how large the maps of confidence are.

Memory: a fresh process labels the first and then the second of --pools with a small random network: so many rows of
one image of 32x48 px. Told is how far its peak lies above what it was before each, and from the first to the second.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, finish, parser, run_script, table
from PIL import Image
from step import highest, take_turns
from torch import nn

import semiseg
from semiseg.config import Recipe, build_of, load_recipe
from semiseg.data.cache import open_image
from semiseg.data.formats import MaskCode
from semiseg.data.rows import Rows
from semiseg.data.splits import Data, DataConfig, default_palette, load_data
from semiseg.engine.evaluate import to_tensor
from semiseg.engine.predict import Predictor
from semiseg.engine.pseudo import pseudo_label
from semiseg.types import InferenceConfig

RECIPE = ROOT / "recipes/camvid/selftraining-mobilenetv2-46.yaml"
LEAST = 0.9
"""Images/s of pseudo-labelling over those of the bare network."""
MOST = 10.0
"""MB that the peak may grow by for 10,000 images."""
CPU = torch.device("cpu")


def network(recipe: Recipe, data: Data, base: Path, run: Path | None) -> nn.Module:
    """In eval mode, with the recipe's weights or those of a run's model."""
    return (build_of(recipe, data, CPU, base).network() if run is None else semiseg.load(run, "cpu").net).eval()


def speed(path: Path, run: Path | None, size: tuple[int, int], images: int, rounds: int) -> dict[str, Any]:
    """Images/s of each side, and their ratios to the bare network."""
    recipe = load_recipe(path, [f"data.size={list(size)}", "data.cache=false"])
    data = load_data(recipe.data, path.parent)
    net, inference, d = network(recipe, data, path.parent, run), InferenceConfig(), data.config
    rows = data.unlabelled[:images]
    held = [open_image(row, d.channels, d.size, cache=False) for row in rows]
    tensors = [to_tensor(image) for image in held]
    predictor = Predictor(net, data.classes, data.palette, d.channels, d.size, inference, CPU)

    @torch.no_grad()
    def bare() -> None:
        for image in tensors:
            net(image)

    def predicted() -> None:
        for image in held:
            predictor(image)

    with tempfile.TemporaryDirectory() as place:
        folders = (Path(place, str(number)) for number in range(rounds + 2))

        def labelled() -> None:
            pseudo_label(net, rows, data, next(folders), inference, CPU)

        sides = {"bare": bare, "predicted": predicted, "labelled": labelled}
        times = take_turns(sides, lambda: None, rounds)
        files = [file.stat().st_size for file in Path(place, "0").rglob("*.png")]
    per_second = {name: len(rows) / float(np.median(seconds)) for name, seconds in times.items()}
    return {
        "recipe": path.stem, "weights": "the recipe's" if run is None else run.name, "size": list(size),
        "images": len(rows), "images_per_second": per_second,
        "ratio": float(np.median(times["bare"] / times["labelled"])),
        "ratio_quartiles": np.percentile(times["bare"] / times["labelled"], [25, 75]).tolist(),
        "ratio_to_predicted": float(np.median(times["predicted"] / times["labelled"])),
        "kb_an_image": sum(files) / 1000 / len(rows),
    }  # fmt: skip


class Small(nn.Module):
    """Seven classes from colours."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 7, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.mix(image.float() / 255)
        return logits


def peaks(pools: Sequence[int]) -> list[float]:
    """MB that the peak of this process, a fresh one, lies above its start after each pool."""
    names, none = tuple(f"class_{i}" for i in range(7)), Rows.of("", ())
    found, net = [], Small().eval()
    with tempfile.TemporaryDirectory() as place:
        pixels = np.random.default_rng(0).integers(256, size=(32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path(place, "one.png"))
        code, config = MaskCode(len(names)), DataConfig(root=place)
        data = Data("one", names, default_palette(len(names)), code, config, none, none, none, none, "")
        one = Rows.of(place, ["one.png"])
        pseudo_label(net, one, data, Path(place, "first"), InferenceConfig(), CPU)  # the libraries do not count
        before = highest()
        for number, pool in enumerate(pools):
            rows = one[np.zeros(pool, dtype=np.intp)]
            pseudo_label(net, rows, data, Path(place, str(number)), InferenceConfig(), CPU)
            found.append(np.nan if (after := highest()) is None or before is None else after - before)
    return found


def memory(pools: Sequence[int]) -> dict[str, Any]:
    """`peaks` in a fresh process."""
    command = [sys.executable, __file__, "--peaks", "--pools", *map(str, pools)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = json.loads(done.stdout)
    growth = (grown[-1] - grown[0]) / (pools[-1] - pools[0]) * 10_000
    return {"pools": list(pools), "peak_mb_above_start": grown, "mb_for_10000": growth}


def as_text(result: dict[str, Any]) -> str:
    one = result["speed"]
    low, high = one["ratio_quartiles"]
    rows = [["images/s", "bare", "predicted", "labelled", f"labelled / bare (>= {LEAST:g})", "labelled / predicted",
             "kB an image"]]  # fmt: skip
    speeds = [f"{one['images_per_second'][name]:.2f}" for name in ("bare", "predicted", "labelled")]
    ratios = [f"{one['ratio']:.3f} ({low:.3f}-{high:.3f})", f"{one['ratio_to_predicted']:.3f}"]
    rows.append(["", *speeds, *ratios, f"{one['kb_an_image']:.1f}"])
    size = "x".join(map(str, one["size"]))
    text = f"{one['recipe']}, weights: {one['weights']}, {one['images']} images of {size} px\n\n{table(rows)}"
    if grown := result["memory"]:
        cells = zip(grown["pools"], grown["peak_mb_above_start"], strict=True)
        head = ["images", "peak above start, MB"]
        text += f"\n\n{table([head, *([str(pool), f'{mb:.1f}'] for pool, mb in cells)])}"
        text += f"\n\nfor 10,000 images more: {grown['mb_for_10000']:.1f} MB (<= {MOST:g})"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("recipe", nargs="?", type=Path, default=RECIPE, metavar="RECIPE")
    options.add_argument("--run", type=Path, metavar="FOLDER", help="a run or model, whose network is taken")
    options.add_argument("--size", type=int, nargs=2, default=(360, 480), metavar=("H", "W"), help="px")
    options.add_argument("--images", type=int, default=48, help="that are labelled in each round")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=2, help="of torch")
    options.add_argument("--pools", type=int, nargs=2, default=(1000, 20_000), metavar="N", help="sizes for the memory")
    options.add_argument("--no-memory", action="store_true", help="leaves the memory out")
    options.add_argument("--peaks", action="store_true", help="only prints the MB of each pool")
    given = options.parse_args(arguments)
    if given.peaks:
        print(json.dumps(peaks(given.pools)))
        return
    torch.set_num_threads(given.threads)
    told = speed(given.recipe, given.run, tuple(given.size), given.images, given.rounds)
    result = {"speed": told, "memory": None if given.no_memory else memory(given.pools)}
    finish(result | {"least_ratio": LEAST, "most_mb_for_10000": MOST}, as_text(result), given.json)


if __name__ == "__main__":
    run_script(main)

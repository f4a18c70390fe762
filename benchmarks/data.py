"""Whether reading keeps up with training: images/s of the loader over images/s of the step.

    python benchmarks/data.py [RECIPE] [--workers 1] [--steps 40] [--made H W] [--json]

Needs the recipe's data. The loader is timed alone, on the same steps in three states: `uncached` decodes and resizes
every image, `first pass` does that and fills a cache of resized images, `cached` reads from it. Without `data.size`
nothing is cached and the three are one. The step is timed on batches that were read before, without a loader beside it.

With --made no data is needed: JPEGs of H x W px with masks are made, half of them labelled, and the recipe's crops of
them are read with everything that its method asks for. The loader is timed alone, for recipes whose step needs a GPU.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import DEFAULT, build_method, finish, parser, run_script, table
from passes import Batches, Bench
from PIL import Image

from semiseg import parallel
from semiseg.config import Recipe, load_recipe
from semiseg.data import synthetic
from semiseg.data.loader import Steps, steps
from semiseg.data.sampling import Timetable
from semiseg.data.splits import Data, DataConfig, load_data
from semiseg.methods import StepMethod

LEAST = 2.0
"""Images/s of the loader over those of the step, cached, with one worker."""
MADE = 16
"""JPEGs that --made makes."""
HELD = 4
"""Batches that the step is timed on."""


def read(recipe: Recipe, method: StepMethod, data: Data, count: int, workers: int, pin: bool) -> tuple[float, Any]:
    """Images/s of the loader over `count` steps, from the first item on: a worker's start is paid once a run."""
    streams = method.streams(data, recipe.train.batch, recipe.train.crop)
    timetable = Timetable(next(iter(streams.values())).phases, count * recipe.train.batch)
    held: list[Batches] = []
    images, begun = 0, time.perf_counter()
    for number, item in enumerate(steps(Steps(streams, timetable, data, recipe.train.seed), 0, workers, pin)):
        if number == 0 and workers:
            begun = time.perf_counter()
        else:
            images += sum(len(batch.row) for batch in item.batches.values())
        if len(held) < HELD:
            held.append(item.batches)
    return images / (time.perf_counter() - begun), held


def step_speed(bench: Bench, held: list[Batches], rounds: int) -> float:
    """Images/s of the median step."""
    seconds = []
    for number in range(-2, rounds):
        bench.wait()
        begun = time.perf_counter()
        replace(bench, batches=held[number % len(held)]).whole()
        bench.wait()
        if number >= 0:
            seconds.append(time.perf_counter() - begun)
    return bench.images / float(np.median(seconds))


def measure(path: Path, workers: int, count: int) -> dict[str, Any]:
    """Images/s of the step, of the loader in each state, and the ratio of the two."""
    recipe, base = load_recipe(path), path.parent
    torch.set_num_threads(recipe.train.threads or torch.get_num_threads())
    device = parallel.device(recipe.train.device)
    pin = device.type == "cuda"
    data = load_data(recipe.data, base)
    method = build_method(recipe, data, device, base)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, SEMISEG_CACHE=folder):
        without = replace(data, config=data.config.model_copy(update={"cache": False}))
        # Brings the files into the system's own cache, so that the order of the states means nothing.
        read(recipe, method, without, count, workers, pin)
        for state, from_data in (("uncached", without), ("first pass", data), ("cached", data)):
            found[state], held = read(recipe, method, from_data, count, workers, pin)
    step = step_speed(Bench(recipe, method, held[0], device), held, max(3, count // 4))
    states = [{"state": name, "images_per_second": speed, "ratio": speed / step} for name, speed in found.items()]
    return {
        "recipe": path.stem,
        "device": device.type,
        "workers": workers,
        "images_per_step": sum(len(batch.row) for batch in held[0].values()),
        "step_images_per_second": step,
        "loader": states,
        "least_ratio": LEAST,
    }


def measure_made(path: Path, workers: int, count: int, size: tuple[int, int]) -> dict[str, Any]:
    """Images/s of the loader alone, of JPEGs of `size` (H, W)."""
    recipe, base = load_recipe(path), path.parent
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        synthetic.write(folder, train=MADE, labelled=MADE // 2, val=0, test=0, size=size)
        for png in sorted((folder / "images/train").iterdir()):
            Image.open(png).save(png.with_suffix(".jpg"), quality=95)
            png.unlink()
        made = DataConfig(root=str(folder), format="splits", scale=recipe.data.scale, flip=recipe.data.flip)
        data = load_data(made)
        plain = recipe.network.model_copy(update={"weights": "random"})
        method = build_method(recipe.model_copy(update={"network": plain}), data, torch.device("cpu"), base)
        read(recipe, method, data, 2, 0, pin=False)
        speed, held = read(recipe, method, data, count, workers, pin=False)
    return {
        "recipe": path.stem,
        "workers": workers,
        "size": list(size),
        "crop": list(recipe.train.crop),
        "images_per_step": sum(len(batch.row) for batch in held[0].values()),
        "images_per_second": speed,
    }


def as_text_of_made(result: dict[str, Any]) -> str:
    (high, wide), (crop_high, crop_wide) = result["size"], result["crop"]
    return (
        f"{result['recipe']}, workers: {result['workers']}: {result['images_per_second']:.1f} images/s, crops of "
        f"{crop_high}x{crop_wide} from JPEGs of {high}x{wide}"
    )


def as_text(result: dict[str, Any]) -> str:
    rows = [["loader", "images/s", "step's images/s", f"ratio (cached >= {LEAST:g})"]]
    rows += [
        [
            line["state"],
            f"{line['images_per_second']:.1f}",
            f"{result['step_images_per_second']:.1f}",
            f"{line['ratio']:.2f}",
        ]
        for line in result["loader"]
    ]
    return f"{result['recipe']} on {result['device']}, workers: {result['workers']}\n\n{table(rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("recipe", nargs="?", type=Path, default=DEFAULT, metavar="RECIPE")
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--steps", type=int, default=40, help="steps that are read in each state")
    options.add_argument("--made", type=int, nargs=2, metavar=("H", "W"), help="read JPEGs of that size, made for it")
    given = options.parse_args(arguments)
    if given.made:
        made = measure_made(given.recipe, given.workers, max(2, given.steps), tuple(given.made))
        finish(made, as_text_of_made(made), given.json)
        return
    result = measure(given.recipe, given.workers, max(2, given.steps))
    finish(result, as_text(result), given.json)


if __name__ == "__main__":
    run_script(main)

"""How pseudo-labels come about in one run: how many pixels are confident, how right they are, and both a class.

    python benchmarks/mechanism.py RECIPE --out FILE.json [--seed 0] [--shares 0.1 0.25 ... 1] [--images N] [--json]

Trains the recipe with its model stored at the given shares of the run, or takes the run of the same call before. Then
each stored model (FixMatch's teacher) labels the unlabelled training images as a whole, without photometry, and is
compared with the masks that exist for them: a diagnosis, nothing that training sees. `sure` pixels have at least the
method's threshold. Of a class, `sure` is the share of its pixels that are sure, `right` the share of these that get the
class, and `labels right` the share of the sure labels of that class that are right. Writes FILE.json with the confusion
matrices behind every number (reference in the rows), and FILE.png.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DEFAULT, HERE, finish, parser, run_script, table, train
from ledger import Job, digest, flat_options, name_of
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

import semiseg
from semiseg.config import Recipe, load_recipe
from semiseg.data.cache import open_image, open_mask
from semiseg.data.rows import Rows
from semiseg.data.splits import Data, load_data
from semiseg.engine.checkpoint import load_weights
from semiseg.engine.evaluate import ahead, to_tensor
from semiseg.files import replacing, write_json
from semiseg.ops.metrics import confusion
from semiseg.ops.pseudo import pseudo_label
from semiseg.types import IGNORE, InputError

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
Matrix = NDArray[np.int64]


@dataclass(frozen=True)
class Point:
    """A stored model: confusion matrices (C, C), reference in the rows, of all pixels and of the sure ones."""

    share: float
    every: Matrix
    sure: Matrix

    def plain(self, classes: Sequence[str]) -> dict[str, Any]:
        of_class = {
            "sure": _ratio(self.sure.sum(1), self.every.sum(1)),
            "right": _ratio(self.sure.diagonal(), self.sure.sum(1)),
            "labels_right": _ratio(self.sure.diagonal(), self.sure.sum(0)),
            "all_right": _ratio(self.every.diagonal(), self.every.sum(1)),
        }
        return {
            "share": self.share,
            "sure": float(self.sure.sum() / self.every.sum()),
            "right": float(_ratio(self.sure.trace(), self.sure.sum())),
            "all_right": float(self.every.trace() / self.every.sum()),
            "per_class": {name: dict(zip(classes, v.tolist(), strict=True)) for name, v in of_class.items()},
            "confusion": self.every.tolist(),
            "confusion_sure": self.sure.tolist(),
        }


def _ratio(part: Any, whole: Any) -> NDArray[np.float64]:
    """NaN where there is nothing."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0)


def with_masks(recipe: Recipe, base: Path) -> tuple[Data, Rows]:
    """The data, and the rows of its unlabelled images, with the masks that exist."""
    data = load_data(recipe.data, base)
    every = load_data(recipe.data.model_copy(update={"labelled": None, "unlabelled": "none"}), base).labelled
    rows = every[np.isin(every.names, data.unlabelled.names)]
    if not len(rows):
        raise InputError(f"{recipe.data.root}: no unlabelled training image has a mask to compare with.")
    return data, rows


@torch.no_grad()
def measure(net: nn.Module, rows: Rows, data: Data, threshold: float, device: torch.device) -> tuple[Matrix, Matrix]:
    """The two matrices of a `Point`, at the size that training works on."""
    d, classes = data.config, len(data.classes)
    sums = torch.zeros(2, classes, classes, dtype=torch.int64, device=device)

    def read(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = open_image(rows[i], d.channels, d.size, d.cache)
        return to_tensor(image), torch.from_numpy(open_mask(rows[i], data.code, d.size, d.cache))[None]

    for image, mask in ahead(read, range(len(rows))):
        label, confidence = pseudo_label(net(image.to(device)))
        mask = mask.to(device)
        sums[0] += confusion(label, mask, classes)
        sums[1] += confusion(label, mask.masked_fill(confidence < threshold, IGNORE), classes)
    every, sure = sums.cpu().numpy()
    return every, sure


def run(path: Path, seed: int, shares: Sequence[float], images: int | None, runs: Path) -> dict[str, Any]:
    """Trains where that was not done before, and measures every stored model."""
    overrides = [*Job.overrides(seed), f"train.keep={list(shares)}"]
    recipe = load_recipe(path, overrides)
    options = flat_options(recipe)
    if "method.threshold" not in options:
        raise InputError(f"{path}: {recipe.method.name} has no threshold, so that no pixel is sure.")
    key = digest(options | {"keep": list(shares)})[:6]
    folder = runs / f"mechanism-{name_of(path).replace('/', '-')}-{key}-s{seed}"
    train(path, folder, overrides, None)
    data, rows = with_masks(recipe, path.parent)
    if images is not None:
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, images).astype(np.intp))]
    model = semiseg.load(folder, recipe.train.device)
    points = []
    for share in shares:
        load_weights(folder / "kept" / f"{share:g}.safetensors", model.net)
        points.append(
            Point(share, *measure(model.net, rows, data, options["method.threshold"], model.predictor.device))
        )
    return {
        "recipe": name_of(path),
        "seed": seed,
        "steps": recipe.train.steps,
        "threshold": options["method.threshold"],
        "images": len(rows),
        "classes": list(data.classes),
        "points": [point.plain(data.classes) for point in points],
    }


def as_text(result: dict[str, Any]) -> str:
    """Markdown: all classes over time, then sure, right and labels right of each class over time."""
    points, steps = result["points"], result["steps"]
    whole = [["step", "sure %", "of these right %", "of all right %"]]
    whole += [
        [f"{round(steps * p['share'])}", *(_percent(p[name]) for name in ("sure", "right", "all_right"))]
        for p in points
    ]
    classes = [["sure / right / labels right %", *(f"step {round(steps * p['share'])}" for p in points)]]
    for name in result["classes"]:
        parts = [[p["per_class"][part][name] for part in ("sure", "right", "labels_right")] for p in points]
        classes.append([name, *(" / ".join(map(_percent, cell)) for cell in parts)])
    head = f"{result['recipe']}, seed {result['seed']}: {result['images']} unlabelled images"
    return f"{head}, sure from {result['threshold']:g}\n\n{table(whole)}\n\n{table(classes)}"


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Four panels over the steps: all pixels, and sure, right and labels right by class."""
    points = result["points"]
    steps = [result["steps"] * p["share"] for p in points]
    figure = Figure(figsize=(12, 8), layout="constrained")
    titles = {"sure": "share of a class that is sure", "right": "of these right",
              "labels_right": "of the sure labels of a class right"}  # fmt: skip
    axes = figure.subplots(2, 2).ravel()
    for part, text in (("sure", "sure"), ("right", "of these right"), ("all_right", "of all right")):
        axes[0].plot(steps, [p[part] for p in points], "o-", label=text)
    axes[0].set_title("all pixels")
    axes[0].legend(fontsize="small")
    for place, (part, title) in zip(axes[1:], titles.items(), strict=True):
        for number, name in enumerate(result["classes"]):
            line = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "marker": "o"}
            place.plot(steps, [p["per_class"][part][name] for p in points], label=name, **line)
        place.set_title(title)
    axes[1].legend(fontsize="x-small", ncols=2)
    for place in axes:
        place.set(xlabel="step", ylim=(-0.02, 1.02))
        place.grid(alpha=0.3)
    with replacing(path) as part:
        figure.savefig(part, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("recipe", nargs="?", type=Path, default=DEFAULT, metavar="RECIPE")
    options.add_argument("--out", type=Path, required=True, metavar="FILE", help=".json; the .png goes beside it")
    options.add_argument("--seed", type=int, default=0, help="of the run and of the draw of the labels")
    options.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the run")
    options.add_argument("--images", type=int, help="at most so many, evenly spaced; else all")
    options.add_argument("--runs", type=Path, default=HERE / "runs")
    given = options.parse_args(arguments)
    result = run(given.recipe, given.seed, sorted(given.shares), given.images, given.runs)
    write_json(given.out.with_suffix(".json"), result)
    draw(result, given.out.with_suffix(".png"))
    finish(result, as_text(result), given.json)


if __name__ == "__main__":
    run_script(main)

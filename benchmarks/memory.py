"""How much memory a recipe needs, for recipes that are too large for the machine at hand.

    python benchmarks/memory.py RECIPE... [--set KEY=VALUE]... [--side 0.5] [--batches 2 4] [--whole] [--json]

A step's memory is a part that is there once (weights, gradients, the optimiser's state, a teacher, queues) and a part
that grows with the pixels of the batch: nearly all of it what backward needs of the forward. Two peaks of fresh
processes (`step.py --peak`) tell both: with the --batches, and crops of --side times the recipe's side. From them
follows the recipe at its own batch and crop, in each precision. --whole measures that too, which is how the
extrapolation was checked. No data is opened, weights are random. On a CPU: what a GPU's libraries take comes on top,
and what its kernels leave out (attention's scores, say) is left out where the CPU's do too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import DEFAULT, finish, parser, run_script, table
from step import peak_apart

from semiseg.config import Recipe, load_recipe
from semiseg.types import InputError

PRECISIONS = ("fp32", "bf16")


def pixels(batch: int, crop: Sequence[int]) -> float:
    """Megapixels of a batch, of one stream."""
    return batch * crop[0] * crop[1] / 1e6


def smaller(crop: tuple[int, int], side: float, network: str) -> tuple[int, int]:
    """The crop with its sides times `side`, in the steps that networks take: 14 px of patches, else 32, or 1 more."""
    step = 14 if network == "dpt" else 32
    height, width = (max(step, round(length * side / step) * step) + length % step % 2 for length in crop)
    return height, width


def measure(path: Path, overrides: Sequence[str], side: float, batches: Sequence[int], whole: bool) -> dict[str, Any]:
    """A recipe's line."""
    recipe = load_recipe(path, list(overrides))
    line: dict[str, Any] = {
        "recipe": f"{path.parent.name}/{path.stem}", "method": recipe.method.name, "batch": recipe.train.batch,
        "crop": list(recipe.train.crop),
    }  # fmt: skip
    crop = smaller(recipe.train.crop, side, recipe.network.name)
    own = pixels(recipe.train.batch, recipe.train.crop)
    for precision in PRECISIONS:
        peaks = [_peak(path, overrides, recipe, precision, batch, crop) for batch in batches]
        low, high = (pixels(batch, crop) for batch in batches)
        slope = (peaks[1] - peaks[0]) / (high - low)
        line[precision] = {
            "once_gb": (peaks[0] - slope * low) / 1e3, "gb_a_megapixel": slope / 1e3,
            "gb": (peaks[0] + slope * (own - low)) / 1e3,
        }  # fmt: skip
        if whole:
            measured = _peak(path, overrides, recipe, precision, recipe.train.batch, recipe.train.crop)
            line[precision]["measured_gb"] = measured / 1e3
    return line


def _peak(
    path: Path, overrides: Sequence[str], recipe: Recipe, precision: str, batch: int, crop: tuple[int, int]
) -> float:
    options = [f"train.precision={precision}", f"train.batch={batch}", f"train.crop=[{crop[0]},{crop[1]}]"]
    found = peak_apart(path, [*overrides, "train.threads=1", *options], recipe.method.name, "cpu", "whole")
    if found is None:
        raise InputError("this system does not tell how much memory a process needs: run memory.py on Linux.")
    return found


def as_text(lines: Sequence[dict[str, Any]]) -> str:
    rows = [["recipe", "batch", "crop", "precision", "once, GB", "GB a megapixel", "at its batch, GB", "measured, GB"]]
    for line in lines:
        for precision in PRECISIONS:
            found = line[precision]
            whole = f"{found['measured_gb']:.2f}" if "measured_gb" in found else ""
            crop = "x".join(map(str, line["crop"]))
            rows.append(
                [line["recipe"], str(line["batch"]), crop, precision, f"{found['once_gb']:.2f}",
                 f"{found['gb_a_megapixel']:.2f}", f"{found['gb']:.1f}", whole]
            )  # fmt: skip
    return table(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("recipes", nargs="*", type=Path, default=[DEFAULT], metavar="RECIPE")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for semiseg train")
    options.add_argument("--side", type=float, default=0.5, help="of the crops that are measured, over the recipe's")
    options.add_argument("--batches", type=int, nargs=2, default=(2, 4), metavar=("LOW", "HIGH"))
    options.add_argument("--whole", action="store_true", help="also measures the recipe itself")
    given = options.parse_args(arguments)
    if not 0 < given.side <= 1 or not 1 <= given.batches[0] < given.batches[1]:
        raise InputError("--side has to be above 0 and at most 1, and --batches two numbers, the smaller one first.")
    lines = [measure(path, given.set, given.side, given.batches, given.whole) for path in given.recipes]
    finish({"recipes": lines}, as_text(lines), given.json)


if __name__ == "__main__":
    run_script(main)

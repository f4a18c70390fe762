"""What AdvSemiSeg's confidence map knows: is it higher where the prediction is right, and what makes it so?

    python benchmarks/critic.py [RECIPE] --out FILE.json [--seed 0] [--steps N] [--only NAME...] [--images N]
                                [--no-photo] [--json]

Trains the recipe in the variants of VARIANTS, or takes the runs of the same call before; then the last network labels
the unlabelled training images as a whole, the last critic judges the labels, and both are compared with the masks that
exist for them: a diagnosis, nothing that training sees. AUROC is the chance that a right pixel has a higher confidence
than a wrong one; 0.5 tells nothing. `selected` has a confidence of at least T. Writes FILE.json, and FILE.png: one
image with its mask, the prediction, the confidence map and the selected region of the recipe as it is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, coloured, draw_panels, finish, load_method, parser, run_script, table, train
from ledger import Job, digest, flat_options, name_of
from mechanism import with_masks
from numpy.typing import NDArray

from semiseg.config import Recipe, load_recipe
from semiseg.data.cache import open_image, open_mask
from semiseg.data.rows import Row, Rows
from semiseg.data.splits import Data
from semiseg.engine.evaluate import ahead, to_tensor
from semiseg.files import write_json
from semiseg.methods import AdvSemiSeg
from semiseg.types import IGNORE, InputError

RECIPE = ROOT / "recipes/camvid/advsemiseg-mobilenetv2-46.yaml"
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.5)
NO_ADV = ["method.lambda_adv=0", "method.lambda_adv_unlabelled=0"]
NO_SEMI = ["method.lambda_semi=0"]
VARIANTS = {
    "as it is": [],
    "no L_adv, no L_semi": [*NO_ADV, *NO_SEMI],
    "L_adv alone": NO_SEMI,
    "L_semi alone": NO_ADV,
    "T_semi 0": ["method.threshold=0"],
    "T_semi 0.1": ["method.threshold=0.1"],
    "T_semi 0.3": ["method.threshold=0.3"],
    "T_semi 1": ["method.threshold=1"],
    "image-level critic": ["method.critic=image"],
    "critic_scale 2": ["method.critic_scale=2"],
    "lambda_adv 0.005": ["method.lambda_adv=0.005"],
    "lambda_adv 0.02": ["method.lambda_adv=0.02"],
    "lambda_adv 0.05": ["method.lambda_adv=0.05"],
}
BINS = 1000
"""Of the confidence, for AUROC: a map of floats has no more to say."""


@dataclass(frozen=True)
class Judged:
    """Pixels by confidence, (2, BINS): wrong ones and right ones."""

    counts: NDArray[np.int64]

    def auroc(self) -> float:
        """Ties, pixels of one bin, count half."""
        wrong, right = self.counts.astype(float)
        below = np.cumsum(wrong) - wrong
        pairs = wrong.sum() * right.sum()
        return float((right * (below + wrong / 2)).sum() / pairs) if pairs else np.nan

    def at(self, threshold: float) -> dict[str, float]:
        """Share of the pixels that are selected, and how often these and the others are right."""
        first = round(threshold * BINS)
        rejected, selected = self.counts[:, :first].sum(1), self.counts[:, first:].sum(1)
        return {
            "selected": float(selected.sum() / self.counts.sum()),
            "selected_right": float(selected[1] / selected.sum()) if selected.any() else np.nan,
            "rejected_right": float(rejected[1] / rejected.sum()) if rejected.any() else np.nan,
        }


def load_critic(recipe: Recipe, data: Data, folder: Path) -> AdvSemiSeg:
    """Network and critic as they were after the last step."""
    method = load_method(recipe, data, folder)
    if not isinstance(method, AdvSemiSeg):
        raise InputError(f"{folder}: {recipe.method.name} has no critic.")
    return method


@torch.no_grad()
def look(method: AdvSemiSeg, row: Row, data: Data) -> tuple[NDArray[Any], ...]:
    """Image (H, W, N), mask, label and the critic's confidence (H, W) at the size that training works on."""
    d = data.config
    image, mask = open_image(row, d.channels, d.size, d.cache), open_mask(row, data.code, d.size, d.cache)
    probs = method.student(to_tensor(image)).softmax(1)
    confidence = method.critic(probs)[0, 0].sigmoid()
    return image, mask, probs[0].argmax(0).numpy(), confidence.numpy()


def measure(method: AdvSemiSeg, rows: Rows, data: Data) -> Judged:
    counts = np.zeros((2, BINS), dtype=np.int64)
    for _, mask, label, confidence in ahead(lambda row: look(method, row, data), rows, threads=1):
        known = mask != IGNORE
        bins = np.minimum((confidence[known] * BINS).astype(np.int64), BINS - 1)
        right = (label[known] == mask[known]).astype(np.int64)
        counts += np.bincount(right * BINS + bins, minlength=2 * BINS).reshape(2, BINS)
    return Judged(counts)


def run(
    path: Path,
    seed: int,
    steps: int | None,
    only: Sequence[str],
    images: int | None,
    runs: Path,
    picture: Path,
    photo: bool = True,
) -> list[dict[str, Any]]:
    """One line of results a variant."""
    found = []
    for name in only or VARIANTS:
        if name not in VARIANTS:
            raise InputError(f"--only {name} is unknown; known: {', '.join(VARIANTS)}.")
        overrides = [*Job.overrides(seed), *VARIANTS[name], *([f"train.steps={steps}"] if steps else [])]
        recipe = load_recipe(path, overrides)
        folder = runs / f"critic-{name_of(path).replace('/', '-')}-{digest(flat_options(recipe))[:6]}-s{seed}"
        train(path, folder, overrides, None)
        recipe = load_recipe(folder / "recipe.yaml")
        data, rows = with_masks(recipe, folder)
        if images is not None:
            rows = rows[np.unique(np.linspace(0, len(rows) - 1, images).astype(np.intp))]
        method = load_critic(recipe, data, folder)
        judged = measure(method, rows, data)
        if name == "as it is":
            draw(method, rows[len(rows) // 2], data, picture, photo)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        found.append({
            "variant": name, "steps": recipe.train.steps, "images": len(rows), "auroc": judged.auroc(),
            "threshold": method.config.threshold, "own": judged.at(method.config.threshold),
            "at": {f"{t:g}": judged.at(t) for t in THRESHOLDS},
            "split": results["split"], "miou": results["miou"], "val_best": results["val_best"],
        })  # fmt: skip
    return found


def draw(method: AdvSemiSeg, row: Row, data: Data, path: Path, photo: bool) -> None:
    """Prediction, confidence, and what is selected; with `photo` on the image, and the mask before them."""
    image, mask, label, confidence = look(method, row, data)
    chosen = np.where(confidence >= method.config.threshold, label, IGNORE)
    colour = partial(coloured, image if photo else None, palette=data.palette)
    panels = [
        ("prediction", colour(label)),
        ("the critic's confidence", confidence),
        (f"selected at {method.config.threshold:g}", colour(chosen)),
    ]
    draw_panels(path, [("mask", colour(mask)), *panels] if photo else panels, (0.0, 1.0))


def as_text(lines: list[dict[str, Any]]) -> str:
    rows = [["variant", "mIoU", "AUROC", "selected %", "right of selected %", "right of rejected %",
             "selected at 0.2 %", "right of selected %", "right of rejected %"]]  # fmt: skip
    for line in lines:
        cells = [line["own"], line["at"]["0.2"]]
        shares = [_percent(cell[key]) for cell in cells for key in ("selected", "selected_right", "rejected_right")]
        rows.append([line["variant"], _percent(line["miou"]), f"{line['auroc']:.3f}", *shares])
    one = lines[0]
    head = f"{one['steps']} steps, mIoU on {one['split']}; pixels of {one['images']} unlabelled images, "
    head += "at each run's own T and at 0.2"
    return f"{head}\n\n{table(rows)}"


def _percent(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{100 * value:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("recipe", nargs="?", type=Path, default=RECIPE, metavar="RECIPE")
    options.add_argument("--out", type=Path, required=True, metavar="FILE", help=".json; the .png goes beside it")
    options.add_argument("--seed", type=int, default=0, help="of the run and of the draw of the labels")
    options.add_argument("--steps", type=int, help="of every run; else the recipe's")
    options.add_argument("--only", nargs="+", default=(), metavar="NAME", help="some of the variants")
    options.add_argument("--images", type=int, help="at most so many, evenly spaced; else all")
    options.add_argument("--no-photo", action="store_true", help="the picture shows nothing of the data set itself")
    options.add_argument("--runs", type=Path, default=ROOT / "benchmarks/runs")
    given = options.parse_args(arguments)
    out = given.out.with_suffix(".json")
    picture, photo = out.with_suffix(".png"), not given.no_photo
    lines = run(given.recipe, given.seed, given.steps, given.only, given.images, given.runs, picture, photo)
    write_json(out, {"recipe": name_of(given.recipe), "seed": given.seed, "variants": lines})
    finish({"variants": lines}, as_text(lines), given.json)


if __name__ == "__main__":
    run_script(main)

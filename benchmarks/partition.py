"""What U2PL's partition knows: are reliable pixels right more often, and are a class's negatives of other classes?

    python benchmarks/partition.py [RECIPE] --out FILE.json [--seed 0] [--steps N] [--only NAME...] [--images N]
                                   [--no-photo] [--json]

Trains the recipe in the variants of VARIANTS, or takes the runs of the same call before, with the teacher stored at
SHARES of the run. Each stored teacher labels the unlabelled training images as a whole and is compared with the masks
that exist for them: a diagnosis, nothing that training sees. Reliable are the pixels below the limit that leaves
`method.alpha` percent above it, at all times. Of the unlabelled pixels that are candidates for the queue of a class,
`other` is the share that are of another class, and `at random` that of all pixels: means over the classes, and for
`worst` the class with the least. `nearest` is the share of the anchors that have their positive nearer than all
negatives, in the last rows of metrics.csv. Writes FILE.json, and FILE.png: entropy, partition and the negatives of two
classes in one image.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, coloured, draw_panels, finish, load_method, parser, read_csv, run_script, table, train
from ledger import Job, digest, flat_options, name_of
from mechanism import with_masks
from numpy.typing import NDArray
from torch import Tensor

from semiseg.config import load_recipe
from semiseg.data.cache import open_image, open_mask
from semiseg.data.rows import Row, Rows
from semiseg.data.splits import Data
from semiseg.engine.checkpoint import load_weights
from semiseg.engine.evaluate import ahead, to_tensor
from semiseg.files import write_json
from semiseg.methods import U2PL
from semiseg.methods.u2pl import ranks_of
from semiseg.ops.contrast import candidates
from semiseg.ops.partition import entropy, histogram, threshold
from semiseg.ops.pseudo import winner
from semiseg.types import IGNORE, InputError

RECIPE = ROOT / "recipes/camvid/u2pl-mobilenetv2-46.yaml"
SHARES = (0.25, 0.5, 1.0)
KEYS = ("reliable_right", "unreliable_right", "other", "at_random", "least_other")
VARIANTS = {
    "as it is": [],
    "no contrastive loss": ["method.weight=0"],
    "no partition": ["method.alpha=0"],
    "not adaptive": ["method.adaptive=false"],
    "reliable negatives": ["method.negatives=reliable"],
    "all negatives": ["method.negatives=all"],
    "ranks from 1": ["method.rank_low=1"],
    "ranks from 4": ["method.rank_low=4"],
    "ranks to 6": ["method.rank_high=6"],
    "alpha 10": ["method.alpha=10"],
    "alpha 40": ["method.alpha=40"],
}


class Taught:
    """What a teacher says of the images, at the features' size: mask, label, entropy and class probabilities."""

    def __init__(self, method: U2PL, rows: Rows, data: Data) -> None:
        seen = list(ahead(lambda row: self._look(method, row, data), rows, threads=1))
        self.masks, self.labels, self.nats, self.probs, valid = (torch.cat(p) for p in zip(*seen, strict=True))
        share = 1 - (method.config.alpha or 20) / 100
        self.classes, self.ranks = len(data.classes), ranks_of(method.config, len(data.classes))
        self.limit = threshold(histogram(self.nats, valid, self.classes), share, self.classes)

    @staticmethod
    @torch.no_grad()
    def _look(method: U2PL, row: Row, data: Data) -> tuple[Tensor, ...]:
        _, mask, small = look(method, row, data)
        probs = small.softmax(1)
        picked = method.teacher.pick(mask, small, IGNORE).flatten()
        pixels = probs.permute(0, 2, 3, 1).flatten(0, 2)
        inside = method.teacher.pick(torch.ones_like(mask, dtype=torch.bool), small, False).flatten()
        return picked, winner(pixels), entropy(probs).flatten(), pixels, inside

    def partition(self) -> dict[str, float]:
        known, low = self.masks != IGNORE, self.nats < self.limit
        right = self.labels == self.masks
        return {
            "reliable_right": _share(right & known & low, known & low),
            "unreliable_right": _share(right & known & ~low, known & ~low),
        }

    def negatives(self, which: str) -> dict[str, float]:
        """How many of the negatives are of another class than that they are negatives of."""
        low, none = self.nats < self.limit, torch.zeros_like(self.masks, dtype=torch.bool)
        keyed = {"unreliable": ~low, "reliable": low, "all": ~none}[which] & (self.masks != IGNORE)
        _, chosen = candidates(torch.full_like(self.masks, IGNORE), self.probs, none, none, keyed, 1.0, self.ranks)
        own = self.masks.unsqueeze(1) == torch.arange(self.classes)
        count = chosen.sum(0)
        other = ((chosen & ~own).sum(0) / count)[count > 0]
        random = (1 - own.sum(0) / (self.masks != IGNORE).sum())[count > 0]
        if not len(other):
            return dict.fromkeys(("other", "at_random", "least_other"), np.nan)
        return {"other": float(other.mean()), "at_random": float(random.mean()), "least_other": float(other.min())}


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else np.nan


def look(method: U2PL, row: Row, data: Data) -> tuple[NDArray[Any], Tensor, Tensor]:
    """Image (H, W, N), mask (1, H, W) and the teacher's logits (1, C, h, w) at the size that training works on."""
    d = data.config
    image, mask = open_image(row, d.channels, d.size, d.cache), open_mask(row, data.code, d.size, d.cache)
    return image, torch.from_numpy(mask)[None].long(), method.teacher(to_tensor(image)).small


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
        overrides.append(f"train.keep={list(SHARES)}")
        recipe = load_recipe(path, overrides)
        folder = runs / f"partition-{name_of(path).replace('/', '-')}-{digest(flat_options(recipe))[:6]}-s{seed}"
        train(path, folder, overrides, None)
        recipe = load_recipe(folder / "recipe.yaml")
        data, rows = with_masks(recipe, folder)
        if images is not None:
            rows = rows[np.unique(np.linspace(0, len(rows) - 1, images).astype(np.intp))]
        method = load_method(recipe, data, folder)
        if not isinstance(method, U2PL):
            raise InputError(f"{path}: {recipe.method.name} has no partition.")
        over_time = []
        for share in SHARES:
            load_weights(folder / "kept" / f"{share:g}.safetensors", method.teacher.net)
            taught = Taught(method, rows, data)
            told = taught.partition() | taught.negatives(method.config.negatives)
            over_time.append({"step": round(share * recipe.train.steps), **told})
        if name == "as it is":
            draw(method, rows[len(rows) // 2], data, taught.limit, picture, photo)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        nearest = [float(row["nearest"]) for row in read_csv(folder / "metrics.csv") if row.get("nearest")]
        found.append({
            "variant": name, "images": len(rows), "over_time": over_time,
            "nearest": float(np.mean(nearest[-5:])) if nearest else np.nan,
            "split": results["split"], "miou": results["miou"], "val_best": results["val_best"]["miou"],
        })  # fmt: skip
    return found


@torch.no_grad()
def draw(method: U2PL, row: Row, data: Data, limit: Tensor, path: Path, photo: bool) -> None:
    """Label, entropy, what is reliable, and of what the rest are negatives; with `photo` on the image, and the mask."""
    image, mask, small = look(method, row, data)
    probs = method.teacher.net.enlarge(small, (mask.shape[1], mask.shape[2]), method.teacher.stride).softmax(1)
    label, nats = winner(probs), entropy(probs)
    unreliable = nats >= limit
    pixels = probs.permute(0, 2, 3, 1).flatten(0, 2)
    none = torch.zeros(len(pixels), dtype=torch.bool)
    _, negative = candidates(
        torch.full((len(pixels),), IGNORE), pixels, none, none, unreliable.flatten(), 1.0, method.ranks
    )
    # The two classes whose number of negatives is nearest to the median.
    counts = negative.sum(0)
    shown = sorted(range(len(data.classes)), key=lambda c: abs(int(counts[c]) - int(counts.median())))[:2]
    colour = partial(coloured, image if photo else None, palette=data.palette)
    panels = [
        ("the teacher's label", colour(label[0].numpy())),
        ("entropy, nats", nats[0].numpy()),
        ("reliable", colour(label.masked_fill(unreliable, IGNORE)[0].numpy())),
    ]
    for c in shown:
        own = torch.where(negative[:, c].view(label.shape), c, IGNORE)[0].numpy()
        panels.append((f"negatives of {data.classes[c]}", colour(own)))
    title = [("mask", colour(mask[0].numpy()))] if photo else []
    draw_panels(path, [*title, *panels], (0.0, float(np.log(len(data.classes)))))


def as_text(lines: list[dict[str, Any]]) -> str:
    rows = [["variant", "mIoU", "val", "step", "right of reliable %", "of unreliable %", "negatives of another class %",
             "at random %", "worst class %", "nearest %"]]  # fmt: skip
    for line in lines:
        for point in line["over_time"]:
            last = point is line["over_time"][-1]
            rows.append([
                line["variant"], _percent(line["miou"]) if last else "", _percent(line["val_best"]) if last else "",
                str(point["step"]),
                *(_percent(point[key]) for key in KEYS),
                _percent(line["nearest"]) if last else "",
            ])  # fmt: skip
    return f"mIoU on {lines[0]['split']}; pixels of {lines[0]['images']} unlabelled images\n\n{table(rows)}"


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

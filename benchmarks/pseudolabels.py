"""How right the pseudo-labels of a self-training run are, and what drawing crops around places does to what is learned.

    python benchmarks/pseudolabels.py [RECIPE|RUN] --out FILE.json [--seed 0] [--steps N] [--round 1] [--crops 2000]
                                      [--no-photo] [--json]

Takes a finished run, or trains the recipe (with the run of the same call before, it goes on or is taken). The labels of
one round are compared with the masks that exist for the unlabelled training images, which training never saw: a
diagnosis. All numbers are of pixels that both a mask and a pseudo-label know, at the images' own size. Of a class:
`share` of the labels, share of the masks, `labels right` (of its labels, how many are right) and `found` (of its
pixels, how many are labelled so). Tenths: the labels in the order of their confidence, cut into ten equal parts;
confidences are stored in 256 steps, and within one step right and wrong lie evenly.

Then the first --crops samples that the round's student was given are drawn again, with the run's seed, places and
schedule, and once more with no places: how many of the pixels with a pseudo-label are wrong, and what share of all
labelled pixels (real masks too) each class has. Images without any mask are left out of both pools.

Writes FILE.json, and FILE.png of the image in the middle of the pool: label, confidence, and on it the places as dots
in the colours of their classes; before them the image, without --no-photo.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import HERE, ROOT, coloured, draw_panels, finish, parser, run_script, table, train
from ledger import Job, digest, flat_options, name_of
from mechanism import with_masks
from numpy.typing import NDArray

from semiseg.config import Recipe, load_recipe
from semiseg.data.cache import open_confidence, open_image, open_mask
from semiseg.data.centroids import class_centroids
from semiseg.data.loader import Steps, steps
from semiseg.data.rows import Row, Rows
from semiseg.data.sampling import Timetable
from semiseg.data.splits import Data
from semiseg.engine.evaluate import ahead
from semiseg.engine.pseudo import REPORT, finished
from semiseg.engine.schedule import scheduled
from semiseg.files import write_json
from semiseg.methods import SelfTraining
from semiseg.methods.selftraining import stream_of
from semiseg.types import IGNORE, InputError, Labelled

RECIPE = ROOT / "recipes/camvid/selftraining-mobilenetv2-46.yaml"
Counts = NDArray[np.int64]


def run_of(path: Path, seed: int, length: int | None, runs: Path) -> Path:
    """The folder of a finished run: that given, or that of a recipe, trained where it is not yet."""
    if path.is_dir():
        return path
    overrides = [*Job.overrides(seed), *([f"train.steps={length}"] if length else [])]
    key = digest(flat_options(load_recipe(path, overrides)))[:6]
    folder = runs / f"pseudolabels-{name_of(path).replace('/', '-')}-{key}-s{seed}"
    train(path, folder, overrides, None)
    return folder


def pools(recipe: Recipe, folder: Path, number: int) -> tuple[Data, Rows, Rows]:
    """The data, and its images that have both: with their pseudo-labels of that round, and with their masks."""
    if not isinstance(recipe.method.options, SelfTraining.Config):
        raise InputError(f"{folder}: {recipe.method.name} writes no pseudo-labels by rounds: name a self-training run.")
    place = folder / f"round-{number}" / "pseudo"
    if not (place / REPORT).exists():
        raise InputError(f"{place / REPORT} is missing: finish the run first, or choose another --round.")
    data, known = with_masks(recipe, folder)
    pseudo, _ = finished(data.unlabelled, data, place)
    number_of = {str(row.image): i for i, row in enumerate(known)}
    both = {i: number_of[name] for i, row in enumerate(pseudo) if (name := str(row.image)) in number_of}
    return data, pseudo[list(both)], known[list(both.values())]


def count(pseudo: Rows, known: Rows, data: Data) -> Counts:
    """Pixels by class of the label, class of the mask and confidence, (C, C, 256)."""
    classes = len(data.classes)

    def one(i: int) -> Counts:
        label, sure = open_mask(pseudo[i], data.code, None, False), open_confidence(pseudo[i], None)
        mask = open_mask(known[i], data.code, None, False)
        both = (label != IGNORE) & (mask != IGNORE)
        key = (label[both].astype(np.int64) * classes + mask[both]) * 256 + sure[both]
        return np.bincount(key, minlength=classes * classes * 256)

    total = np.zeros(classes * classes * 256, dtype=np.int64)
    for counts in ahead(one, range(len(pseudo))):
        total += counts
    return total.reshape(classes, classes, 256)


def tenths(counts: Counts) -> list[dict[str, float]]:
    """Of each tenth of the pixels by confidence, lowest first: how many are right, and up to which confidence it is."""
    pixels = counts.sum((0, 1))
    right = np.trace(counts)
    upto = np.concatenate([[0], pixels.cumsum()])
    edges = upto[-1] * np.arange(11) / 10
    good = np.diff(np.interp(edges, upto, np.concatenate([[0], right.cumsum()])))
    most = np.searchsorted(upto[1:], edges[1:] * (1 - 1e-9))
    return [{"right": float(g / upto[-1] * 10), "upto": float(m / 255)} for g, m in zip(good, most, strict=True)]


def by_class(counts: Counts, names: Sequence[str]) -> dict[str, dict[str, float]]:
    pairs = counts.sum(2)
    labels, masks, right = pairs.sum(1), pairs.sum(0), pairs.diagonal()
    with np.errstate(invalid="ignore"):
        columns = (labels / pairs.sum(), masks / pairs.sum(), right / labels, right / masks)
    keys = ("share", "share_of_masks", "labels_right", "found")
    return {name: {k: float(c[i]) for k, c in zip(keys, columns, strict=True)} for i, name in enumerate(names)}


def drawn(recipe: Recipe, data: Data, pseudo: Rows, known: Rows, crops: int, centred: float) -> dict[str, Any]:
    """The first crops of the student: share of the pseudo-labels' pixels that are wrong, and of each class (C,)."""
    config = recipe.method.options.model_copy(update={"centred": centred})
    rows = data.labelled + pseudo
    stream = replace(stream_of(config, recipe.train, data, rows, len(pseudo)), top=1)
    stream = scheduled({"labelled": stream}, recipe.train)["labelled"]
    timetable = Timetable(stream.phases, crops)
    # The same draws of the same images twice: once with pseudo-labels, once with masks.
    given, true = (
        steps(Steps({"labelled": replace(stream, rows=some)}, timetable, data, recipe.train.seed), 0, 1, False)
        for some in (rows, data.labelled + known)
    )
    wrong = both = 0
    shown = torch.zeros(256, dtype=torch.int64)
    for one, other in zip(given, true, strict=True):
        batch, masks = one.batches["labelled"], other.batches["labelled"]
        assert isinstance(batch, Labelled)
        assert isinstance(masks, Labelled)
        shown += torch.bincount(batch.mask.flatten(), minlength=256)
        of_pseudo = (batch.row >= len(data.labelled)).view(-1, 1, 1)
        sure = of_pseudo & (batch.mask != IGNORE) & (masks.mask != IGNORE)
        wrong += int((sure & (batch.mask != masks.mask)).sum())
        both += int(sure.sum())
    classes = shown[: len(data.classes)].double()
    return {
        "centred": centred, "crops": timetable.samples, "wrong": wrong / both if both else np.nan,
        "classes": (classes / classes.sum()).tolist(),
    }  # fmt: skip


def draw(row: Row, data: Data, tile: tuple[int, int], least: int, path: Path, photo: bool) -> None:
    """The picture of one pseudo-labelled image at the size that training works on."""
    d = data.config
    label = open_mask(row, data.code, d.size, d.cache)
    sure = open_confidence(row, d.size) / 255
    one = Rows.of("", [row.image.as_posix()]).with_masks([row.mask], row.code, [row.confidence])
    places = class_centroids(one, data, tile, least)
    at = np.split(np.stack([places.x, places.y], 1), places.first[1:-1])
    dots = {
        name: (some, colour) for name, some, colour in zip(data.classes, at, data.palette, strict=True) if len(some)
    }
    image = open_image(row, d.channels, d.size, d.cache)
    colour = partial(coloured, palette=data.palette)
    panels = [
        ("pseudo-label", colour(image if photo else None, label)),
        ("confidence, and the places of classes", sure),
    ]
    blank = np.full(label.shape, IGNORE)
    draw_panels(path, [("image", colour(image, blank)), *panels] if photo else panels, (0.0, 1.0), dots)


def run(
    path: Path, seed: int, length: int | None, number: int, crops: int, runs: Path, picture: Path, photo: bool
) -> dict[str, Any]:
    folder = run_of(path, seed, length, runs)
    recipe = load_recipe(folder / "recipe.yaml")
    data, pseudo, known = pools(recipe, folder, number)
    c, counts = recipe.method.options, count(pseudo, known, data)
    draw(pseudo[len(pseudo) // 2], data, c.tile or recipe.train.crop, c.least_pixels, picture, photo)
    return {
        "run": folder.name, "seed": recipe.train.seed, "steps": recipe.train.steps, "round": number,
        "images": len(pseudo), "classes": list(data.classes),
        "right": float(np.trace(counts).sum() / counts.sum()),
        "per_class": by_class(counts, data.classes), "tenths": tenths(counts),
        "crops": [drawn(recipe, data, pseudo, known, crops, share) for share in (0.0, c.centred)],
        "confusion": counts.sum(2).T.tolist(),
    }  # fmt: skip


def as_text(result: dict[str, Any]) -> str:
    without, with_places = result["crops"]
    rows = [["class", "share of labels %", "of masks %", "labels right %", "found %", "of crops without places %",
             "with places %"]]  # fmt: skip
    for i, (name, one) in enumerate(result["per_class"].items()):
        crops = [_percent(side["classes"][i]) for side in (without, with_places)]
        rows.append([name, *map(_percent, one.values()), *crops])
    order = [["tenth by confidence", *map(str, range(1, 11))],
             ["up to", *(f"{one['upto']:.2f}" for one in result["tenths"])],
             ["right %", *(_percent(one["right"]) for one in result["tenths"])]]  # fmt: skip
    head = (
        f"{result['run']}, round {result['round']}: labels of {result['images']} images, {_percent(result['right'])} % "
    )
    head += (
        f"of the pixels right; wrong in {with_places['crops']} crops: {_percent(without['wrong'])} % without places, "
    )
    head += f"{_percent(with_places['wrong'])} % with {with_places['centred']:g} of the crops around places"
    return f"{head}\n\n{table(rows)}\n\n{table(order)}"


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("path", nargs="?", type=Path, default=RECIPE, metavar="RECIPE|RUN")
    options.add_argument("--out", type=Path, required=True, metavar="FILE", help=".json; the .png goes beside it")
    options.add_argument("--seed", type=int, default=0, help="of a run that is trained, and of the draw of the labels")
    options.add_argument("--steps", type=int, help="of each of its stages; else the recipe's")
    options.add_argument("--round", type=int, default=1, help="whose labels are looked at")
    options.add_argument("--crops", type=int, default=2000, help="that are drawn with places, and without")
    options.add_argument("--no-photo", action="store_true", help="the picture shows nothing of the data set itself")
    options.add_argument("--runs", type=Path, default=HERE / "runs")
    given = options.parse_args(arguments)
    out = given.out.with_suffix(".json")
    picture, photo = out.with_suffix(".png"), not given.no_photo
    result = run(given.path, given.seed, given.steps, given.round, given.crops, given.runs, picture, photo)
    write_json(out, result)
    finish(result, as_text(result), given.json)


if __name__ == "__main__":
    run_script(main)

"""Writes a recipe for a folder: measures it, chooses, and gives each choice its reason as a comment."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from scipy import ndimage

from semiseg import methods, parallel
from semiseg.config import Recipe, parse
from semiseg.data.formats import image_size, mask_values, read_mask
from semiseg.data.loader import Steps
from semiseg.data.sampling import Timetable
from semiseg.data.splits import Data, DataConfig, load_data, looks_like_sequences
from semiseg.networks.factory import Build
from semiseg.types import IGNORE, Clock, InputError

SAMPLE = 100
"""Files that are measured, evenly spaced over the pool."""
FEW_MASKS = 200
"""Below this a tenth of the masks is too few for a score, so folds are proposed."""
SMALL_OBJECT = 8
"""Px a side, two of a decoder's cells at stride 4: an object below it is lost."""
MOST_STEPS = 40_000
FEWEST_STEPS = 100


@dataclass(frozen=True)
class Survey:
    """What the images and masks look like: medians in px, class shares 0..1 of the labelled pixels, side of the small objects."""

    height: int
    width: int
    largest: int
    shares: dict[str, float]
    object_side: float
    object_class: str


def plan(folder: Path, hours: float = 1.0) -> str:
    """A recipe for a folder, as YAML with comments.

    Args:
        folder: images/ and masks/, divided into splits or not.
        hours: how long the training may take on this machine.

    Raises:
        InputError: the folder is unusable, or hours is not above zero.
    """
    if hours <= 0:
        raise InputError(f"--hours is {hours}, but it should be above 0.")
    data_lines, data = _data(folder)
    survey = _survey(data)
    device = parallel.device("auto")
    lines = {"data": data_lines, **_choices(data, survey, device)}
    seconds = _time_steps(_recipe(lines))
    # A tenth is left for the evaluations and the start.
    steps = int(np.clip(0.9 * hours * 3600 / seconds, FEWEST_STEPS, MOST_STEPS))
    short = " (the fewest that make sense: it will take longer)" if steps == FEWEST_STEPS else ""
    lines["train"]["steps"] = (steps, f"three steps took {seconds:.2f} s each here: {hours:g} h{short}")
    lines["train"]["save_every"] = (max(10, steps // 50), "a stop loses at most a fiftieth of the run")
    return _yaml(folder, data, survey, lines)


Lines = dict[str, tuple[Any, str]]
"""Option -> value and reason."""


def _data(folder: Path) -> tuple[Lines, Data]:
    split = (folder / "images" / "train").is_dir()
    lines: Lines = {
        "root": (str(folder.resolve()), "the folder"),
        "format": ("splits", "images/ is divided into splits")
        if split
        else ("folder", "images/ and masks/, paired by name"),
    }
    if not (folder / "classes.json").is_file():
        lines |= _classes(folder)
    if not split:
        lines |= _division(load_data(_config(lines)))
    return lines, load_data(_config(lines))


def _config(lines: Lines) -> DataConfig:
    return parse({"data": {key: value for key, (value, _) in lines.items()}}, "the planned recipe").data


def _classes(folder: Path) -> Lines:
    """Class names for a folder that has no class file, from the values in its masks."""
    masks = sorted(path for path in (folder / "masks").rglob("*") if path.is_file() and not path.name.startswith("."))
    if not masks:
        raise InputError(f"{folder / 'masks'} has no mask: draw some, with the names of their images.")
    values = sorted(set().union(*(mask_values(path) for path in _spread(masks))))
    if values == [0, IGNORE]:
        return {
            "classes": (["background", "object"], "names are free: there is no classes.json"),
            "values": ({0: 0, IGNORE: 1}, "the masks hold 0 and 255: 255 is taken for the object, not for `no label`"),
        }
    ids = [value for value in values if value != IGNORE]
    count = max([*ids, 1]) + 1
    names = ["background", *(f"class_{i}" for i in range(1, count))]
    return {"classes": (names, f"names are free: the masks hold {_some(ids)}, and there is no classes.json")}


def _division(data: Data) -> Lines:
    names = data.labelled.image.tolist()
    grouped = looks_like_sequences(names, 5)
    why_group = (
        "names look like sequences: frames of one stay together" if grouped else "names do not look like sequences"
    )
    if len(names) < 5:
        raise InputError(
            f"{data.config.root} has {len(names)} masks: draw at least five, so that some can be held out."
        )
    if len(names) < FEW_MASKS:
        lines: Lines = {
            "folds": (
                5,
                f"{len(names)} masks are too few for one held-out part: run fold=0 to 4, each mask is tested once",
            ),
            "fold": (0, "this run tests the first of five parts"),
        }
    else:
        lines = {
            "split": ([0.7, 0.15, 0.15], f"{len(names)} masks: train, val (chooses the checkpoint), test (is reported)")
        }
    return lines | {"group": (grouped, why_group)}


def _survey(data: Data) -> Survey:
    images = data.labelled + data.unlabelled
    sizes = np.array([image_size(images[i].image) for i in _spread(range(len(images)))])
    pixels = np.zeros(len(data.classes), dtype=np.int64)
    sides: dict[int, list[float]] = {c: [] for c in range(len(data.classes))}
    for i in _spread(range(len(data.labelled))):
        path = data.labelled[i].mask
        assert path is not None
        mask = read_mask(path, data.code)
        pixels += np.bincount(mask[mask != IGNORE], minlength=len(pixels))
        for c in range(len(pixels)):
            sides[c] += _object_sides(mask == c)
    # The class with the smallest objects decides how far images may shrink; one that fills the image has none.
    typical = {c: float(np.median(s)) for c, s in sides.items() if s}
    smallest = min(typical, key=lambda c: typical[c], default=0)
    return Survey(
        height=int(np.median(sizes[:, 0])),
        width=int(np.median(sizes[:, 1])),
        largest=int(sizes.max()),
        shares=dict(zip(data.classes, (pixels / max(1, pixels.sum())).tolist(), strict=True)),
        object_side=typical.get(smallest, float(sizes.min())),
        object_class=data.classes[smallest],
    )


def _object_sides(inside: NDArray[np.bool_]) -> list[float]:
    """The root of the area, in px, of each connected part that is more than a speck."""
    labels, count = ndimage.label(inside)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return [float(side) for side in np.sqrt(areas[areas >= 9])]


def _choices(data: Data, survey: Survey, device: torch.device) -> dict[str, Lines]:
    gpu = device.type == "cuda"
    name = "a GPU" if gpu else "a CPU"
    longest = max(survey.height, survey.width)
    limit = 1024 if gpu else 256
    # Never so small that the typical small object disappears, however slow that is.
    needed = int(np.ceil(longest * SMALL_OBJECT / max(survey.object_side, 1)))
    working = min(longest, max(limit, min(needed, 2 * limit)))
    ratio = working / longest
    side = survey.object_side * ratio
    crop = [_crop(s * ratio, 320 if gpu else 160) for s in (survey.height, survey.width)]
    low = float(np.clip(round(SMALL_OBJECT / max(side, 1), 2), 0.5, 1.0))
    objects = f"objects of {survey.object_class} are about {side:.0f} px wide there"
    sizes: Lines = {}
    if survey.largest > working:
        sizes["size"] = (
            working,
            f"longest side in px: images are {survey.width}x{survey.height}, and {name} works here; {objects}",
        )
    sizes["scale"] = ([low, 2.0], f"not below {SMALL_OBJECT} px for small objects: {objects}")
    return {
        "data+": sizes,
        "network": {
            "name": ("deeplabv3plus", "a good default"),
            "encoder": ("resnet50", "fits a GPU") if gpu else ("mobilenetv2_100", "fast enough for a CPU"),
        },
        "method": {
            "name": (methods.DEFAULT, f"{len(data.labelled)} labelled and {len(data.unlabelled)} unlabelled images")
        },
        "train": {
            "batch": (8, "images of each kind a step"),
            "crop": (crop, "(height, width) in px, most of an image at its working size"),
            "precision": ("bf16", "half the memory") if gpu and torch.cuda.is_bf16_supported() else ("fp32", f"{name}"),
            "channels_last": (True, "the faster memory layout of convolutions"),
        },
    }


def _crop(side: float, most: int) -> int:
    """A multiple of 32 px that most images fill."""
    return max(32, min(most, int(side) // 32 * 32))


def _recipe(lines: dict[str, Lines]) -> Recipe:
    plain = {section: {key: value for key, (value, _) in options.items()} for section, options in lines.items()}
    plain["data"] |= plain.pop("data+")
    return parse(plain, "the planned recipe")


def _time_steps(recipe: Recipe) -> float:
    """Seconds a step, the mean of three after a first one."""
    data, device = load_data(recipe.data), parallel.device(recipe.train.device)
    network = recipe.network.model_copy(update={"weights": "random"})  # as fast as others, and nothing is downloaded
    precision = torch.bfloat16 if recipe.train.precision == "bf16" else None
    build = Build(len(data.classes), recipe.data.channels, network, recipe.optim, 0, precision, True, None, device)
    method = methods.find(recipe.method.name)(recipe.method.options, build)
    assert isinstance(method, methods.StepMethod)
    method.to(device)
    streams = method.streams(data, recipe.train.batch, recipe.train.crop)
    timetable = Timetable(next(iter(streams.values())).phases, recipe.train.steps * recipe.train.batch)
    steps = Steps(streams, timetable, data, 0)
    seconds = []
    for t in range(4):
        begun = time.perf_counter()
        item = steps[t]
        if isinstance(item, InputError):
            raise item
        values = method.step(Clock(t, timetable.steps), **{name: b.to(device) for name, b in item.batches.items()})
        float(values["loss"])  # waits for the device
        seconds.append(time.perf_counter() - begun)
    return float(np.mean(seconds[1:]))


def _yaml(folder: Path, data: Data, survey: Survey, lines: dict[str, Lines]) -> str:
    shares = ", ".join(f"{name} {100 * share:.2g} %" for name, share in survey.shares.items())
    text = [
        f"# Written by `semiseg init {folder}`. Train with: semiseg train THIS_FILE --out runs/{folder.resolve().name}",
        f"# {len(data.labelled)} labelled, {len(data.unlabelled)} unlabelled, {len(data.val)} val, {len(data.test)} test images;"
        f" typically {survey.width}x{survey.height} px.",
        f"# Labelled pixels: {shares}.",
    ]
    merged = dict(lines)
    merged["data"] = lines["data"] | merged.pop("data+")
    for section, options in merged.items():
        text += ["", f"{section}:"]
        for key, (value, reason) in options.items():
            plain = (
                yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
                .removesuffix("\n...\n")
                .strip()
            )
            text.append(f"  {key}: {plain}  # {reason}")
    return "\n".join(text) + "\n"


def _spread(items: Sequence[Any]) -> list[Any]:
    """At most SAMPLE of the items, evenly spaced."""
    if len(items) <= SAMPLE:
        return list(items)
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, SAMPLE)]


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


__all__ = ["Survey", "plan"]

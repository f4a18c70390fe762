"""Writes a recipe for a folder: measures it, chooses, and gives each choice its reason as a comment."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from scipy import ndimage

from semiseg import experiment, methods, parallel
from semiseg.config import Recipe, build_of, parse
from semiseg.data.formats import image_channels, image_size, mask_values, read_mask
from semiseg.data.loader import Steps
from semiseg.data.packed import File
from semiseg.data.sampling import Timetable
from semiseg.data.splits import IMAGE_SUFFIXES, Data, DataConfig, load_data, looks_like_sequences, read_classes
from semiseg.types import IGNORE, Clock, InputError, some

T = TypeVar("T")
AnyFile = TypeVar("AnyFile", Path, File)
Floats = NDArray[np.float64]

SAMPLE = 100
"""Files that are measured, evenly spaced over the pool."""
FEW_MASKS = 200
"""Below this a tenth of the masks is too few for a score, so folds are proposed."""
CELL = 4
"""Px a side of a decoder's cell (stride 4): an object below it is lost, and one of two cells is seen well."""
FEWEST_STEPS, MOST_STEPS = 100, 40_000
SMALL = 256
"""px: crops below it have a milder strong view."""
TEACHER = 1 / 20
"""At most this share of a run is what an EMA teacher averages over."""


@dataclass(frozen=True)
class Survey:
    """What images and masks look like.

    height, width   median in px
    longest         longest side of the largest image, px
    shares          of the labelled pixels by class, 0..1
    small           the class with the smallest objects; three quarters of its pixels lie in objects of at least
    side            px a side (root of the area), and
    relative        this share of the image's longest side
    steady          whether objects keep their size in px where images are larger, as under one microscope or satellite
    """

    height: int
    width: int
    longest: int
    shares: dict[str, float]
    small: str
    side: float
    relative: float
    steady: bool


def plan(folder: Path, hours: float | None = 1.0) -> str:
    """A recipe for a folder, as YAML with comments.

    Args:
        folder: images/ and masks/, divided into splits or not.
        hours: how long the training may take on this machine; none: nothing is timed, the steps are left out.

    Raises:
        InputError: the folder is unusable, or hours is not above zero.
    """
    if hours is not None and not hours > 0:
        raise InputError(f"--hours is {hours:g}, but it should be above 0.")
    data_lines, data = _data(folder)
    survey = _survey(data)
    lines = _choices(data, survey, parallel.device("auto"))
    lines["data"] = data_lines | lines["data"]
    if hours is not None:
        recipe = _recipe(lines)
        seconds, beside = (_time_steps(one) for one in (recipe, experiment.labelled_only(recipe)))
        pairs = max(1, len(experiment.members(recipe)))
        every = pairs * (seconds + beside) + seconds * (pairs > 1)
        # A tenth is left for the evaluations and the start.
        fitting = int(0.9 * hours * 3600 / every)
        steps = int(np.clip(fitting, FEWEST_STEPS, MOST_STEPS))
        what = f"{pairs} trainings, {pairs} labelled-only ones and the last one" if pairs > 1 else "both trainings"
        timed = f"a step of {what}, timed here, takes {every:.2g} s"
        why = f"{hours:g} h: {timed}"
        if fitting < steps:
            minutes = math.ceil(steps * every / 60 / 0.9)
            why = f"the fewest that make sense, some {minutes} min, longer than {hours:g} h: {timed}"
        elif fitting > steps:
            why = f"more are rarely of use, although {hours:g} h have room for {fitting}: {timed}"
        lines["train"]["steps"] = (steps, why)
        teacher, decay = recipe.method.options, round(1 - 1 / (TEACHER * steps), 3)
        if decay < getattr(teacher, "ema", 0):
            lines["method"]["ema"] = (decay, "the teacher is the mean of about a twentieth of so short a run")
        lines["train"]["save_every"] = (max(10, steps // 50), "steps between checkpoints: what a power cut may cost")
    return _yaml(folder, data, survey, lines)


Lines = dict[str, tuple[Any, str]]
"""Option -> value and reason."""


def _data(folder: Path) -> tuple[Lines, Data]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: name one with images/ and masks/ in it.")
    split = (folder / "images" / "train").is_dir()
    lines: Lines = {
        "root": (str(folder.resolve()), "the folder"),
        "format": ("splits", "images/ is divided into splits")
        if split
        else ("folder", "images/ and masks/, paired by name"),
    }
    lines |= _channels(folder)
    lines |= _classes(folder, lines)
    if not split:
        lines |= _division(load_data(_config(lines)))
    return lines, load_data(_config(lines))


def undivided(folder: Path) -> DataConfig | None:
    """How to read a folder whose images are not divided into splits; none: they are, or it is no folder of images.

    Raises:
        InputError: a mask is damaged.
    """
    if not (folder / "images").is_dir() or (folder / "images" / "train").is_dir():
        return None
    lines: Lines = {"root": (str(folder.resolve()), "")}
    return _config(lines | _classes(folder, lines))


def _config(lines: Lines) -> DataConfig:
    return parse({"data": {key: value for key, (value, _) in lines.items()}}, "the planned recipe").data


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")


def _channels(folder: Path) -> Lines:
    """Left at 3 for grey images too: pretrained encoders expect three channels, and grey fills them all."""
    counts = {_readable(image_channels, path) for path in _spread(_files(folder / "images"), 8)} - {None}
    if len(counts) == 1 and not counts & {1, 3}:
        return {"channels": (counts.pop(), "of the images; the encoder's first layer is adapted to them")}
    if 1 in counts:
        which = "images" if len(counts) == 1 else "some images"
        return {"channels": (3, f"{which} are grey: they fill the three channels that pretrained encoders expect")}
    return {}


def _classes(folder: Path, lines: Lines) -> Lines:
    """Class names where there is no class file, and ids for masks of 0 and 255, from the values in the masks."""
    known = (folder / "classes.json").is_file()
    if known and len(read_classes(_config(lines), folder)[0]) != 2:
        return {}
    masks = _spread(_files(folder / "masks"))
    if not masks:
        return {"classes": (["background", "object"], "")}  # what is lacking is said where the masks are looked for
    values = sorted(set().union(*(_values(path, known) for path in masks)))
    found: Lines = {}
    names = ["background", *(f"class_{i}" for i in range(1, max([1, *(v for v in values if v != IGNORE)]) + 1))]
    if values == [0, IGNORE]:
        why = "the masks hold 0 and 255: 255 is taken for class 1, not for `no label`"
        found, names = {"values": ({0: 0, IGNORE: 1}, why)}, ["background", "object"]
    if not known:
        why = f"names are free, in the order of the ids; found: {some(values, 8)} in {len(masks)} masks"
        found["classes"] = (names, why)
    return found


def _values(path: Path, known: bool) -> set[int]:
    return mask_values(path) if not known else _readable(mask_values, path) or set()


def _readable(function: Callable[[AnyFile], T], path: AnyFile) -> T | None:
    """None where the file is damaged: what cannot be done without, its reader will name."""
    try:
        return function(path)
    except InputError:
        return None


def _division(data: Data) -> Lines:
    names = data.labelled.image.tolist()
    grouped = looks_like_sequences(names, 5)
    if len(names) < 5:
        raise InputError(f"{data.config.root} has {len(names)} masks: draw at least five, to hold some out.")
    if len(names) < FEW_MASKS:
        lines: Lines = {
            "folds": (5, f"{len(names)} masks are too few to hold out one part: each is tested by a model without it"),
        }
    else:
        lines = {
            "split": ([0.7, 0.15, 0.15], f"{len(names)} masks: train, val (chooses the checkpoint), test (is reported)")
        }
    why = "names look like sequences: frames of one stay together" if grouped else "names do not look like sequences"
    return lines | {"group": (grouped, why)}


def _survey(data: Data) -> Survey:
    shapes = [_readable(image_size, data.unlabelled[i].image) for i in _spread(range(len(data.unlabelled)))]
    pixels = np.zeros(len(data.classes), dtype=np.int64)
    parts: list[list[Floats]] = [[] for _ in data.classes]
    for i in _spread(range(len(data.labelled))):
        path = data.labelled[i].mask
        assert path is not None
        mask = read_mask(path, data.code)
        shapes.append((mask.shape[0], mask.shape[1]))
        pixels += np.bincount(mask.ravel(), minlength=IGNORE + 1)[: len(pixels)]
        for c in range(len(pixels)):
            parts[c].append(_objects(mask == c, i))
    sizes = np.array([shape for shape in shapes if shape is not None])
    objects = {name: np.concatenate(found) for name, found in zip(data.classes, parts, strict=True)}
    # The class with the smallest objects decides how far images may shrink.
    sides = {name: _quarter(found, 1) for name, found in objects.items() if len(found)}
    small = min(sides, key=lambda name: sides[name], default=data.classes[0])
    found = objects[small] if sides else np.array([[sizes.min(), 1.0, 0.0]])
    return Survey(
        height=int(np.median(sizes[:, 0])),
        width=int(np.median(sizes[:, 1])),
        longest=int(sizes.max()),
        shares=dict(zip(data.classes, (pixels / max(1, pixels.sum())).tolist(), strict=True)),
        small=small,
        side=_quarter(found, 0),
        relative=_quarter(found, 1),
        steady=_steady(found),
    )


def _objects(inside: NDArray[np.bool_], image: int) -> Floats:
    """The connected parts that are more than a speck.

    Returns (n, 3): root of the area in px, the same as a share of the image's longest side, number of the image.
    """
    labels, count = ndimage.label(inside)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    sides = np.sqrt(areas[areas >= 9])
    return np.stack([sides, sides / max(inside.shape), np.full(len(sides), image)], axis=1)


def _quarter(objects: Floats, column: int) -> float:
    """The value of a column below which a quarter of the pixels lies: specks are many, but they are few pixels."""
    order = objects[np.argsort(objects[:, column])]
    pixels = np.cumsum(order[:, 0] ** 2)
    return float(order[np.searchsorted(pixels, 0.25 * pixels[-1]), column])


def _steady(objects: Floats) -> bool:
    """Whether images differ in size, and objects differ less in px than as shares of their images."""
    images = [objects[objects[:, 2] == image] for image in np.unique(objects[:, 2])]
    px, shares = (np.array([np.median(found[:, column]) for found in images]) for column in (0, 1))
    longest = px / shares
    return bool(longest.max() > 1.2 * longest.min() and np.log(px).std() < np.log(shares).std())


def _choices(data: Data, survey: Survey, device: torch.device) -> dict[str, Lines]:
    gpu = device.type == "cuda"
    working, sizes = _working_size(survey, 1024 if gpu else 256)
    ratio = 1 if survey.steady else working / max(survey.height, survey.width)
    side = survey.side if survey.steady else survey.relative * working
    high, wide = round(survey.height * ratio), round(survey.width * ratio)
    crop = [_crop(s, 320 if gpu else 160) for s in (high, wide)]
    low = float(np.clip(np.ceil(100 * CELL / side) / 100, 0.5, 1.0))
    sizes["scale"] = (
        [low, 2.0],
        f"factor on a training image's size: {survey.small}, mostly above {side:.0f} px, should stay above {CELL} px",
    )
    bf16 = gpu and torch.cuda.is_bf16_supported()
    few = "half the memory" if bf16 else "this GPU has no bf16" if gpu else "bf16 is for GPUs"
    return {
        "data": sizes,
        "network": {
            "name": ("deeplabv3plus", "a good default"),
            "encoder": ("resnet50", "fits a GPU") if gpu else ("mobilenetv2_100", "fast enough for a CPU"),
            "weights": (
                "pretrained",
                "fetched by timm; where that fails training starts from random weights, and says so",
            ),
        },
        "method": {"name": (methods.DEFAULT, _why_method(data))} | (_mild() if max(crop) < SMALL else {}),
        "train": {
            "batch": (8, "labelled and as many unlabelled images a step"),
            "crop": (
                crop,
                f"(height, width) in px of a training sample; images are typically {high} high and {wide} wide",
            ),
            "precision": ("bf16" if bf16 else "fp32", few),
        },
    }


def _mild() -> Lines:
    """The strong view of small crops, where the method has one: see "What was measured" on FixMatch's page."""
    known = methods.METHODS[methods.DEFAULT].Config.model_fields
    lines: Lines = {
        "jitter": ([0.25, 0.25, 0.25, 0.1], "colours of the strong view, milder than for crops of 321 px and more"),
        "blur": (0, "a blur of 2 px would take away what there is to see in small crops"),
    }
    return {name: line for name, line in lines.items() if name in known}


def _working_size(survey: Survey, limit: int) -> tuple[int, Lines]:
    """The longest side in px to work at, and the line that says so if images are resized."""
    longest = max(survey.height, survey.width)
    if survey.steady:
        why = "images keep their sizes: objects are of like size in px in small and large ones"
        return longest, {"size": (None, why)}
    # Never so small that small objects go under, however slow that is.
    needed = int(np.ceil(2 * CELL / survey.relative / 32) * 32)
    working = min(longest, max(limit, min(needed, 2 * limit)))
    if survey.longest <= working:
        return working, {}
    side = survey.relative * working
    why = f"longest side in px, typically from {survey.width}x{survey.height}: objects of {survey.small}, the smallest,"
    return working, {"size": (working, f"{why} are mostly above {side:.0f} px then")}


def _why_method(data: Data) -> str:
    if not len(data.labelled.without(data.unlabelled)):
        return "no image lacks a mask, so those with one serve twice; see whether method=supervised does as well"
    return f"{len(data.labelled)} labelled and {len(data.unlabelled)} unlabelled images"


def _crop(side: int, most: int) -> int:
    """A multiple of 32 px that most images fill."""
    return max(32, min(most, side // 32 * 32))


def _recipe(lines: dict[str, Lines]) -> Recipe:
    plain = {section: {key: value for key, (value, _) in options.items()} for section, options in lines.items()}
    return parse(plain, "the planned recipe")


def _time_steps(recipe: Recipe) -> float:
    """Seconds a step, the mean of three after a first one."""
    data, device = load_data(recipe.data), parallel.device(recipe.train.device)
    network = recipe.network.model_copy(update={"weights": "random"})  # as fast as others, and nothing is downloaded
    build = build_of(recipe.model_copy(update={"network": network}), data, device)
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
    pools = {"labelled": data.labelled, "unlabelled": data.unlabelled, "val": data.val, "test": data.test}
    text = [
        f"# Written by `semiseg init {folder}`. What is not here has its default: see `semiseg options`.",
        f"# Images: {', '.join(f'{len(rows)} {name}' for name, rows in pools.items())}.",
        f"# Labelled pixels: {shares}.",
    ]
    for section, options in lines.items():
        text += ["", f"{section}:"]
        for key, (value, reason) in options.items():
            plain = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
            text.append(f"  {key}: {plain.removesuffix(chr(10) + '...' + chr(10)).strip()}  # {reason}")
    return "\n".join(text) + "\n"


def _spread(items: Sequence[T], most: int = SAMPLE) -> list[T]:
    """At most so many of the items, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, most)]


__all__ = ["Survey", "plan", "undivided"]

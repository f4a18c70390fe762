"""Looks at every file before a run does: what cannot be used, what makes a score too high, how a batch looks."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from semiseg.data.cache import cache_dir, open_image, open_mask, open_pair
from semiseg.data.formats import Colour, mask_file, mask_values
from semiseg.data.layouts import CITYSCAPES_IDS
from semiseg.data.rows import Row, Rows
from semiseg.data.splits import Data, looks_like_sequences, prefixes
from semiseg.files import replacing, write_json
from semiseg.types import IGNORE, InputError, some

MOST_UNLABELLED = 10_000
"""Unlabelled images that are opened, evenly spaced in the pool: enough to notice what is wrong with many."""

ALIKE = 0.92
"""Correlation of two images' coarse gradients above which they count as near-duplicates.

Measured on CamVid, IDD-lite and DSB2018: unrelated images of two splits reach 0.87 (two empty motorways); copies saved
as JPEG of quality 50, halved or 1.3 times as bright are above 0.95, copies shifted by 1.5 % at 0.86 to 0.97; video
frames a second apart are mostly at 0.6, those of a standing car at 0.9.
"""

_LOOKED_AT = 20
"""Masks of a pool that are opened once more, for a mistake that is in all or in none."""
_GRID = 16
_FLAT = 0.5
_OPENED_AT_ONCE = min(8, os.cpu_count() or 1)
_IGNORED_COLOUR = (224, 224, 192)


@dataclass(frozen=True)
class Report:
    """What `check` found. The data is usable if there are no problems."""

    problems: tuple[str, ...]
    """What makes the data unusable or the score wrong, one sentence each."""
    warnings: tuple[str, ...]
    """What the user should know, one sentence each, beginning with the notes of `load_data`."""
    family: str
    classes: tuple[str, ...]
    images: dict[str, int]
    """Images in each pool: labelled, unlabelled, val, test."""
    sizes: tuple[tuple[tuple[int, int], int], ...]
    """((H, W) in px, number of images), the most frequent first."""
    pixels: dict[str, NDArray[np.int64]]
    """By pool with masks, (C + 1,): pixels of each class, then ignored ones."""
    shown: dict[str, NDArray[np.int64]]
    """By pool with masks, (C + 1,): images that show each class, then images with ignored pixels."""
    method: tuple[str, ...] = ()
    """What the method's options mean for the data, in lines."""

    def text(self) -> str:
        """The whole report as plain lines."""
        sizes = [f"{count} of {height}x{width}" for (height, width), count in self.sizes[:3]]
        more = f", {len(self.sizes) - 3} other sizes" if len(self.sizes) > 3 else ""
        lines = [
            self.family,
            "images: " + ", ".join(f"{count} {name}" for name, count in self.images.items()),
            f"sizes (H x W in px): {', '.join(sizes)}{more}",
            "classes, by share of the pixels and images that show them:",
            *self._table(),
            *self.method,
            *(f"warning: {sentence}" for sentence in self.warnings),
            *(f"problem: {sentence}" for sentence in self.problems),
        ]
        return "\n".join(lines)

    def _table(self) -> Iterable[str]:
        """Per class and pool: the share of the pixels, and the images that show it."""
        width = max(len(name) for name in (*self.classes, "ignored"))
        yield " " * width + "".join(f"{name:>18}" for name in self.pixels)
        for i, name in enumerate((*self.classes, "ignored")):
            cells = (
                f"{100 * self.pixels[pool][i] / max(1, self.pixels[pool].sum()):9.2f} % {self.shown[pool][i]:6}"
                for pool in self.pixels
            )
            yield f"{name:<{width}}" + "".join(cells)


def check(data: Data) -> Report:
    """Decodes every labelled, val and test image with its mask, and up to MOST_UNLABELLED unlabelled images.

    Costs about 15 ms an image with its mask of 480x360 px and CPU core. Wrong files are reported, never raised.
    """
    pools = {name: rows for name, rows in _scored(data).items() if len(rows)}
    step = -(-len(data.unlabelled) // MOST_UNLABELLED) or 1
    unlabelled = data.unlabelled[::step]
    looks = {name: _looks(rows, data) for name, rows in pools.items()}
    looks_unlabelled = _looks(unlabelled, data)

    problems, warnings = [], list(data.notes)
    for name, found in looks.items():
        problems += _most_errors([str(look) for look in found if isinstance(look, InputError)], name)
    if step > 1:
        warnings.append(f"Of the unlabelled images one in {step} was opened here: {len(unlabelled)}.")
    warnings += _unreadable(unlabelled, looks_unlabelled)
    good = {name: _Good(pools[name], found, len(data.classes)) for name, found in looks.items()}
    problems += _identical({name: (pool.rows, pool.digests) for name, pool in good.items()})
    problems += _train_ids_for_raw_ones(data, good)
    problems += _class_ids_for_raw_ones(data, good)
    warnings += _raw_ids_for_train_ids(data)
    warnings += _transductive(_Good(unlabelled, looks_unlabelled, len(data.classes)), good)
    warnings += _alike(good)
    warnings += _classes(data, good)
    warnings += _sequences(data)
    every = [*looks_unlabelled, *(look for found in looks.values() for look in found)]
    sizes = Counter(look.size for look in every if isinstance(look, _Look))
    return Report(
        problems=tuple(problems),
        warnings=tuple(warnings),
        family=data.family,
        classes=data.classes,
        images={
            "labelled": len(data.labelled),
            "unlabelled": len(data.unlabelled),
            "val": len(data.val),
            "test": len(data.test),
        },
        sizes=tuple(sizes.most_common()),
        pixels={name: pool.counts.sum(0) for name, pool in good.items()},
        shown={name: (pool.counts > 0).sum(0) for name, pool in good.items()},
    )


def leaks(data: Data) -> tuple[str, ...]:
    """The problems of identical decoded images in two of labelled, val and test, one sentence each.

    Decodes each image and its mask once: hashes are kept in `cache_dir()` by path, size and time of change.
    Raises InputError where one cannot be used.
    """
    place = cache_dir() / "pixels" / f"{_hash(data.labelled.root.encode())}.json"
    known = _remembered(place)
    pools = {name: (rows, [_key(row, data) for row in rows]) for name, rows in _scored(data).items()}
    new = {key: row for rows, keys in pools.values() for key, row in zip(keys, rows, strict=True) if key not in known}
    if new:

        def digest(row: Row) -> str:
            return _digest(open_pair(row, data.config.channels, data.code, None, False)[0])

        with ThreadPoolExecutor(_OPENED_AT_ONCE) as threads:
            known |= dict(zip(new, threads.map(digest, new.values()), strict=True))
        _remember(place, known)
    return tuple(_identical({name: (rows, [known[key] for key in keys]) for name, (rows, keys) in pools.items()}))


def class_pixels(data: Data) -> Tensor:
    """(C,) float64, the pixels of each class in the labelled masks, at the masks' own sizes."""

    def count(row: Row) -> NDArray[np.int64]:
        return np.bincount(open_mask(row, data.code, None, False).ravel(), minlength=IGNORE + 1)[: len(data.classes)]

    with ThreadPoolExecutor(_OPENED_AT_ONCE) as threads:
        return torch.from_numpy(np.sum(list(threads.map(count, data.labelled)), axis=0)).double()


def contact_sheet(
    images: Tensor, masks: Tensor | None, palette: Sequence[Colour], path: Path, classes: Sequence[str] = ()
) -> None:
    """Draws a batch into a PNG: each image, and below it the same under its mask's colours.

    Args:
        images: (B, N, H, W) uint8, uint16 (stretched to the image's own range), or float in 0..1.
        masks: (B, H, W) class ids or IGNORE, which is drawn pale; none: images alone.
        palette: colour of each class.
        path: the file to write, whole or not at all.
        classes: names for a legend; none: no legend.
    """
    shown = np.stack([_visible(image) for image in images])
    cells = shown if masks is None else np.concatenate([shown, _painted(shown, masks.numpy(), palette)], axis=1)
    columns = min(len(cells), max(1, 1600 // cells.shape[2]))
    blank = np.full_like(cells[:1], 255)
    cells = np.concatenate([cells, np.repeat(blank, -len(cells) % columns, axis=0)])
    cells = np.pad(cells, ((0, 0), (0, 4), (0, 4), (0, 0)), constant_values=255)
    rows = cells.reshape(-1, columns, *cells.shape[1:]).swapaxes(1, 2)
    sheet = Image.fromarray(rows.reshape(rows.shape[0] * rows.shape[1], -1, 3))
    with replacing(path) as part:
        _with_legend(sheet, classes, palette).save(part, format="PNG")


# ---------------------------------------------------------------------------------------------------------- one image


@dataclass(frozen=True)
class _Look:
    """What is kept of an image and its mask. counts (C + 1,): pixels of each class and ignored ones."""

    size: tuple[int, int]
    digest: str
    gradient: NDArray[np.float32]
    counts: NDArray[np.int64]


class _Good:
    """The rows of a pool that could be read, and their looks as columns."""

    def __init__(self, rows: Rows, looks: Sequence[_Look | InputError], classes: int) -> None:
        readable = [look for look in looks if isinstance(look, _Look)]
        self.rows = rows[np.array([isinstance(look, _Look) for look in looks], dtype=bool)]
        self.digests = [look.digest for look in readable]
        self.gradients = np.array([look.gradient for look in readable])
        self.counts = np.array([look.counts for look in readable], dtype=np.int64).reshape(-1, classes + 1)


def _scored(data: Data) -> dict[str, Rows]:
    return {"labelled": data.labelled, "val": data.val, "test": data.test}


def _looks(rows: Rows, data: Data) -> list[_Look | InputError]:
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as threads:
        return list(threads.map(lambda row: _look(row, data), rows))


def _look(row: Row, data: Data) -> _Look | InputError:
    try:
        if row.mask is None:
            image, mask = open_image(row, data.config.channels, None, False), np.zeros(0, np.uint8)
        else:
            image, mask = open_pair(row, data.config.channels, data.code, None, False)
    except InputError as error:
        return error
    counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)
    counts = np.append(counts[: len(data.classes)], counts[IGNORE])
    return _Look((image.shape[0], image.shape[1]), _digest(image), _gradient(image), counts)


def _hash(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _digest(image: NDArray[Any]) -> str:
    return f"{image.shape} {_hash(image.tobytes())}"


def _gradient(image: NDArray[Any]) -> NDArray[np.float32]:
    """Differences of neighbours in the image's 16 x 16 block means, with length 1; zeros where the image is flat.

    A difference hash whose bits are left as numbers: their signs alone do not tell dark images apart.
    """
    height, width = image.shape[:2]
    sparse = image[:: max(1, height // 128), :: max(1, width // 128)].astype(np.float32).mean(2)
    if image.dtype == np.uint16:
        sparse /= 257
    blocks = F.adaptive_avg_pool2d(torch.from_numpy(sparse)[None], _GRID)[0].numpy()
    steps = np.concatenate([np.diff(blocks, axis=0).ravel(), np.diff(blocks, axis=1).ravel()])
    length = float(np.linalg.norm(steps))
    flat = length < _FLAT * len(steps) ** 0.5
    return np.asarray(steps * (0 if flat else 1 / length), dtype=np.float32)


# ------------------------------------------------------------------------------------------------------------ findings


def _most_errors(errors: list[str], pool: str, most: int = 5) -> list[str]:
    left = len(errors) - most
    return errors[:most] + [f"Of the {pool} images, {left} more cannot be used."] * (left > 0)


def _unreadable(rows: Rows, looks: Sequence[_Look | InputError]) -> list[str]:
    bad = [rows[i].name for i, look in enumerate(looks) if isinstance(look, InputError)]
    return [f"Unlabelled images that cannot be read are passed over ({some(bad)})."] if bad else []


def _identical(pools: Mapping[str, tuple[Rows, Sequence[str]]]) -> list[str]:
    found = []
    for a, b in combinations(pools, 2):
        (rows_a, digests_a), (rows_b, digests_b) = pools[a], pools[b]
        where = {digest: i for i, digest in enumerate(digests_a)}
        pairs = [f"{rows_a[where[d]].name} = {rows_b[i].name}" for i, d in enumerate(digests_b) if d in where]
        if pairs:
            found.append(f"The {a} and {b} images share some ({some(pairs)}): remove them from one of the two.")
    return found


def _transductive(unlabelled: _Good, pools: Mapping[str, _Good]) -> list[str]:
    found = []
    seen = set(unlabelled.digests)
    for name in pools.keys() & {"val", "test"}:
        both = [pools[name].rows[i].name for i, digest in enumerate(pools[name].digests) if digest in seen]
        if both:
            found.append(f"The unlabelled images hold some of the {name} images too ({some(both)}).")
    return sorted(found)


def _alike(pools: Mapping[str, _Good]) -> list[str]:
    """Near-duplicates across pools; identical images are a problem of their own and left out."""
    found = []
    for a, b in combinations((name for name, pool in pools.items() if len(pool.rows)), 2):
        first, second = pools[a], pools[b]
        pairs = []
        for i, (gradient, digest) in enumerate(zip(second.gradients, second.digests, strict=True)):
            alike = first.gradients @ gradient
            best = int(alike.argmax())
            if alike[best] > ALIKE and first.digests[best] != digest:
                pairs.append(f"{first.rows[best].name} ~ {second.rows[i].name}")
        if pairs:
            found.append(f"Some {a} and {b} images look almost the same ({some(pairs)}): scores may be too high.")
    return found


def _classes(data: Data, pools: Mapping[str, _Good]) -> list[str]:
    found = []
    consequence = {
        "labelled": "cannot be learned",
        "val": "is left out of val's mean",
        "test": "is left out of test's mean",
    }
    for name, pool in pools.items():
        if not len(pool.rows):
            continue
        shown = pool.counts[:, :-1].any(0)
        found += [
            f"No {name} image shows the class {c}: it {consequence[name]}." for c in np.array(data.classes)[~shown]
        ]
        empty = [pool.rows[int(i)].name for i in np.flatnonzero(~pool.counts[:, :-1].any(1))]
        if empty:
            found.append(f"Some {name} masks have no labelled pixel ({some(empty)}).")
    return found


def _train_ids_for_raw_ones(data: Data, pools: Mapping[str, _Good]) -> list[str]:
    """Masks of Cityscapes' train ids, read as raw ones, show no class but the six whose raw ids are below 19."""
    looked = [pool for pool in pools.values() if len(pool.rows)]
    if not looked or not CITYSCAPES_IDS.items() <= dict(data.code.values or ()).items():
        return []
    above = [label for raw, label in CITYSCAPES_IDS.items() if raw >= len(CITYSCAPES_IDS)]
    if np.sum([pool.counts.sum(0) for pool in looked], axis=0)[above].any():
        return []
    advice = "remove data.values"
    if data.config.format == "cityscapes":
        advice = "name them *_gtFine_labelTrainIds.png"
    elif data.config.format == "kitti" and data.config.values is None:
        advice = "set data.values: {0: 0, 1: 1, ..., 18: 18}"
    names = some(row.mask.name for pool in looked for row in pool.rows if row.mask)
    return [f"No mask has a raw Cityscapes id above 18, so they seem to hold train ids already ({names}): {advice}."]


def _class_ids_for_raw_ones(data: Data, pools: Mapping[str, _Good]) -> list[str]:
    """ADE20K's masks end at 150; those of 0 to 149 and 255, which are published too, would be off by one class."""
    if data.config.format != "ade20k" or data.config.values is not None:
        return []
    paths = [row.mask for pool in pools.values() for row in pool.rows[:_LOOKED_AT] if row.mask]
    wrong = [path.name for path in paths if IGNORE in mask_values(path)]
    advice = "so they seem to hold class ids already: set data.values: {0: 0, 1: 1, ..., 149: 149}"
    return [f"Masks ({some(wrong)}) have the value 255, which ADE20K's own have not, {advice}."] if wrong else []


def _raw_ids_for_train_ids(data: Data) -> list[str]:
    """Ignoring what is above 18 silences the reader's error about raw ids, and leaves the mistake."""
    values = dict(data.code.values or ())
    same = values.items() >= {i: i for i in range(len(CITYSCAPES_IDS))}.items()
    ignored = [raw for raw in CITYSCAPES_IDS if raw >= len(CITYSCAPES_IDS) and raw in values and values[raw] == IGNORE]
    if len(data.classes) != len(CITYSCAPES_IDS) or not same or len(ignored) < len(CITYSCAPES_IDS) // 3:
        return []
    found = f"The values {some(ignored)} are ignored, and 0 to 18 are taken for the 19 classes"
    advice = "set data.format: cityscapes, or give each value its class by data.values"
    return [f"{found}: if the masks hold raw Cityscapes ids, where 7 is road, {advice}."]


def _sequences(data: Data) -> list[str]:
    """Pools that share name prefixes, where the names look like frames of videos."""
    if data.config.format in ("voc", "cityscapes"):  # divided by those who made them; VOC's names begin with a year
        return []
    inside = {"labelled": "train", "val": "val", "test": "test"}
    names = {
        pool: [name.removeprefix(f"images/{inside[pool]}/") for name in rows.names.tolist()]
        for pool, rows in _scored(data).items()
    }
    if not looks_like_sequences([name for pool in names.values() for name in pool], data.config.folds or 3):
        return []
    known = set(prefixes(names["labelled"]))
    drawn = data.config.split is not None or data.config.folds is not None
    found = []
    for pool in ("val", "test"):
        shared = [name for name, prefix in zip(names[pool], prefixes(names[pool]), strict=True) if prefix in known]
        if shared:
            what = (
                f"Some {pool} images have the name prefix of labelled ones, like frames of one video ({some(shared)})"
            )
            found.append(f"{what}: scores may be too high{'; set data.group: true' * drawn}.")
    return found


# ------------------------------------------------------------------------------------------------------ kept hashes


def _key(row: Row, data: Data) -> str:
    """Names the pair as it is now, and what its reading depends on."""
    assert row.mask is not None
    assert isinstance(row.image, Path), "images with masks are files of their own"
    parts = [repr(data.code), str(data.config.channels)]
    for path in (row.image, row.mask):
        try:
            stat = mask_file(path).stat()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): restore it.") from None
        parts += [str(path), str(stat.st_size), str(stat.st_mtime_ns)]
    return _hash("\n".join(parts).encode())


def _remembered(place: Path) -> dict[str, str]:
    try:
        return dict(json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # not there yet, or damaged: hashed anew


def _remember(place: Path, known: Mapping[str, str]) -> None:
    with suppress(InputError):  # a full or read-only disk costs time, not the run
        write_json(place, dict(known))


# ------------------------------------------------------------------------------------------------------------ drawing


def _visible(image: Tensor) -> NDArray[np.uint8]:
    """(N, H, W) to (H, W, 3): the first three channels, or the first as grey."""
    pixels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    if pixels.dtype == torch.uint8:
        return pixels.permute(1, 2, 0).numpy()
    values = pixels.float()
    if image.dtype == torch.uint16:
        low, high = values.min(), values.max()
        values = (values - low) / (high - low).clamp(min=1)
    return (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _painted(images: NDArray[np.uint8], masks: NDArray[Any], palette: Sequence[Colour]) -> NDArray[np.uint8]:
    colours = np.zeros((IGNORE + 1, 3), np.uint16)
    colours[: len(palette)] = palette
    colours[IGNORE] = _IGNORED_COLOUR
    mixed: NDArray[np.uint8] = ((images + 2 * colours[masks]) // 3).astype(np.uint8)
    return mixed


def _with_legend(sheet: Image.Image, classes: Sequence[str], palette: Sequence[Colour]) -> Image.Image:
    """The sheet above one line a class: a square of its colour, and its name."""
    if not classes:
        return sheet
    font, line = ImageFont.load_default(14), 20
    columns = max(1, sheet.width // 160)
    rows = -(-(len(classes) + 1) // columns)
    whole = Image.new("RGB", (sheet.width, sheet.height + rows * line), "white")
    whole.paste(sheet)
    draw = ImageDraw.Draw(whole)
    entries = zip((*classes, "(ignored)"), (*palette, _IGNORED_COLOUR), strict=True)
    for i, (name, colour) in enumerate(entries):
        x, y = i % columns * 160, sheet.height + i // columns * line
        draw.rectangle((x + 2, y + 3, x + 15, y + 16), fill=colour, outline="black")
        draw.text((x + 21, y + 2), name, fill="black", font=font)
    return whole

"""From a folder or a CSV on the disk to the pools of one run: labelled, unlabelled, val and test.

Nothing is decoded here, except masks where the labelled images are drawn class-aware. The unlabelled pool's mask column
is empty, also where masks exist, so that no later code can open one.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, field_validator, model_validator

from semiseg.data.families import LISTS, digest
from semiseg.data.formats import IMAGE_SUFFIXES, Colour, MaskCode, read_mask
from semiseg.data.layouts import (
    POOLS,
    RGB,
    Format,
    Found,
    Pool,
    bare,
    default_pool,
    find,
    find_images,
    stem,
)
from semiseg.data.rows import Rows
from semiseg.files import read_json, read_text
from semiseg.types import IGNORE, InputError, Options, Side, some

Indices = NDArray[np.intp]


class DataConfig(Options):
    """Where the data is, how its masks are coded, and how it is divided."""

    root: str
    """Folder (or CSV file): absolute, beside the recipe, or under $SEMISEG_DATA."""
    format: Format = "folder"
    """folder: images/** and masks/**, paired by name. splits (camvid is the same): images/train/**, masks/train/**, and
    val, test, unlabelled alike. csv: `root` is a file with the columns image, mask, split, and paths relative to it.
    voc: Pascal VOC 2012 as it is unpacked, SBD's masks in SegmentationClassAug. cityscapes: leftImg8bit and gtFine.
    kitti: data_semantics, its test images unlabelled. mapillary, mapillary_v2: Mapillary Vistas with the labels 1.2 or
    2.0, its test images unlabelled. ade20k: ADEChallengeData2016, 150 classes. coco: train2017, val2017, and masks of
    80 things and background, in a folder masks or drawn from the instances in annotations; coco_panoptic: the 133
    classes of its panoptic segments; coco_stuff: 171 of stuffthingmaps, or 92 of the pixelmaps of stuff."""
    pool: Pool | None = None
    """The training images. voc: train (1,464) or train_aug (10,582 with SBD; the default where SBD's masks are there).
    cityscapes: train (2,975), or train_extra, which adds the 20,000 of that folder to the unlabelled ones."""
    classes: tuple[str, ...] | None = None
    """Names in the order of the ids; none: classes.json in the data folder, else the layout's own where it has some."""
    values: dict[int, int] | None = None
    """Raw mask value -> class id, or 255 to ignore; none: the values are the ids, or where those of the layout are
    others (cityscapes, kitti, mapillary, ade20k, coco) become those of the classes that are scored. Where COCO's masks
    are drawn from a JSON file, they hold its category ids."""
    ignore: tuple[int, ...] = ()
    """Raw mask values of pixels that have no label, besides 255."""
    channels: Side = 3
    """Channels of an image as the network sees it."""
    labelled: int | str | None = None
    """A count, a share such as 1/8, a file of ids; none or all: every training image that has a mask."""
    unlabelled: Literal["rest", "all", "none"] = "rest"
    """rest: the training images that are not labelled; all: every training image. Masks of these are not opened
    (but by `balanced`)."""
    extra: tuple[str, ...] = ()
    """Folders of further unlabelled images, of other data too, each found like `root`. Every image file below counts:
    name mapillary/training/images, not mapillary. Without image files a folder's tar archives (as of webdataset) and
    Parquet files (as of Hugging Face datasets) count; such a file may be named itself. One place needs no list."""
    split: tuple[float, float, float] | None = None
    """Shares of train, val and test among the images with a mask, where the data has no split of its own."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Parts of the images with a mask for cross-validation, where the data has no split of its own; there is no val."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """The part that is the test split; none: each in turn, and in the end a model is trained on all masks."""
    group: bool = False
    """Keep images whose names differ in their last number only (frames of one video) in one split or fold."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of split, folds and the draw of the labelled images."""
    balanced: bool = False
    """Draw the labelled images so that every class is among them if possible; opens all training masks to look."""
    size: Side | tuple[Side, Side] | None = None
    """Images are resized before the crops: (H, W) in px, or the longest side; scores stay at the masks' own size."""
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    """Range of the factor on a training image's size."""
    flip: bool = True
    """Mirror half of the training images."""
    cache: bool = True
    """Keep resized images on the disk ($SEMISEG_CACHE, else ~/.cache/semiseg)."""

    @field_validator("labelled", mode="before")
    @classmethod
    def _share_as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, float) else value

    @field_validator("extra", mode="before")
    @classmethod
    def _one_folder(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        shares = self.split or (1, 0, 0)
        if min(shares) < 0 or shares[0] == 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                "data.split must be three shares that add up to 1, such as [0.7, 0.1, 0.2], the first above 0"
            )
        if self.split is not None and self.folds is not None:
            raise ValueError("data.split and data.folds exclude each other: remove one")
        if self.group and self.split is None and self.folds is None:
            raise ValueError("data.group needs data.split or data.folds: set one of them, or group to false")
        if self.pool is not None and self.pool not in (POOLS[self.format] if self.format in POOLS else ()):
            known = "; ".join(f"{' or '.join(pools)} with data.format: {name}" for name, pools in POOLS.items())
            raise ValueError(f"data.pool is {self.pool}, but it goes with another data.format ({known}): remove it")
        if self.extra and self.unlabelled == "none":
            raise ValueError("data.extra names unlabelled images, but data.unlabelled is none: remove one of the two")
        if self.folds is not None and self.fold is None and self.labelled not in (None, "all"):
            raise ValueError(
                "data.labelled chooses masks, and data.folds without data.fold scores all of them and delivers what "
                "learned from all: leave data.labelled out, or choose one data.fold"
            )
        if self.fold is not None and self.fold >= (self.folds or 1):
            raise ValueError(f"data.fold is {self.fold}: set data.folds above it, or lower it")
        if isinstance(self.labelled, int) and self.labelled < 1:
            raise ValueError("data.labelled must be at least 1")
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"data.scale must be [smallest, largest], not {list(self.scale)}")
        return self


@dataclass(frozen=True)
class Data:
    """The pools of one run: `labelled`, `val` and `test` have masks in every row, `unlabelled` in none.

    All but `labelled` may be empty.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    code: MaskCode
    config: DataConfig
    labelled: Rows
    unlabelled: Rows
    val: Rows
    test: Rows
    family: str
    """How the data is divided, in words: scores compare within one family only."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, one sentence each."""


def load_data(config: DataConfig, base: Path | None = None) -> Data:
    """Finds the images, pairs them with masks by name, and draws the pools.

    Args:
        config: what to read and how to divide it.
        base: folder beside which a relative `root` is looked for first (the recipe's); none: the working directory.

    Raises:
        InputError: nothing is there, nothing is labelled, or an option asks for what the data does not have.
    """
    config = located(config, base)
    root = Path(config.root)
    folder, name = (root.parent, root.stem) if config.format == "csv" else (root, root.name)
    found = find(config.format, root, config.pool)
    classes, palette, code = read_classes(config, folder, found)

    found, divided = _divide(config, found)
    for place in config.extra:
        found, divided = _with_extra(found, Path(place), divided)
    if not len(found.train):
        raise InputError(f"{root} has no training image: add some{_below(found.prefix)}.")
    masked = np.flatnonzero(found.train.masked)
    if not len(masked):
        raise InputError(f"{root} has no labelled image: add masks{_below(found.prefix.replace('images', 'masks'))}.")
    chosen, drawn = _choose(config, found, masked, code)
    unlabelled = _unlabelled(config, found, chosen)
    return Data(
        name=name,
        classes=classes,
        palette=palette,
        code=code,
        config=config,
        labelled=found.train[chosen],
        unlabelled=unlabelled,
        val=found.val,
        test=found.test,
        family=f"{name} {divided}, {drawn}",
        notes=tuple(found.notes),
    )


MASK_FOLDERS = ("masks", "labels", "annotations", "gtFine", "gtCoarse", "SegmentationClass", "SegmentationClassAug")
"""Where data sets keep masks."""


def _with_extra(found: Found, place: Path, divided: str) -> tuple[Found, str]:
    """The same with the images of a folder or file of other data as unlabelled ones, and how it is divided in words.

    Raises:
        InputError: there is no image, or it is a whole data set, whose masks would be taken for images.
    """
    masks = [
        f for f in map(place.joinpath, MASK_FOLDERS) if any(p.suffix.lower() in IMAGE_SUFFIXES for p in f.rglob("*"))
    ]
    if masks:
        raise InputError(
            f"data.extra: {place} has masks in {masks[0].name}, and all its files would be taken: name those of images."
        )
    rows = find_images(place, found.notes)
    found.notes.append(f"The {len(rows)} images of {place} are among the unlabelled ones (data.extra).")
    return replace(found, extra=found.extra + rows), f"{divided} with {len(rows)} further images"


def _below(prefix: str) -> str:
    return f" below {prefix} (an image and its mask have the same name)" if prefix else " to the CSV"


def located(config: DataConfig, base: Path | None) -> DataConfig:
    """The same options with absolute paths, so that they mean the same anywhere.

    `root` and `extra` are looked for beside `base` (none: the working directory) and in $SEMISEG_DATA; an id file in
    the data too.
    A pool that is left open is named, so that files added later do not change a run.

    Raises:
        InputError: a path is nowhere.
    """
    places = [base or Path.cwd(), *_shared_data()]
    root = _find(config.root, places, "data.root")
    labelled = config.labelled
    if isinstance(labelled, str) and labelled != "all" and _share(labelled) is None:
        folder = root.parent if config.format == "csv" else root
        labelled = str(_find(labelled, [places[0], folder, *places[1:]], "data.labelled"))
    extra = tuple(str(_find(place, places, "data.extra")) for place in config.extra)
    for number, place in enumerate(extra):
        for other in (str(root), *extra[:number]):
            if Path(other).is_relative_to(place) or (other in extra and Path(place).is_relative_to(other)):
                raise InputError(
                    f"data.extra: {place} and {other} share images: name folders of other data, each once."
                )
    pool = config.pool or default_pool(config.format, root)
    return config.model_copy(update={"root": str(root), "labelled": labelled, "extra": extra, "pool": pool})


def _shared_data() -> list[Path]:
    return [Path(os.environ["SEMISEG_DATA"])] if os.environ.get("SEMISEG_DATA") else []


def _find(text: str, places: Iterable[Path], option: str) -> Path:
    # An absolute path swallows the place it is joined to.
    candidates = dict.fromkeys(os.path.abspath(place / Path(text).expanduser()) for place in places)
    for candidate in candidates:
        if os.path.exists(candidate):
            return Path(candidate)
    raise InputError(f"{option} {text} is not there (looked for {' and '.join(candidates)}): correct the path.")


# ------------------------------------------------------------------------------------------------------------- classes


def read_classes(
    config: DataConfig, folder: Path, found: Found | None = None
) -> tuple[tuple[str, ...], tuple[Colour, ...], MaskCode]:
    """Names, colours to draw with, and the code of the masks, from `data.classes` or else the folder's classes.json.

    A layout that has classes of its own needs neither (`found`). Its raw mask values hold where the classes are as
    many as its own; data.values comes first.

    classes.json is {"classes": [names, or {"name": ..., "color": [r, g, b]}], "palette": [[r, g, b], ...],
    "ignore_index": 255, "ignore_colors": [[r, g, b], ...]}, of which only "classes" is needed; further keys are passed
    over. Colours of ignored pixels count in RGB masks.

    Raises:
        InputError: neither is there, or they contradict themselves.
    """
    path, values = folder / "classes.json", found.values if found else None
    drawn: tuple[Colour, ...] = ()
    if config.classes is not None:
        file, source = _ClassFile(classes=config.classes), "data.classes"
    elif path.is_file():
        file, source = read_json(path, _ClassFile), str(path)
    elif found and found.classes:
        known, drawn = found.classes
        file, source = _ClassFile(classes=known), f"data.format {config.format}"
    else:
        raise InputError(f'{path} is missing: write {{"classes": ["background", ...]}} there, or set data.classes.')
    names, colours = file.names(), file.colours()
    if not 2 <= len(names) <= IGNORE:
        raise InputError(f"{source} lists {len(names)} classes: list 2 to {IGNORE}, the background counted.")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise InputError(f"{source} lists the class {twice} more than once: give each class its own name.")
    if colours and (len(colours) != len(names) or len(set(colours)) != len(names)):
        raise InputError(f"{path} must give each of its {len(names)} classes a colour of its own, or none a colour.")
    ignored = file.ignore_index
    if config.values is None and 0 <= ignored < len(names):
        raise InputError(f"{path} ignores {ignored}, which is also the class {names[ignored]}: set data.values.")
    if values is not None and len(set(values.values()) - {IGNORE}) != len(names):
        values = None
    code = MaskCode(len(names), colours or None, _values(config, len(names), ignored, values), file.ignore_colors)
    return names, colours or drawn or default_palette(len(names)), code


class _Class(BaseModel):
    name: str
    color: RGB | None = None


class _ClassFile(BaseModel):
    classes: tuple[str | _Class, ...]
    palette: tuple[RGB, ...] = ()
    ignore_index: int = IGNORE
    ignore_colors: tuple[RGB, ...] = ()

    def names(self) -> tuple[str, ...]:
        return tuple(entry if isinstance(entry, str) else entry.name for entry in self.classes)

    def colours(self) -> tuple[Colour, ...]:
        """The palette, else the colours of those classes that have one."""
        own = (entry.color for entry in self.classes if isinstance(entry, _Class))
        return self.palette or tuple(colour for colour in own if colour is not None)


def _values(
    config: DataConfig, classes: int, ignored: int, own: Mapping[int, int] | None
) -> tuple[tuple[int, int], ...] | None:
    """Raw value -> id pairs, or none where the values are the ids and 255 alone is ignored."""
    given = own if config.values is None else config.values
    if given is None and not config.ignore and ignored == IGNORE:
        return None
    ids = {i: i for i in range(classes)} if given is None else dict(given)
    raw = ({ignored} if ignored >= 0 else set()) - ids.keys() | set(config.ignore)  # -1 is no value a file can hold
    return tuple(sorted((ids | dict.fromkeys(raw, IGNORE)).items()))


def default_palette(classes: int) -> tuple[Colour, ...]:
    """Pascal VOC's colours: the bits of the id spread over red, green and blue; class 0 is black."""
    ids = np.arange(classes)
    colours = np.zeros((classes, 3), dtype=np.int64)
    for bit in range(8):
        colours |= (ids[:, None] >> (3 * bit + np.arange(3)) & 1) << (7 - bit)
    return tuple((int(r), int(g), int(b)) for r, g, b in colours)


# ------------------------------------------------------------------------------------------------------------ dividing


def _divide(config: DataConfig, found: Found) -> tuple[Found, str]:
    """The same with images held out as the options ask, and how in words."""
    option = "split" if config.split is not None else "folds" if config.folds is not None else None
    if found.own and option:
        raise InputError(
            f"data.{option} is set, but the data is divided into {'/'.join(found.own)}: remove the option."
        )
    if option:
        return _draw_division(config, found)
    if not len(found.val) and not len(found.test):
        way = "put some into val or test" if found.own else "set data.split or data.folds"
        found.notes.append(f"No image is held out, so that no score can be given: {way}.")
    return found, f"official {'/'.join(found.own)}" if found.own else "undivided"


def _draw_division(config: DataConfig, found: Found) -> tuple[Found, str]:
    rows, masked = found.train, found.train.masked
    # The others have a part in this where a whole group stays together. There may be a million of them.
    names = [stem(path) for path in (rows if config.group else rows[masked]).image]
    groups = np.array(prefixes(names) if config.group else names, dtype=np.dtypes.StringDType())
    units_of = groups[masked] if config.group else groups
    if config.folds is not None:
        units = len(np.unique(units_of))
        if units < config.folds:
            what = f"group{'s' * (units != 1)} of names" if config.group else f"image{'s' * (units != 1)} with a mask"
            raise InputError(
                f"data.folds is {config.folds}, but {'there is 1' if units == 1 else f'there are {units}'} {what}: "
                + ("take data.split." if units < 2 else "ask for fewer folds.")
            )
        if config.fold is None:
            return found, f"in {config.folds} folds"
        part = assign(units_of, [1 / config.folds] * config.folds, config.split_seed)
        part = np.where(part == config.fold, _TEST, 0)
        words = f"fold {config.fold} of {config.folds}"
    else:
        assert config.split is not None
        part = assign(units_of, config.split, config.split_seed)
        for name, share, count in zip(
            ("train", "val", "test"), config.split, np.bincount(part, minlength=3), strict=True
        ):
            if share > 0 and count == 0:
                raise InputError(
                    f"data.split leaves {name} empty for want of {'groups' if config.group else 'images'}: change it."
                )
        words = f"split {'/'.join(f'{share:g}' for share in config.split)}"

    where = np.zeros(len(rows), dtype=np.intp)
    where[masked] = part
    outside = ~masked & np.isin(groups, groups[where > 0]) if config.group else np.zeros(len(rows), dtype=np.bool_)
    if outside.any():
        where[outside] = -1
        found.notes.append(f"Unlabelled images of held-out groups are not used ({some(rows[outside].image)}).")
    train, val, test = (rows[where == i] for i in range(3))
    words += f" drawn with seed {config.split_seed}{' by name prefix' * config.group}"
    return replace(found, train=train, val=val, test=test), words


_TEST = 2
"""Number of the test part, after train and val."""


def assign(groups: NDArray[Any], shares: Sequence[float], seed: int) -> Indices:
    """Gives each group to one part, so that the parts come close to their shares of the images.

    Groups are shuffled, then taken largest first, each by the part that lacks the most images.

    Args:
        groups: (n,) the group of each image.
        shares: of the parts; they add up to 1.

    Returns:
        (n,) the part of each image.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng((seed, 1)).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    lacking = np.array(shares) * len(groups)
    part = np.empty(len(sizes), dtype=np.intp)
    for i in order:
        part[i] = np.argmax(lacking)
        lacking[part[i]] -= sizes[i]
    return part[group]


def prefixes(names: Sequence[str]) -> tuple[str, ...]:
    """Names without their last number and the separators before it: frames of one video share theirs.

    `0016E5_00450.jpg` gives `0016E5`, `drive/000012` gives `drive`; a name that ends in a letter is its own prefix.
    """
    return tuple(re.sub(r"[-_./ ]*\d*$", "", stem(name)) for name in names)


def looks_like_sequences(names: Sequence[str], folds: int) -> bool:
    """Whether the prefixes can serve as groups: at least `folds` different ones, and at most half as many as names."""
    return folds <= len(set(prefixes(names))) <= len(names) / 2


# ------------------------------------------------------------------------------------------------------------- drawing


def _choose(config: DataConfig, found: Found, masked: Indices, code: MaskCode) -> tuple[Indices, str]:
    """The labelled rows among the `masked` training rows, in the pool's order, and how they came about in words."""
    wanted, have = config.labelled, len(masked)
    if wanted is None or wanted == "all":
        return masked, f"all {have} labelled"
    if isinstance(wanted, str):
        share = _share(wanted)
        if share is None:
            return _listed(config, found, masked)
        wanted = max(1, int(share * have + Fraction(1, 2)))
    if wanted > have:
        raise InputError(f"data.labelled asks for {wanted} images, but {have} training images have a mask: lower it.")
    order = np.random.default_rng(config.split_seed).permutation(have)
    if config.balanced:
        order = _rare_first(order, _present(found.train[masked], code))
    words = f"{wanted} of {have} labelled drawn{' class-aware' * config.balanced} with seed {config.split_seed}"
    return np.sort(masked[order[:wanted]]), words


def _share(text: str) -> Fraction | None:
    """The share that a text such as 1/8 or 0.125 means; none: it is no share."""
    if not re.fullmatch(r"\d+ */ *\d+|\d*\.\d+", text):
        return None
    above, _, below = text.partition("/")
    if int(below or 1) == 0 or not 0 < Fraction(above.strip()) <= int(below or 1):
        raise InputError(f"data.labelled is {text}: a share is above 0 and at most 1, such as 1/8.")
    return Fraction(above.strip()) / int(below or 1)


def _listed(config: DataConfig, found: Found, masked: Indices) -> tuple[Indices, str]:
    """The rows that an id file names: one id, image path, or image and mask path a line."""
    path = Path(str(config.labelled))
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} names no image: write one id a line, or set data.labelled to a count or a share.")
    names = [stem(name) for name in found.train[masked].image.tolist()]
    by_name = _by_name(names, found.prefix)
    positions = [_look_up(line, by_name) for line in lines]
    missing = [line for line, position in zip(lines, positions, strict=True) if position is None]
    if missing:
        more = ", or set data.pool: train_aug" * (config.format == "voc" and config.pool == "train")
        more += ", as may be because they are held out (data.folds, data.split)" * bool(config.folds or config.split)
        raise InputError(
            f"{path}: {len(missing)} of its {len(lines)} lines name{'s' * (len(missing) == 1)} no training image with "
            f"a mask ({some(missing)}): remove them{more}."
        )
    if _AMBIGUOUS in positions:
        line = lines[positions.index(_AMBIGUOUS)]
        raise InputError(f"{path} names {line}, as several training images are called: write their paths.")
    chosen = np.unique(np.array(positions, dtype=np.intp))
    ids = [bare(name) for name in names]
    ids = ids if len(set(ids)) == len(ids) else names
    key = digest(ids[position] for position in chosen)
    source = f", {LISTS[key]}" if key in LISTS else f" listed in {path.name}"
    return masked[chosen], f"{len(chosen)} of {len(masked)} labelled{source} (sha256 {key})"


_AMBIGUOUS = -1


def _by_name(names: Sequence[str], prefix: str) -> dict[str, int]:
    """Positions by id, by path below `prefix` and by whole path, where later ones win."""
    last: dict[str, int] = {}
    for position, name in enumerate(names):
        key = bare(name)
        last[key] = _AMBIGUOUS if key in last else position
    below = {name.removeprefix(prefix): position for position, name in enumerate(names)}
    return last | below | {name: position for position, name in enumerate(names)}


def _look_up(line: str, by_name: dict[str, int]) -> int | None:
    """The position that a line of an id file means: the whole line, as names may hold spaces, or its first word."""
    first = stem(line.split(maxsplit=1)[0])
    keys = (stem(line), first, bare(first))
    return next((by_name[key] for key in keys if key in by_name), None)


def _present(rows: Rows, code: MaskCode) -> NDArray[np.bool_]:
    """(n, classes) whether each row's mask shows each class."""

    def classes(path: Path) -> NDArray[np.bool_]:
        return np.bincount(read_mask(path, code).ravel(), minlength=IGNORE + 1)[: code.classes] > 0

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(classes, [Path(rows.root, mask) for mask in rows.mask.tolist()])))


def _rare_first(order: Indices, present: NDArray[np.bool_]) -> Indices:
    """The order, with those moved to the front that show a class, rarest first, which none before shows."""
    images = present.sum(0)
    front: list[int] = []
    for c in np.argsort(images, kind="stable"):
        if images[c] and not present[front, c].any():
            front.append(int(order[np.argmax(present[order, c])]))
    return np.concatenate([np.array(front, dtype=np.intp), order[~np.isin(order, front)]])


def _unlabelled(config: DataConfig, found: Found, chosen: Indices) -> Rows:
    """The rows of the unlabelled pool, their masks out of reach."""
    if config.unlabelled == "none":
        return found.extra[:0]
    rest = np.setdiff1d(np.arange(len(found.train)), chosen, assume_unique=True)
    nothing_left = len(rest) + len(found.extra) == 0
    if config.unlabelled == "rest" and nothing_left:
        found.notes.append("Every training image is labelled, so that all of them are the unlabelled images too.")
    train = found.train if config.unlabelled == "all" or nothing_left else found.train[rest]
    return (train + found.extra).without_masks()


__all__ = [
    "IMAGE_SUFFIXES",
    "Data",
    "DataConfig",
    "Indices",
    "assign",
    "default_palette",
    "load_data",
    "located",
    "looks_like_sequences",
    "prefixes",
    "read_classes",
    "stem",
]

"""What lies on the disk in each layout that `data.format` names, and what the layouts with a name of their own mean.

Sources: Pascal VOC 2012 (Everingham et al., IJCV 2015), SBD (Hariharan et al., ICCV 2011), Cityscapes (Cordts et al.,
CVPR 2016), KITTI's semantic benchmark (Alhaija et al., IJCV 2018), Mapillary Vistas (Neuhold et al., ICCV 2017),
ADE20K (Zhou et al., CVPR 2017), COCO (Lin et al., ECCV 2014) and COCO-Stuff (Caesar et al., CVPR 2018).
"""

import csv
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.dtypes import StringDType
from pydantic import BaseModel, Field

from semiseg.data.coco import annotations, png_folders
from semiseg.data.formats import IMAGE_SUFFIXES, Colour
from semiseg.data.rows import Rows, Strings
from semiseg.data.shards import COMPRESSED, SHARDS, packed_images
from semiseg.files import read_json, read_text
from semiseg.types import IGNORE, InputError, some

_SPLITS = {name: name for name in ("train", "val", "test", "unlabelled")} | {"unlabeled": "unlabelled"}
"""Names of splits as users write them, and as we do."""

Coco = Literal["coco", "coco_panoptic", "coco_stuff"]
Format = (
    Literal["folder", "splits", "camvid", "csv", "voc", "cityscapes", "kitti", "mapillary", "mapillary_v2", "ade20k"]
    | Coco
)
Pool = Literal["train", "train_aug", "train_extra"]
POOLS: Mapping[str, tuple[Pool, ...]] = {"voc": ("train", "train_aug"), "cityscapes": ("train", "train_extra")}
"""The formats that have several sets of training images."""

_VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_CITYSCAPES: tuple[tuple[str, int, Colour], ...] = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
"""Name, id in *_labelIds.png and colour of the 19 classes that are scored; the place in this list is the train id."""

# Each by the first of its names in ADE20K's list of classes.
_ADE20K = tuple("""
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television, airplane, dirt track, apparel, pole, land, bannister, escalator,
ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool,
stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot,
animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan,
pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
""".replace("\n", " ").strip().split(", "))  # fmt: skip
# COCO's 80 things have categories from 1 to 90, of which ten are not used; COCO-Stuff's 91 are 92 to 182.
_THINGS = tuple("""
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush
""".replace("\n", " ").strip().split(", "))  # fmt: skip
_THING_IDS = tuple(sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
_STUFF = tuple("""
banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile,
cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other,
floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill,
house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other,
plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other,
skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree,
vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops,
window-blind, window-other, wood
""".replace("\n", " ").strip().split(", "))  # fmt: skip
_STUFF_IDS = tuple(range(92, 183))

Classes = tuple[tuple[str, ...], tuple[Colour, ...]]
"""Names, and colours to draw with (none: the default palette, which is VOC's)."""
_NINETEEN: Classes = tuple(name for name, _, _ in _CITYSCAPES), tuple(colour for _, _, colour in _CITYSCAPES)
CLASSES: Mapping[str, Classes] = {
    "voc": (_VOC, ()),
    "cityscapes": _NINETEEN,
    "kitti": _NINETEEN,
    "ade20k": (_ADE20K, ()),
    "coco": (("background", *_THINGS), ()),
    "coco_stuff": ((*_THINGS, *_STUFF), ()),
}
"""Those of the formats whose classes are known without a file."""

CITYSCAPES_IDS = {raw: label for label, (_, raw, _) in enumerate(_CITYSCAPES)}
"""Id in *_labelIds.png -> train id."""
_RAW_IDS = dict.fromkeys(range(34), IGNORE) | CITYSCAPES_IDS
"""The same for all ids that such a mask may hold."""


_Byte = Annotated[int, Field(ge=0, le=255)]
RGB = tuple[_Byte, _Byte, _Byte]
"""A colour in a file."""


@dataclass(frozen=True)
class Found:
    """What is on the disk: `train` with and without masks, and the splits that the data itself has."""

    train: Rows
    extra: Rows
    """Unlabelled images that are outside the training split."""
    val: Rows
    test: Rows
    own: tuple[str, ...]
    """The data's own splits, where it has any."""
    prefix: str
    """What the training images' paths begin with."""
    notes: list[str] = field(default_factory=list)
    values: Mapping[int, int] | None = None
    """Raw mask value -> class id, where the layout itself has raw values."""
    classes: Classes | None = None
    """Where the layout itself has classes; their masks hold ids, so that these colours may repeat."""


def find(layout: Format, root: Path, pool: Pool | None) -> Found:
    """What lies below `root`. `pool` names the training images of a format that has several sets of them.

    Raises:
        InputError: the layout is another one, or files are missing.
    """
    if layout == "voc":
        return _read_voc(root, pool == "train_aug")
    if layout == "cityscapes":
        return _read_cityscapes(root, pool == "train_extra")
    if layout in ("mapillary", "mapillary_v2"):
        return _read_mapillary(root, layout)
    if layout in ("coco", "coco_panoptic", "coco_stuff"):
        return _read_coco(root, layout)
    readers = {
        "folder": _read_folder,
        "splits": _read_splits,
        "camvid": _read_splits,
        "csv": _read_csv,
        "kitti": _read_kitti,
        "ade20k": _read_ade20k,
    }
    return readers[layout](root)


def find_images(place: Path, notes: list[str]) -> Rows:
    """All images below a folder, or of the tar archives and Parquet files below one, or of one of these; no masks.

    Raises:
        InputError: there is none, or two differ in their suffix only.
    """
    if not place.is_dir():
        if place.name.lower().endswith(SHARDS):
            return _packed([str(place)], notes)
        raise InputError(f"data.extra: {place} is {_no_pool(place.name)}.")
    _, loose, shards = _look(place)
    if not len(loose) and not shards:
        zipped = next((name for name in sorted(os.listdir(place)) if name.lower().endswith(COMPRESSED)), None)
        raise InputError(f"data.extra: {place / zipped if zipped else place} is {_no_pool(zipped)}.")
    return Rows.of(place, loose) + _instead(place, loose, shards, notes)


def _instead(folder: Path, loose: Strings, shards: list[str], notes: list[str]) -> Rows:
    """The images of the shards below a folder where there are no `loose` ones, which may well have come from there."""
    if len(loose) and shards:
        notes.append(
            f"{folder} holds image files, so that {some(shards)} is not read: name it in data.extra to add it."
        )
    return _packed([str(folder / path) for path in ([] if len(loose) else shards)], notes)


def _packed(shards: list[str], notes: list[str]) -> Rows:
    """The images of shards. Raises InputError where there is none in any."""
    rows = packed_images(shards, notes)
    if shards and not len(rows):
        raise InputError(f"{some(shards)} holds no image: name other files.")
    return rows


def _no_pool(name: str | None) -> str:
    """What a file or folder is that no images can be read from, and what to do."""
    if name is not None and name.lower().endswith(COMPRESSED):
        return "compressed, so that no image in it can be read by itself: make it a plain .tar"
    if name is not None:
        return "no file with images: name a folder, a .tar or a .parquet"
    return "not a folder with images: name another one"


def default_pool(layout: Format, root: Path) -> Pool | None:
    """The training images where data.pool names none: of voc train_aug where SBD's masks are there, else train."""
    if layout == "voc" and (_voc_folder(root) / _AUGMENTED).is_dir():
        return "train_aug"
    return "train" if layout in POOLS else None


def stem(path: str) -> str:
    """A relative path without its image suffix: what an image and its mask have in common."""
    head, suffix = os.path.splitext(path)
    return head if suffix.lower() in IMAGE_SUFFIXES else path


def bare(path: str) -> str:
    """The id of an image as published lists write it: the last part of its path, without what each file's name has."""
    return stem(path.rpartition("/")[2]).removesuffix(_IMAGE)


def _files(folder: Path) -> dict[str, str]:
    """Relative paths of the image files below a folder by their stems, sorted; hidden ones are left out."""
    stems, paths, _ = _look(folder)
    _check_stems(folder, stems, paths)
    return dict(zip(stems, paths, strict=True))


def _look(folder: Path) -> tuple[Strings, Strings, list[str]]:
    """Stems and relative paths of the image files below a folder, sorted by stem, and the paths of shards there.

    As columns: of a million files, lists of strings would take 400 MB.
    """
    shards: list[str] = []
    paths = np.fromiter(_walk(str(folder), "", shards), StringDType())
    stems = np.fromiter((os.path.splitext(path)[0] for path in paths), StringDType())
    order = np.argsort(stems, kind="stable")
    return stems[order], paths[order], sorted(shards)


def _check_stems(folder: Path, stems: Strings, paths: Strings) -> None:
    """Raises InputError where two sorted stems are the same."""
    twice = np.flatnonzero(stems[1:] == stems[:-1])
    if len(twice):
        first, second = sorted(paths[twice[0] : twice[0] + 2])
        raise InputError(f"{folder} has both {first} and {second}, whose masks would be the same: rename one.")


def _walk(folder: str, inside: str, shards: list[str]) -> Iterator[str]:
    """Relative paths of the image files below a folder; those of shards go into the list. Hidden ones are left out."""
    try:
        entries = os.scandir(os.path.join(folder, inside))
    except OSError:
        return
    with entries:
        for entry in entries:
            path = inside + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(folder, path + "/", shards)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                yield path
            elif entry.name.lower().endswith(SHARDS):
                shards.append(path)


def _pairs(root: Path, places: tuple[str, str], notes: list[str]) -> Rows:
    """The images of the first place, each with the mask of the same stem in the second or none."""
    return _paired(root, places, _look(root / places[0]), notes)


def _paired(root: Path, places: tuple[str, str], seen: tuple[Strings, Strings, list[str]], notes: list[str]) -> Rows:
    (stems, paths, _), masks = seen, _files(root / places[1])
    _check_stems(root / places[0], stems, paths)
    paired = {key: masks[key] for key in stems if key in masks} if masks else {}
    alone = [path for key, path in masks.items() if key not in paired]
    if masks and len(alone) == len(masks):
        image = paths[0] if len(paths) else "none"
        raise InputError(f"{root / places[1]} has no mask named like an image ({alone[0]}, but {image}): rename them.")
    for path in paired.values():
        if path.lower().endswith((".jpg", ".jpeg")):
            raise InputError(f"{root / places[1] / path} is a JPEG, which changes class ids: save masks as PNG.")
    if alone:
        notes.append(f"{places[1]} has masks that belong to no image and are left out ({some(alone)}).")
    column = (f"{places[1]}/{paired[key]}" if key in paired else "" for key in stems)
    return Rows.of(root, (f"{places[0]}/{path}" for path in paths), column)


def _read_folder(root: Path) -> Found:
    _need_folder(root, "name a folder, or set data.format: csv")
    _need_no_other(root)
    _need_folder(root / "images", "put the images there, and masks of the same names into masks")
    if (root / "images/train").is_dir():
        raise InputError(f"{root / 'images'} is divided into train and other splits: set data.format: splits.")
    notes: list[str] = []
    seen = _look(root / "images")
    train, none = _paired(root, ("images", "masks"), seen, notes), Rows.of(root, ())
    paths, shards = seen[1], [path for path in seen[2] if path.startswith("unlabelled/")]
    inside = paths[np.strings.startswith(paths, "unlabelled/")]
    return Found(train, _instead(root / "images", inside, shards, notes), none, none, (), "images/", notes)


def _read_splits(root: Path) -> Found:
    _need_folder(root, "name a folder, or set data.format: csv")
    _need_no_other(root)
    _need_folder(root / "images/train", "put training images there, or set data.format: folder if there is no split")
    notes: list[str] = []
    folders = sorted(entry.name for entry in os.scandir(root / "images") if entry.is_dir())
    unknown = [name for name in folders if name not in _SPLITS and not name.startswith(".")]
    if unknown:
        notes.append(f"images/{unknown[0]} is not read: the splits are called train, val, test and unlabelled.")
    none = Rows.of(root, ())
    parts = {
        name: _pairs(root, (f"images/{name}", f"masks/{name}"), notes) if name in folders else none
        for name in ("train", "val", "test")
    }
    val, test = (_masked(parts[name], f"images/{name}", notes) for name in ("val", "test"))
    alike = [f"images/{name}" for name in folders if name in ("unlabelled", "unlabeled")]
    extra = none
    for place in alike:
        _, loose, shards = _look(root / place)
        extra += Rows.of(root, (f"{place}/{path}" for path in loose))
        extra += _instead(root / place, loose, shards, notes)
    return Found(parts["train"], extra, val, test, _own(val, test), "images/train/", notes)


def _own(val: Rows, test: Rows) -> tuple[str, ...]:
    return ("train", *(name for name, rows in (("val", val), ("test", test)) if len(rows)))


def _masked(rows: Rows, where: str, notes: list[str]) -> Rows:
    """The rows that have a mask; the others cannot be scored."""
    without = rows[~rows.masked]
    if len(without):
        notes.append(f"{where} has images without a mask, which are left out ({some(without.image)}).")
    return rows[rows.masked]


def _read_csv(path: Path) -> Found:
    if not path.is_file():
        raise InputError(f"data.root: {path} is not a file: name the CSV file where data.format is csv.")
    images: dict[str, list[str]] = {name: [] for name in ("", *_SPLITS.values())}
    masks: dict[str, list[str]] = {name: [] for name in images}
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    header = [name.strip() for name in next(reader, [])]
    if "image" not in header or not set(header) <= set(_COLUMNS):
        raise InputError(f"{path} has the columns {header}: they are image, and as needed mask and split.")
    for cells in reader:
        line = dict.fromkeys(_COLUMNS, "") | {name: cell.strip() for name, cell in zip(header, cells, strict=False)}
        image, mask, split = (line[name] for name in _COLUMNS)
        split = _SPLITS[split] if split in _SPLITS else split
        _check_line(f"{path}, line {reader.line_num},", path.parent, image, mask, split)
        images[split].append(image)
        masks[split].append(mask)
    rows = {name: Rows.of(path.parent, images[name], masks[name]) for name in images}
    val, test = rows["val"], rows["test"]
    own = _own(val, test) if len(rows["train"]) + len(val) + len(test) else ()
    return Found(rows[""] + rows["train"], rows["unlabelled"].without_masks(), val, test, own, "")


_COLUMNS = ("image", "mask", "split")


def _check_line(where: str, folder: Path, image: str, mask: str, split: str) -> None:
    if not image:
        raise InputError(f"{where} names no image: fill the column image or remove the line.")
    if split and split not in _SPLITS:
        raise InputError(f"{where} has the split {split}: write train, val, test or unlabelled, or leave it empty.")
    if split in ("val", "test") and not mask:
        raise InputError(f"{where} puts an image without a mask into {split}: name its mask or remove the line.")
    for name in filter(None, (image, mask)):
        if not os.path.isfile(os.path.join(folder, name)):
            raise InputError(f"{where} names {name}, which is not in {folder}: correct the path.")


def _need_folder(path: Path, advice: str) -> None:
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: {advice}.")


_SIGNS = {
    "JPEGImages": "voc",
    "leftImg8bit": "cityscapes",
    "training/image_2": "kitti",
    "data_semantics/training/image_2": "kitti",
    "training/labels": "mapillary",
    "training/v1.2": "mapillary",
    "training/v2.0": "mapillary_v2",
    "ADEChallengeData2016": "ade20k",
    "train2017": "coco",
}
"""Folders by which a layout is known, and the layout."""
_SIGNS_OF_IMAGES = {"images/training": "ade20k", "images/train2017": "coco"}
"""The same of layouts that have a folder images themselves, and no masks."""


def _need_no_other(root: Path) -> None:
    for folder, layout in _SIGNS_OF_IMAGES.items():
        if (root / folder).is_dir() and not (root / "masks").exists():
            raise InputError(f"{root} has {folder}, but no folder masks: set data.format: {layout} in a recipe.")
    for folder, layout in _SIGNS.items():
        if (root / folder).is_dir() and not (root / "images").exists():
            raise InputError(f"{root} has {folder}, but no folder images: set data.format: {layout} in a recipe.")


# ---------------------------------------------------------------------------------------------------------- Pascal VOC

_OFFICIAL, _AUGMENTED, _LISTS = "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"


def _voc_folder(root: Path) -> Path:
    """The folder VOC2012, which users name themselves or by what they unpacked it into."""
    for folder in (root, root / "VOC2012", root / "VOCdevkit/VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise InputError(f"{root} has no folder JPEGImages: let data.root name the folder VOC2012 of Pascal VOC 2012.")


def _read_voc(root: Path, sbd: bool) -> Found:
    folder, notes = _voc_folder(root), list[str]()
    lists, images = folder / _LISTS, _files(folder / "JPEGImages")
    official, augmented = (
        {key: f"{kind}/{path}" for key, path in _files(folder / kind).items()} for kind in (_OFFICIAL, _AUGMENTED)
    )

    def rows(ids: list[str], source: Path, masks: Mapping[str, str]) -> Rows:
        absent = [name for name in ids if name not in images]
        if absent:
            raise InputError(
                f"{folder / 'JPEGImages'} lacks {len(absent)} of the {len(ids)} images that {source} names "
                f"({some(absent)}): put them there, or remove them from the list."
            )
        column = (masks[name] if name in masks else "" for name in ids)
        return Rows.of(folder, (f"JPEGImages/{images[name]}" for name in ids), column)

    held = _ids(lists / "val.txt")
    if sbd:
        if not augmented:
            raise InputError(
                f"data.pool is train_aug, but {folder / _AUGMENTED} has no mask: put SBD's augmented masks there "
                "(a PNG of class ids for each image), or set data.pool: train."
            )
        masks = official | augmented
        known = [lists / name for name in ("train_aug.txt", "trainaug.txt") if (lists / name).is_file()]
        source = known[0] if known else folder / _AUGMENTED
        ids = _ids(source) if known else sorted(masks.keys() - set(held))
        if not known:
            notes.append(
                f"There is no {_LISTS}/train_aug.txt: the training images are the {len(ids)} that have a mask "
                "and are not in val.txt."
            )
    else:
        source, masks = lists / "train.txt", augmented | official
        ids = _ids(source)
        if not augmented:
            notes.append(
                f"The training images are the {len(ids)} of train.txt: SBD's masks, of which {_AUGMENTED} has none, "
                "would make them 10582 (data.pool: train_aug)."
            )
    both = sorted(set(ids) & set(held))
    if both:
        raise InputError(f"{source} names {len(both)} images of val.txt ({some(both)}): remove them there.")
    train = rows(ids, source, masks)
    _need_masks(train, f"{folder / (_AUGMENTED if sbd else _OFFICIAL)}", "ID.png", notes)
    val = _masked(rows(held, lists / "val.txt", augmented | official), "val.txt", notes)
    own = ("train_aug" if sbd else "train", *_own(val, val[:0])[1:])
    return Found(train, val[:0], val, val[:0], own, "JPEGImages/", notes, classes=CLASSES["voc"])


def _ids(path: Path) -> list[str]:
    """The ids of a list, sorted; a line may also be an image's path, and its mask's after that."""
    if not path.is_file():
        raise InputError(f"{path} is not there: put the lists of Pascal VOC 2012 into that folder.")
    return sorted({bare(line.split()[0]) for line in read_text(path).splitlines() if line.strip()})


def _need_masks(train: Rows, where: str, name: str, notes: list[str]) -> None:
    without = train[~train.masked]
    if len(without) == len(train):
        raise InputError(f"{where} has no mask {name} of a training image: put the masks there.")
    if len(without):
        notes.append(f"{len(without)} training images have no mask and are unlabelled ({some(without.image)}).")


# ---------------------------------------------------------------------------------------------------------- Cityscapes

_IMAGE = "_leftImg8bit"


def _read_cityscapes(root: Path, further: bool) -> Found:
    images = root / "leftImg8bit"
    _need_folder(images / "train", "let data.root name the folder with leftImg8bit and gtFine of Cityscapes")
    notes: list[str] = []
    fine = {split: _files(root / "gtFine" / split) for split in ("train", "val")}
    ends = ("_gtFine_labelIds", "_gtFine_labelTrainIds")
    # Both may be there: the ids are as they were downloaded, what was made from them may be incomplete.
    end = max(ends, key=lambda end: sum(name.endswith(end) for files in fine.values() for name in files))

    def rows(split: str) -> Rows:
        names = {key.removesuffix(_IMAGE): path for key, path in _files(images / split).items() if key.endswith(_IMAGE)}
        files = fine[split] if split in fine else {}
        column = (f"gtFine/{split}/{files[name + end]}" if name + end in files else "" for name in names)
        return Rows.of(root, (f"leftImg8bit/{split}/{path}" for path in names.values()), column)

    train = rows("train")
    if not len(train):
        raise InputError(f"{images / 'train'} has no image CITY/*{_IMAGE}.png: put Cityscapes' images there.")
    _need_masks(train, f"{root / 'gtFine/train'}", "CITY/*_gtFine_labelIds.png", notes)
    val, extra = _masked(rows("val"), "leftImg8bit/val", notes), train[:0]
    if further:
        extra = rows("train_extra")
        if not len(extra):
            raise InputError(
                f"data.pool is train_extra, but {images / 'train_extra'} has no image: put Cityscapes' further ones "
                "there, or set data.pool: train."
            )
    elif (images / "train_extra").is_dir():
        notes.append("leftImg8bit/train_extra is not used: data.pool: train_extra makes its images unlabelled ones.")
    own = ("train+train_extra" if len(extra) else "train", *_own(val, val[:0])[1:])
    values = _RAW_IDS if end == ends[0] else None
    return Found(train, extra, val, val[:0], own, "leftImg8bit/train/", notes, values, CLASSES["cityscapes"])


# --------------------------------------------------------------------------------------------------------------- KITTI


def _read_kitti(root: Path) -> Found:
    place = "training/image_2"
    folders = [folder for folder in (root, root / "data_semantics") if (folder / place).is_dir()]
    if not folders:
        raise InputError(
            f"{root} has no folder {place}: let data.root name data_semantics of KITTI, as it is unpacked."
        )
    folder, notes = folders[0], list[str]()
    train = _pairs(folder, (place, "training/semantic"), notes)
    _need_masks(train, f"{folder / 'training/semantic'}", "NAME.png", notes)
    extra = _tested(folder, "testing/image_2", notes)
    return Found(train, extra, train[:0], train[:0], (), f"{place}/", notes, _RAW_IDS, CLASSES["kitti"])


def _tested(root: Path, place: str, notes: list[str]) -> Rows:
    """The images that a benchmark tests with, whose masks it keeps."""
    rows = Rows.of(root, (f"{place}/{path}" for path in _look(root / place)[1]))
    if len(rows):
        notes.append(f"The {len(rows)} images of {place} have no masks and are unlabelled ones.")
    return rows


# ----------------------------------------------------------------------------------------------------------- Mapillary

_MAPILLARY = {
    "mapillary": (("labels", "config.json"), ("v1.2/labels", "config_v1.2.json")),
    "mapillary_v2": (("v2.0/labels", "config_v2.0.json"),),
}
"""Where the masks are below training and validation, and what says what they mean. Archives of 2.0 have those of both
versions; 1.2 has 66 labels, 2.0 has 124."""


class _Label(BaseModel):
    readable: str
    color: RGB
    evaluate: bool


class _Labels(BaseModel):
    labels: tuple[_Label, ...]


def _read_mapillary(root: Path, layout: Literal["mapillary", "mapillary_v2"]) -> Found:
    _need_folder(root / "training/images", "let data.root name the folder with training and validation of Mapillary")
    there = [pair for pair in _MAPILLARY[layout] if (root / "training" / pair[0]).is_dir()]
    if not there:
        other = "mapillary" if layout == "mapillary_v2" else "mapillary_v2"
        known = " or ".join(place for place, _ in _MAPILLARY[layout])
        raise InputError(
            f"{root / 'training'} has no folder {known}: put the masks there, or set data.format: {other}."
        )
    masks, config = there[0]
    if not (root / config).is_file():
        raise InputError(f"{root / config} is not there: it names Mapillary's classes, put it beside training.")
    labels = read_json(root / config, _Labels).labels
    scored = [number for number, label in enumerate(labels) if label.evaluate]
    ids = {number: label for label, number in enumerate(scored)}
    values = dict.fromkeys(range(len(labels)), IGNORE) | ids
    classes = tuple(labels[i].readable for i in scored), tuple(labels[i].color for i in scored)

    notes: list[str] = []
    train, val = (_pairs(root, (f"{split}/images", f"{split}/{masks}"), notes) for split in ("training", "validation"))
    _need_masks(train, f"{root / 'training' / masks}", "NAME.png", notes)
    val = _masked(val, "validation/images", notes)
    extra = _tested(root, "testing/images", notes)
    return Found(train, extra, val, val[:0], _own(val, val[:0]), "training/images/", notes, values, classes)


# -------------------------------------------------------------------------------------------------------------- ADE20K


def _read_ade20k(root: Path) -> Found:
    place = "images/training"
    folder = next((folder for folder in (root, root / "ADEChallengeData2016") if (folder / place).is_dir()), None)
    if folder is None:
        raise InputError(f"{root} has no folder {place}: let data.root name ADEChallengeData2016, as it is unpacked.")
    notes: list[str] = []
    train, val = (
        _pairs(folder, (f"images/{split}", f"annotations/{split}"), notes) for split in ("training", "validation")
    )
    _need_masks(train, f"{folder / 'annotations/training'}", "NAME.png", notes)
    val = _masked(val, "images/validation", notes)
    values = {0: IGNORE} | {label + 1: label for label in range(len(_ADE20K))}
    return Found(train, val[:0], val, val[:0], _own(val, val[:0]), f"{place}/", notes, values, CLASSES["ade20k"])


# ---------------------------------------------------------------------------------------------------------------- COCO

_COCO_NEEDS: Mapping[Coco, str] = {
    "coco": "annotations/instances_train2017.json, or a folder masks",
    "coco_panoptic": "annotations/panoptic_train2017.json",
    "coco_stuff": "stuffthingmaps/train2017 or annotations/stuff_train2017_pixelmaps",
}
_Masks = tuple[dict[str, str], tuple[str, ...], Mapping[int, int] | None]
"""Masks by the stems of their images, the names of the classes, and raw value -> class id where these are others."""


def _read_coco(root: Path, layout: Coco) -> Found:
    notes: list[str] = []
    parts: list[Rows] = []
    meanings: list[tuple[tuple[str, ...], Mapping[int, int] | None]] = []
    places = [next((p for p in (s, f"images/{s}") if (root / p).is_dir()), "") for s in ("train2017", "val2017")]
    if not places[0]:
        raise InputError(f"{root} has no folder train2017: let data.root name COCO's folder with it and annotations.")
    for place in filter(None, places):
        split, images = place.removeprefix("images/"), _files(root / place)
        found = _coco_masks(root, layout, split, images)
        if found is None and place == places[0]:
            others = ", ".join(name for name in _COCO_NEEDS if name != layout)
            raise InputError(
                f"{root} has no {_COCO_NEEDS[layout]}: put the masks there, or set data.format to one of {others}."
            )
        masks = found[0] if found else {}
        alone = [name for name in masks if name not in images]
        if alone:
            notes.append(f"There are masks of {len(alone)} images that are not in {place} ({some(alone)}).")
        column = (masks[name] if name in masks else "" for name in images)
        parts.append(Rows.of(root, (f"{place}/{path}" for path in images.values()), column))
        meanings += [found[1:]] if found else []
    train, val = (*parts, parts[0][:0])[:2]
    if not train.masked.any():
        raise InputError(f"{root}: {_COCO_NEEDS[layout]} has no mask of an image in {places[0]}: take both of one set.")
    _need_masks(train, str(root), "", notes)
    if meanings[0] != meanings[-1]:
        raise InputError(f"{root}: the masks of train2017 and val2017 have other categories: take both of one set.")
    val = _masked(val, places[1], notes)
    names, values = meanings[0]
    return Found(train, val[:0], val, val[:0], _own(val, val[:0]), f"{places[0]}/", notes, values, (names, ()))


def _coco_masks(root: Path, layout: Coco, split: str, images: Mapping[str, str]) -> _Masks | None:
    """The masks of a split; none: there is nothing of the kind."""

    def first(*folders: str) -> str | None:
        return next((folder for folder in folders if (root / folder).is_dir()), None)

    if layout == "coco_panoptic":
        return _coco_annotated(root, f"panoptic_{split}")
    if layout == "coco":
        # Papers of this field publish such a folder, in which train and val lie together.
        if not (folder := first(f"masks/{split}", "masks")):
            return _coco_annotated(root, f"instances_{split}")
        files = {key: f"{folder}/{path}" for key, path in _files(root / folder).items() if key in images}
        return files, CLASSES["coco"][0], None
    if folder := first(f"stuffthingmaps/{split}", f"annotations/{split}"):
        names = CLASSES["coco_stuff"][0]
        values = {category - 1: label for label, category in enumerate((*_THING_IDS, *_STUFF_IDS))}
    elif folder := first(f"annotations/stuff_{split}_pixelmaps", f"stuff_{split}_pixelmaps"):
        names = (*_STUFF, "other")
        values = {0: IGNORE} | {category: label for label, category in enumerate((*_STUFF_IDS, _STUFF_IDS[-1] + 1))}
    else:
        return None
    return {key: f"{folder}/{path}" for key, path in _files(root / folder).items()}, names, values


def _coco_annotated(root: Path, name: str) -> _Masks | None:
    """Masks that are drawn from annotations/NAME.json: segments are all there is, instances are on background."""
    place = f"annotations/{name}.json"
    if not (root / place).is_file():
        return None
    found = annotations(root / place)
    stems = [stem(file.decode()) for file in found.name]
    masks = {key: f"{place}#{image}" for key, image in zip(stems, found.image.tolist(), strict=True)}
    if found.panoptic:
        folders = png_folders(root / place)
        there = {path for folder in folders for path in _files(folder).values()}
        if not there:
            raise InputError(f"{folders[0]} has no PNG of segments: unpack {name}.zip, which lies beside it, there.")
        masks = {key: masks[key] for key, png in zip(stems, found.pngs(), strict=True) if png in there}
    background = {} if found.panoptic else {0: "background"}
    names = background | found.categories
    return masks, tuple(names.values()), {0: IGNORE} | {category: label for label, category in enumerate(names)}

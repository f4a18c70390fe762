"""Public data sets as they lie on the disk; the lists of labels that papers publish."""

import json
import os
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from semiseg.config import load_recipe
from semiseg.data.check import check
from semiseg.data.families import LISTS, digest
from semiseg.data.formats import read_mask, write_mask
from semiseg.data.layouts import CITYSCAPES_IDS, CLASSES, bare
from semiseg.data.splits import Data, DataConfig, default_palette, load_data
from semiseg.types import IGNORE, InputError

ROOT = Path(__file__).parents[1]
REAL = os.environ.get("SEMISEG_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="$SEMISEG_DATA is not set")

Maker = Callable[..., Path]

TRAIN = ["2007_000032", "2007_000039", "2008_000008"]
SBD = ["2008_000002", "2010_000003", "2011_000006"]
VAL = ["2007_000033", "2009_000001"]


def save(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def load(root: Path | str, **options: Any) -> Data:
    return load_data(DataConfig(root=str(root), **options))


def ids(rows: Any) -> list[str]:
    return [bare(name) for name in rows.names.tolist()]


def fails(what: str, root: Path | str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        load(root, **options)
    message = str(caught.value)
    assert what in message
    assert message.endswith(".")
    assert "\n" not in message


# ---------------------------------------------------------------------------------------------------------- Pascal VOC


@pytest.fixture
def voc(tmp_path: Path) -> Maker:
    """Makes a small VOC2012 whose masks have a border of 255; `sbd`: with the augmented masks, `listed`: and a list."""

    def make(sbd: bool = True, listed: bool = True, inside: str = "VOC2012") -> Path:
        root = tmp_path / inside
        mask = np.full((8, 8), IGNORE, np.uint8)
        mask[1:-1, 1:-1] = 15
        for name in (*TRAIN, *SBD, *VAL, "2012_004331"):  # the last one is of VOC's other tasks
            save(root / f"JPEGImages/{name}.jpg", np.zeros((8, 8, 3), np.uint8))
        (root / "SegmentationClass").mkdir()
        for name in (*TRAIN, *VAL):
            write_mask(root / f"SegmentationClass/{name}.png", mask, default_palette(21))
        for name in (*TRAIN, *SBD, *VAL) if sbd else ():
            save(root / f"SegmentationClassAug/{name}.png", np.where(mask == IGNORE, 0, mask).astype(np.uint8))
        lists = root / "ImageSets/Segmentation"
        for split, names in (("train", TRAIN), ("val", VAL), ("trainval", sorted(TRAIN + VAL))):
            write(lists / f"{split}.txt", names)
        if sbd and listed:
            write(lists / "train_aug.txt", TRAIN + SBD)
        return root

    return make


def test_voc_with_sbd(voc: Maker) -> None:
    data = load(voc(), format="voc")
    assert ids(data.labelled) == sorted(TRAIN + SBD)
    assert data.labelled[0].image.name == "2007_000032.jpg"
    assert {Path(mask).parent.name for mask in data.labelled.mask.tolist()} == {"SegmentationClassAug"}
    assert (ids(data.val), len(data.test)) == (VAL, 0)
    assert {Path(mask).parent.name for mask in data.val.mask.tolist()} == {"SegmentationClass"}
    assert (len(data.classes), data.classes[15], data.palette) == (21, "person", default_palette(21))
    assert data.family == "VOC2012 official train_aug/val, all 6 labelled"
    assert data.notes == ("Every training image is labelled, so that all of them are the unlabelled images too.",)


def test_masks_of_voc(voc: Maker) -> None:
    data = load(voc(), format="voc")
    official = read_mask(Path(data.val.root, str(data.val.mask[0])), data.code)
    assert (official[0, 0], official[4, 4]) == (IGNORE, 15)
    augmented = read_mask(Path(data.labelled.root, str(data.labelled.mask[0])), data.code)
    assert (augmented[0, 0], augmented[4, 4]) == (0, 15)


def test_voc_without_sbd(voc: Maker) -> None:
    root = voc(sbd=False)
    data = load(root, format="voc", labelled=1)
    assert sorted(ids(data.labelled) + ids(data.unlabelled)) == TRAIN
    assert data.family == "VOC2012 official train/val, 1 of 3 labelled drawn with seed 0"
    assert any("The training images are the 3 of train.txt" in note for note in data.notes)
    fails("data.pool is train_aug, but", root, format="voc", pool="train_aug")
    fails("SegmentationClassAug has no mask: put SBD's augmented masks there", root, format="voc", pool="train_aug")


def test_the_1464_may_be_asked_for(voc: Maker) -> None:
    data = load(voc(), format="voc", pool="train")
    assert ids(data.labelled) == TRAIN
    assert {Path(mask).parent.name for mask in data.labelled.mask.tolist()} == {"SegmentationClass"}
    assert data.family.startswith("VOC2012 official train/val,")


def test_the_pool_that_was_found_is_named(voc: Maker) -> None:
    """Or masks that are added later would change a run that goes on."""
    assert load(voc(), format="voc").config.pool == "train_aug"
    assert load(voc(sbd=False, inside="b"), format="voc").config.pool == "train"


def test_the_list_of_sbd_can_be_derived(voc: Maker) -> None:
    listed, derived = (
        load(voc(), format="voc", labelled=2),
        load(voc(listed=False, inside="b"), format="voc", labelled=2),
    )
    assert ids(derived.labelled) == ids(listed.labelled)
    assert ids(derived.unlabelled) == ids(listed.unlabelled)
    assert any("There is no ImageSets/Segmentation/train_aug.txt" in note and " 6 " in note for note in derived.notes)


@pytest.mark.parametrize("root", ["VOCdevkit/VOC2012", "VOCdevkit", "."])
def test_where_voc_was_unpacked(voc: Maker, tmp_path: Path, root: str) -> None:
    voc(inside="VOCdevkit/VOC2012")
    assert len(load(tmp_path / root, format="voc").labelled) == 6


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "JPEGImages/{}.jpg SegmentationClass/{}.png",
        "/JPEGImages/{}.jpg /SegmentationClassAug/{}.png",
        "JPEGImages/{}.jpg\tSegmentationClassAug/{}.png",
        "../VOC2012/JPEGImages/{}.jpg",
    ],
)
def test_forms_of_lists(voc: Maker, form: str) -> None:
    root = voc()
    lines = [form.replace("{}", name) for name in (SBD[0], TRAIN[1])]
    write(root / "labeled.txt", lines)
    write(root / "ImageSets/Segmentation/train_aug.txt", [form.replace("{}", name) for name in SBD + TRAIN])
    data = load(root, format="voc", labelled="labeled.txt")
    assert ids(data.labelled) == sorted([SBD[0], TRAIN[1]])
    assert ids(data.unlabelled) == sorted({*TRAIN, *SBD} - {SBD[0], TRAIN[1]})
    assert data.family.endswith(f"2 of 6 labelled listed in labeled.txt (sha256 {digest([TRAIN[1], SBD[0]])})")


def test_list_of_images_that_are_not_there(voc: Maker) -> None:
    root = voc()
    write(root / "labeled.txt", [*TRAIN, *VAL, "2007_999998", "2007_999999"])
    missing = "(2007_000033, 2009_000001, 2007_999998 and 1 more): remove them."
    what = f"labeled.txt: 4 of its 7 lines name no training image with a mask {missing}"
    fails(what, root, format="voc", labelled="labeled.txt")
    write(root / "labeled.txt", SBD)
    fails("remove them, or set data.pool: train_aug.", root, format="voc", pool="train", labelled="labeled.txt")
    write(root / "ImageSets/Segmentation/train_aug.txt", [*TRAIN, "2007_999998", "2007_999999"])
    fails("JPEGImages lacks 2 of the 5 images that", root, format="voc")
    fails("train_aug.txt names (2007_999998, 2007_999999): put them there", root, format="voc")


def test_lists_that_contradict(voc: Maker) -> None:
    root = voc()
    lists = root / "ImageSets/Segmentation"
    write(lists / "train_aug.txt", TRAIN + VAL)
    fails("train_aug.txt names 2 images of val.txt (2007_000033, 2009_000001)", root, format="voc")
    (lists / "val.txt").unlink()
    fails("val.txt is not there: put the lists of Pascal VOC 2012 into that folder", root, format="voc")


def test_training_images_without_mask_are_unlabelled(voc: Maker) -> None:
    root = voc()
    (root / f"SegmentationClassAug/{SBD[0]}.png").unlink()
    data = load(root, format="voc")
    assert ids(data.unlabelled) == SBD[:1]
    assert any("1 training images have no mask" in note and SBD[0] in note for note in data.notes)
    for path in (root / "SegmentationClass").iterdir():
        path.unlink()
    for path in (root / "SegmentationClassAug").iterdir():
        path.unlink()
    fails("SegmentationClass has no mask ID.png of a training image", root, format="voc", pool="train")


def test_layouts_taken_for_one_another(voc: Maker, city: Maker, kitti: Maker, mapillary: Maker, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("folder", "splits"):
        fails(
            "set data.format: kitti in a recipe.",
            kitti(inside=f"k{name}/data_semantics"),
            format=name,
        )
        fails("set data.format: kitti in a recipe.", tmp_path / f"k{name}", format=name)
        fails(
            "set data.format: mapillary in a recipe.",
            mapillary(inside=f"m{name}"),
            format=name,
        )
        fails(
            "set data.format: mapillary_v2 in a recipe.",
            mapillary("v2.0", inside=f"n{name}"),
            format=name,
        )
        fails(
            "has JPEGImages, but no folder images: set data.format: voc in a recipe.",
            voc(inside=name),
            format=name,
        )
        fails("set data.format: cityscapes in a recipe.", city(inside=f"c{name}"), format=name)
    fails("has no folder JPEGImages", tmp_path / "empty", format="voc")
    fails("leftImg8bit/train is not a folder", tmp_path / "empty", format="cityscapes")
    fails("empty has no folder training/image_2: let data.root name", tmp_path / "empty", format="kitti")
    fails("training/images is not a folder: let data.root name", tmp_path / "empty", format="mapillary")


@pytest.mark.parametrize("layout", ["folder", "csv", "cityscapes"])
def test_pool_of_another_format(layout: str) -> None:
    with pytest.raises(ValidationError, match=r"train or train_aug with data\.format: voc"):
        DataConfig.model_validate({"root": ".", "format": layout, "pool": "train_aug"})


def test_years_are_no_sequences(voc: Maker) -> None:
    """VOC's names begin with the year, as frames of one video might."""
    assert not any("prefix" in line for line in check(load(voc(), format="voc")).warnings)


# ---------------------------------------------------------------------------------------------------------- Cityscapes

CITIES = {
    "train": ("aachen", ["aachen_000000_000019", "aachen_000001_000019", "aachen_000002_000019"]),
    "val": ("frankfurt", ["frankfurt_000000_000294", "frankfurt_000001_007973"]),
    "test": ("berlin", ["berlin_000000_000019"]),
}


@pytest.fixture
def city(tmp_path: Path) -> Maker:
    """Makes a small Cityscapes with masks of the `kinds`; `extra`: with further images that have none."""

    def make(*kinds: str, extra: bool = False, inside: str = "cityscapes") -> Path:
        root = tmp_path / inside
        raw = np.arange(48, dtype=np.uint8).reshape(6, 8).clip(max=33)
        table = np.full(256, IGNORE, np.uint8)
        table[list(CITYSCAPES_IDS)] = list(CITYSCAPES_IDS.values())
        noise = np.random.default_rng(0)
        for split, (town, names) in CITIES.items():
            for name in names:
                save(
                    root / f"leftImg8bit/{split}/{town}/{name}_leftImg8bit.png",
                    noise.integers(0, 256, (6, 8, 3), dtype=np.uint8),
                )
                start = f"gtFine/{split}/{town}/{name}_gtFine"
                save(root / f"{start}_color.png", np.zeros((6, 8, 3), np.uint8))
                (root / f"{start}_polygons.json").write_text("{}")
                for kind in kinds or ("labelIds",):
                    save(root / f"{start}_{kind}.png", table[raw] if kind == "labelTrainIds" else raw)
        if extra:
            name = "troisdorf_000000_000073_leftImg8bit.png"
            save(root / f"leftImg8bit/train_extra/troisdorf/{name}", np.zeros((6, 8, 3), np.uint8))
        return root

    return make


@pytest.mark.parametrize("kinds", [("labelIds",), ("labelTrainIds",), ("labelIds", "labelTrainIds")])
def test_cityscapes(city: Maker, kinds: tuple[str, ...]) -> None:
    data = load(city(*kinds), format="cityscapes", labelled=2)
    assert sorted(ids(data.labelled) + ids(data.unlabelled)) == CITIES["train"][1]
    assert (ids(data.val), len(data.test)) == (CITIES["val"][1], 0)
    assert data.family == "cityscapes official train/val, 2 of 3 labelled drawn with seed 0"
    assert data.notes == ()
    assert (len(data.classes), data.classes[13], data.palette[13]) == (19, "car", (0, 0, 142))
    assert str(data.labelled.mask[0]).endswith(f"_gtFine_{kinds[0]}.png")
    mask = read_mask(Path(data.val.root, str(data.val.mask[0])), data.code).ravel()
    assert {raw: int(mask[raw]) for raw in CITYSCAPES_IDS} == CITYSCAPES_IDS
    assert [int(mask[raw]) for raw in (0, 3, 4, 9, 18, 29, 30)] == [IGNORE] * 7


def test_incomplete_train_ids_are_passed_over(city: Maker) -> None:
    root = city("labelIds", "labelTrainIds")
    next((root / "gtFine/val").rglob("*_labelTrainIds.png")).unlink()
    assert load(root, format="cityscapes").labelled.mask[0].endswith("_labelIds.png")
    for path in (root / "gtFine/train").rglob("*_labelIds.png"):
        path.unlink()
    assert load(root, format="cityscapes").labelled.mask[0].endswith("_labelTrainIds.png")


def test_further_images_of_cityscapes(city: Maker) -> None:
    root = city(extra=True)
    data = load(root, format="cityscapes", labelled=2)
    assert len(data.unlabelled) == 1
    assert any("train_extra is not used: data.pool: train_extra" in note for note in data.notes)
    data = load(root, format="cityscapes", labelled=2, pool="train_extra")
    assert ids(data.unlabelled)[1:] == ["troisdorf_000000_000073"]
    assert data.family.startswith("cityscapes official train+train_extra/val,")
    fails("train_extra has no image", city(inside="b"), format="cityscapes", pool="train_extra")


def test_coarse_masks_of_cityscapes_are_not_opened(city: Maker) -> None:
    """The images of train_extra come with masks, which self-training on them replaces."""
    root = city(extra=True)
    coarse = root / "gtCoarse/train_extra/troisdorf/troisdorf_000000_000073_gtCoarse_labelIds.png"
    coarse.parent.mkdir(parents=True)
    coarse.write_bytes(b"no image")
    data = load(root, format="cityscapes", pool="train_extra")
    assert (len(data.labelled), ids(data.unlabelled)) == (3, ["troisdorf_000000_000073"])
    assert not data.unlabelled.masked.any()
    assert not check(data).problems


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "{}_leftImg8bit.png",
        "aachen/{}_leftImg8bit.png",
        "leftImg8bit/train/aachen/{}_leftImg8bit.png",
        "leftImg8bit/train/aachen/{}_leftImg8bit.png gtFine/train/aachen/{}_gtFine_labelTrainIds.png",
    ],
)
def test_forms_of_lists_of_cityscapes(city: Maker, form: str) -> None:
    root, chosen = city(), CITIES["train"][1][1:]
    write(root / "labeled.txt", [form.replace("{}", name) for name in reversed(chosen)])
    data = load(root, format="cityscapes", labelled="labeled.txt")
    assert ids(data.labelled) == chosen
    assert data.family.endswith(f"(sha256 {digest(chosen)})")


def test_other_classes_of_cityscapes(city: Maker) -> None:
    root = city()
    names = [str(i) for i in range(34)]
    (root / "classes.json").write_text(json.dumps({"classes": names}))
    data = load(root, format="cityscapes")
    assert (data.classes, data.code.values) == (tuple(names), None)
    two = load(root, format="cityscapes", classes=("other", "road"), values=dict.fromkeys(range(34), 0) | {7: 1})
    assert dict(two.code.values or ())[7] == 1
    own = {i: i for i in range(33)} | {33: IGNORE, 255: IGNORE}
    assert load(root, format="cityscapes", ignore=(33,)).code.values == tuple(own.items())


def test_cityscapes_without_masks(city: Maker) -> None:
    root = city()
    for path in (root / "gtFine/train").rglob("*_labelIds.png"):
        path.unlink()
    fails("gtFine/train has no mask CITY/*_gtFine_labelIds.png of a training image", root, format="cityscapes")
    for path in (root / "leftImg8bit/train").rglob("*.png"):
        path.unlink()
    fails("leftImg8bit/train has no image CITY/*_leftImg8bit.png", root, format="cityscapes")


@pytest.fixture
def renamed(city: Maker, tmp_path: Path) -> Path:
    """The masks of labelIds where `format: splits` looks for masks of train ids."""
    source, root = city(), tmp_path / "renamed"
    for split, (town, names) in CITIES.items():
        for name in names if split != "test" else ():
            for kind, path in (("images", f"leftImg8bit/{split}/{town}/{name}_leftImg8bit.png"),
                               ("masks", f"gtFine/{split}/{town}/{name}_gtFine_labelIds.png")):  # fmt: skip
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                (root / kind / split / f"{name}.png").write_bytes((source / path).read_bytes())
    return root


NINETEEN = tuple(f"class {i}" for i in range(19))


def test_raw_ids_of_cityscapes_taken_for_train_ids(renamed: Path) -> None:
    problems = check(load(renamed, format="splits", classes=NINETEEN)).problems
    assert "has mask values 19, 20, 21 and 12 more beyond the 19 classes" in problems[0]
    assert "which look like raw Cityscapes ids; set data.format: cityscapes (it reads them), or" in problems[0]
    assert "Cityscapes" not in check(load(renamed, format="splits", classes=NINETEEN[:18])).problems[0]
    assert not check(load(renamed, format="splits", classes=[str(i) for i in range(34)])).problems


def test_raw_ids_whose_error_was_silenced(renamed: Path) -> None:
    data = load(renamed, format="splits", classes=NINETEEN, ignore=tuple(range(19, 34)))
    report = check(data)
    assert not report.problems
    assert any("if the masks hold raw Cityscapes ids, where 7 is road" in line for line in report.warnings)
    right = load(renamed, format="splits", classes=NINETEEN, values=dict.fromkeys(range(34), IGNORE) | CITYSCAPES_IDS)
    assert not any("Cityscapes" in line for line in (*check(right).warnings, *check(right).problems))


def test_train_ids_of_cityscapes_taken_for_raw_ids(city: Maker) -> None:
    root = city("labelTrainIds")
    for path in (root / "gtFine").rglob("*_labelTrainIds.png"):
        path.rename(path.with_name(path.name.replace("labelTrainIds", "labelIds")))
    problems = check(load(root, format="cityscapes")).problems
    assert len(problems) == 1
    assert "No mask has a raw Cityscapes id above 18, so they seem to hold train ids already (aachen_" in problems[0]
    assert problems[0].endswith("and 2 more): name them *_gtFine_labelTrainIds.png.")
    assert not check(load(city("labelTrainIds", inside="b"), format="cityscapes")).problems


# --------------------------------------------------------------------------------------------------------------- KITTI

KITTI = [f"{number:06}_10" for number in range(5)]


@pytest.fixture
def kitti(tmp_path: Path) -> Maker:
    """Makes a small data_semantics."""

    def make(inside: str = "kitti") -> Path:
        root, noise = tmp_path / inside, np.random.default_rng(0)
        for place in ("training", "testing"):
            for name in KITTI:
                save(root / f"{place}/image_2/{name}.png", noise.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        for name in KITTI:
            raw = np.arange(48, dtype=np.uint8).reshape(6, 8).clip(max=33)
            save(root / f"training/semantic/{name}.png", raw)
            save(root / f"training/semantic_rgb/{name}.png", np.zeros((6, 8, 3), np.uint8))
        return root

    return make


def test_kitti(kitti: Maker) -> None:
    data = load(kitti(), format="kitti", folds=5, fold=1)
    assert (len(data.labelled), len(data.val), len(data.test)) == (4, 0, 1)
    assert sorted(ids(data.labelled) + ids(data.test)) == KITTI
    assert data.unlabelled.image.tolist() == [f"testing/image_2/{name}.png" for name in KITTI]
    assert not data.unlabelled.masked.any()
    assert data.family == "kitti fold 1 of 5 drawn with seed 0, all 4 labelled"
    assert data.notes == ("The 5 images of testing/image_2 have no masks and are unlabelled ones.",)
    assert (data.classes, data.palette) == CLASSES["cityscapes"]
    mask = read_mask(Path(data.test.root, str(data.test.mask[0])), data.code).ravel()
    assert {raw: int(mask[raw]) for raw in CITYSCAPES_IDS} == CITYSCAPES_IDS
    assert [int(mask[raw]) for raw in (0, 3, 4, 9, 18, 29, 30)] == [IGNORE] * 7


@pytest.mark.parametrize("root", ["kitti/data_semantics", "kitti"])
def test_where_kitti_was_unpacked(kitti: Maker, tmp_path: Path, root: str) -> None:
    kitti(inside="kitti/data_semantics")
    data = load(tmp_path / root, format="kitti", split=(0.6, 0.2, 0.2), labelled=2)
    assert (len(data.labelled), len(data.val), len(data.test)) == (2, 1, 1)


def test_kitti_with_further_frames(kitti: Maker) -> None:
    """Other archives of KITTI put a second frame of each scene into the same folder."""
    root = kitti()
    save(root / "training/image_2/000000_11.png", np.zeros((6, 8, 3), np.uint8))
    data = load(root, format="kitti")
    assert ids(data.unlabelled)[0] == "000000_11"
    assert any("1 training images have no mask and are unlabelled" in note for note in data.notes)
    for path in (root / "training/semantic").iterdir():
        path.unlink()
    fails("training/semantic has no mask NAME.png of a training image", root, format="kitti")


def test_train_ids_in_kitti(kitti: Maker) -> None:
    root = kitti()
    for path in (root / "training/semantic").iterdir():
        save(path, np.arange(48, dtype=np.uint8).reshape(6, 8).clip(max=18))
    problems = check(load(root, format="kitti", folds=5)).problems
    assert len(problems) == 1
    assert problems[0].endswith("set data.values: {0: 0, 1: 1, ..., 18: 18}.")
    assert not check(load(root, format="kitti", folds=5, values={i: i for i in range(19)})).problems


# ----------------------------------------------------------------------------------------------------------- Mapillary

LABELS = [
    {"name": "animal--bird", "readable": "Bird", "color": [165, 42, 42], "evaluate": True, "instances": True},
    {"name": "void--dynamic", "readable": "Dynamic", "color": [111, 74, 0], "evaluate": False, "instances": False},
    {"name": "nature--sky", "readable": "Sky", "color": [70, 130, 180], "evaluate": True, "instances": False},
    {"name": "marking--text", "readable": "Text", "color": [70, 130, 180], "evaluate": True, "instances": False},
    {"name": "void--unlabeled", "readable": "Unlabeled", "color": [0, 0, 0], "evaluate": False, "instances": False},
]
MAPILLARY = {"training": ["-0C1J9Cv", "0GhR_2", "zQ-51a"], "validation": ["_1Gn_x", "Zz9-0"], "testing": ["--aB3"]}


@pytest.fixture
def mapillary(tmp_path: Path) -> Maker:
    """Makes a small Mapillary Vistas: 1.2 as it came first, or labels of `versions` as archives of 2.0 hold them."""

    def make(*versions: str, inside: str = "mapillary") -> Path:
        root, noise = tmp_path / inside, np.random.default_rng(0)
        for split, names in MAPILLARY.items():
            for name in names:
                save(root / f"{split}/images/{name}.jpg", noise.integers(0, 256, (5, 8, 3), dtype=np.uint8))
            for version in versions or ("",):
                place = root / split / version / "labels"
                place.mkdir(parents=True, exist_ok=True)
                mask = np.arange(5, dtype=np.uint8).repeat(8).reshape(5, 8)
                for name in names if split != "testing" else ():
                    write_mask(place / f"{name}.png", mask, tuple(tuple(label["color"]) for label in LABELS))
                    save(place.with_name("instances") / f"{name}.png", mask)
        for version in versions or ("",):
            labels = LABELS if version != "v2.0" else [{**label, "evaluate": True} for label in LABELS]
            name = f"config_{version}.json" if version else "config.json"
            (root / name).write_text(json.dumps({"version": version, "mapping": "public", "labels": labels}))
        return root

    return make


@pytest.mark.parametrize("versions", [(), ("v1.2",), ("v1.2", "v2.0")])
def test_mapillary(mapillary: Maker, versions: tuple[str, ...]) -> None:
    data = load(mapillary(*versions), format="mapillary", labelled=2)
    assert sorted(ids(data.labelled) + ids(data.unlabelled)) == sorted(MAPILLARY["training"] + MAPILLARY["testing"])
    assert (ids(data.val), len(data.test)) == (sorted(MAPILLARY["validation"]), 0)
    assert not data.unlabelled.masked.any()
    assert data.family == "mapillary official train/val, 2 of 3 labelled drawn with seed 0"
    assert data.notes == ("The 1 images of testing/images have no masks and are unlabelled ones.",)
    assert data.classes == ("Bird", "Sky", "Text")
    assert data.palette == ((165, 42, 42), (70, 130, 180), (70, 130, 180))
    mask = read_mask(Path(data.val.root, str(data.val.mask[0])), data.code)
    assert mask[:, 0].tolist() == [0, IGNORE, 1, 2, IGNORE]
    assert not check(data).problems


def test_labels_2_of_mapillary(mapillary: Maker) -> None:
    root = mapillary("v1.2", "v2.0")
    data = load(root, format="mapillary_v2")
    assert data.classes == tuple(label["readable"] for label in LABELS)
    assert "/v2.0/labels/" in str(data.labelled.mask[0])
    own = load(root, format="mapillary", classes=("a", "b", "c"))
    assert (own.classes, own.code.values) == (("a", "b", "c"), load(root, format="mapillary").code.values)
    old, new = mapillary(inside="b"), mapillary("v2.0", inside="c")
    fails(
        "has no folder v2.0/labels: put the masks there, or set data.format: mapillary.",
        old,
        format="mapillary_v2",
    )
    fails(
        "labels or v1.2/labels: put the masks there, or set data.format: mapillary_v2.",
        new,
        format="mapillary",
    )


def test_mapillary_without_masks(mapillary: Maker) -> None:
    root = mapillary()
    (root / f"training/labels/{MAPILLARY['training'][0]}.png").unlink()
    data = load(root, format="mapillary")
    assert ids(data.unlabelled) == [MAPILLARY["training"][0], *MAPILLARY["testing"]]
    assert any("1 training images have no mask" in note for note in data.notes)
    for path in (root / "training/labels").iterdir():
        path.unlink()
    fails("training/labels has no mask NAME.png of a training image", root, format="mapillary")


def test_bad_class_file_of_mapillary(mapillary: Maker) -> None:
    root = mapillary()
    (root / "config.json").write_text(json.dumps({"labels": [{"readable": "Bird", "color": [0, 0, 256]}]}))
    fails("config.json: labels.0.color.2: Input should be less than or equal to 255", root, format="mapillary")
    (root / "config.json").write_text("[]")
    fails("config.json: ", root, format="mapillary")
    (root / "config.json").unlink()
    fails("config.json is not there: it names Mapillary's classes", root, format="mapillary")


def test_images_of_mapillary_for_cityscapes(mapillary: Maker, city: Maker) -> None:
    """As in Zhu et al. 2020: unlabelled images of another data set, of which no mask is needed."""
    folder = mapillary() / "training/images"
    for path in folder.parent.glob("labels/*.png"):
        path.unlink()
    data = load(city(), format="cityscapes", extra=str(folder))
    assert sorted(ids(data.unlabelled)) == sorted(MAPILLARY["training"])
    assert len(data.classes) == 19
    report = check(data)
    assert (report.problems, report.images["unlabelled"]) == ((), 3)
    assert any(f"The 3 images of {folder} are among the unlabelled ones" in line for line in report.warnings)


# ----------------------------------------------------------------------------------------------------- published lists

FURTHER = 3
"""Images of train_extra in the tree below."""
RECIPES = sorted(path for name in ("voc", "cityscapes") for path in (ROOT / "recipes" / name).glob("*.yaml"))
LABELLED = sorted(Path(REAL or "nowhere", "splits").rglob("labeled.txt"))


def listed(path: Path) -> list[str]:
    return [bare(line.split()[0]) for line in path.read_text().splitlines() if line.strip()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both data sets with all names and empty files: nothing is decoded where lists are looked up."""
    folder, lists = tmp_path_factory.mktemp("whole"), Path(REAL or "", "splits/unimatch")
    train, val = (listed(lists / "pascal" / name) for name in ("train_aug.txt", "val.txt"))
    official = listed(lists / "pascal/1464/labeled.txt")
    voc, city = folder / "voc2012", folder / "cityscapes"
    for kind, suffix, names in (
        ("JPEGImages", "jpg", train + val),
        ("SegmentationClass", "png", official + val),
        ("SegmentationClassAug", "png", train + val),
    ):
        (voc / kind).mkdir(parents=True)
        for name in names:
            (voc / kind / f"{name}.{suffix}").touch()
    write(voc / "ImageSets/Segmentation/train.txt", official)
    write(voc / "ImageSets/Segmentation/val.txt", val)
    files = [lists / f"cityscapes/{name}" for name in ("1_2/labeled.txt", "1_2/unlabeled.txt", "val.txt")]
    for line in chain(*(path.read_text().splitlines() for path in files)):
        for path in line.split():
            place = city / path.replace("labelTrainIds", "labelIds")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
    further = city / "leftImg8bit/train_extra/troisdorf"
    further.mkdir(parents=True)
    for number in range(FURTHER):
        (further / f"troisdorf_000000_{number:06}_leftImg8bit.png").touch()
    return {"pascal": voc, "cityscapes": city}


@needs_data
def test_the_whole_sets_have_the_known_counts(whole: dict[str, Path]) -> None:
    voc = load(whole["pascal"], format="voc")
    assert (len(voc.labelled), len(voc.val)) == (10_582, 1_449)
    assert LISTS[digest(ids(voc.labelled))] == "the whole of train_aug"
    assert len(load(whole["pascal"], format="voc", pool="train").labelled) == 1_464
    city = load(whole["cityscapes"], format="cityscapes")
    assert (len(city.labelled), len(city.val)) == (2_975, 500)


@needs_data
@pytest.mark.parametrize("path", LABELLED, ids=lambda path: "/".join(path.parts[-4:-1]))
def test_published_lists(path: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    """They are understood and known, and what they leave is the list of unlabelled images published beside them."""
    copy = tmp_path / "mine.txt"
    copy.write_bytes(path.read_bytes())
    kind = path.parts[-3]
    data = load(whole[kind], format="voc" if kind == "pascal" else "cityscapes", labelled=str(copy))
    names = set(listed(path))
    assert set(ids(data.labelled)) == names
    assert set(ids(data.unlabelled)) == set(listed(path.with_name("unlabeled.txt")))
    words = LISTS[digest(names)]
    assert data.family.endswith(f"{len(names)} of {2975 if kind == 'cityscapes' else 10582} labelled, {words} "
                                f"(sha256 {digest(names)})")  # fmt: skip
    share = path.parent.name.removeprefix("u2pl_").replace("_", "/")
    sizes = {662: "1/16", 1323: "1/8", 2646: "1/4", 5291: "1/2", 186: "1/16", 372: "1/8", 744: "1/4", 1488: "1/2"}
    assert (share if "/" in share else sizes[int(share)] if int(share) in sizes else share) in words
    if kind == "pascal":
        fine = len(names & set(listed(Path(REAL or "", "splits/u2pl/pascal/1464/labeled.txt"))))
        assert f"{fine} fine masks" in words or (fine == len(names) and "all fine masks" in words)


@needs_data
def test_no_list_is_known_that_is_not_there() -> None:
    known = {digest(listed(path)) for path in (*LABELLED, Path(REAL or "", "splits/unimatch/pascal/train_aug.txt"))}
    assert known == set(LISTS)


@needs_data
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes_ask_for_what_is_there(path: Path, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """AdvSemiSeg cuts a share of the training images off, CutMix-Seg rounds it, others take lists: each its own."""
    root = whole["pascal" if path.parent.name == "voc" else "cityscapes"]
    monkeypatch.setenv("SEMISEG_DATA", str(root.parent))
    if not (root.parent / "splits").exists():
        (root.parent / "splits").symlink_to(Path(REAL or "", "splits").resolve())
    recipe = load_recipe(path)
    data, pool = load_data(recipe.data, path.parent), 10_582 if root.name == "voc2012" else 2_975
    if isinstance(recipe.data.labelled, str) and recipe.data.labelled != "all":
        theirs = recipe.method.name not in ("u2pl", "st++")
        assert any(words in data.family for words in LISTS.values() if theirs or "UniMatch" not in words)
    else:
        rounded = 0.5 * (recipe.method.name == "cutmixseg")
        assert len(data.labelled) in {int(pool * share + rounded) for share in (1 / 8, 1 / 4, 1 / 2, 1)}
    assert len(data.unlabelled) == pool - len(data.labelled) + FURTHER * (recipe.data.pool == "train_extra")
    assert path.stem.endswith(f"-{len(data.labelled)}" if len(data.labelled) < pool else "-all")

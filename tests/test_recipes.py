"""Every recipe, on a generated tree with its data set's true layout: two steps, an evaluation and a prediction."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

from semiseg import api
from semiseg.config import load_recipe
from semiseg.data.formats import MaskCode, read_mask, write_mask
from semiseg.data.layouts import CLASSES
from semiseg.data.splits import default_palette

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SIZE = (48, 64)

CAMVID = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign_symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
IDD_LITE = ("drivable", "non_drivable", "living_things", "vehicles", "roadside_objects", "far_objects", "sky")

NAMES = {
    "camvid": {
        "train": ["0001TP_006690", "0006R0_f00930", "0016E5_00390", "0016E5_08430"],
        "val": ["0016E5_07959", "0016E5_07961"],
        "test": ["0001TP_008550", "Seq05VD_f00000", "Seq05VD_f00030"],
    },
    "idd_lite": {
        "train": ["024541_0", "024703_1", "119609_2", "903127_3"],
        "val": ["005506_0", "225091_1"],
        "unlabeled": ["000114_0", "278364_1", "900001_2"],
    },
    "dsb2018": {
        "train": ["0a7d30b2", "0d2bf916", "1b44d22f", "4e1c0f7b"],
        "val": ["00ae65c1", "0bf4b144"],
        "test": ["0f1f896d", "17b9bf43"],
    },
    "voc2012": {
        "train": ["2007_000032", "2007_000039", "2008_000002", "2010_000003"],
        "val": ["2007_000033", "2009_000001"],
    },
    "cityscapes": {
        "train": ["aachen_000000_000019", "aachen_000001_000019", "ulm_000000_000019", "ulm_000001_000019"],
        "val": ["frankfurt_000000_000294", "munster_000000_000019"],
        "test": ["berlin_000000_000019"],
        "unlabeled": ["troisdorf_000000_000073", "troisdorf_000000_000103", "konigswinter_000000_000000"],
    },
    "kitti": {
        "train": ["000000_10", "000001_10", "000002_10", "000003_10", "000004_10"],
        "unlabeled": ["000000_10", "000001_10", "000002_10"],
    },
    "mapillary": {
        "train": [
            "-0C1J9CvgFP4BTVLXNeNZA",
            "0035fkbjWljhaftpVM37-g",
            "_1Gn_xkw7sa_i9GU4mkxxQ",
            "zzyOtqgvBsZrzZz2Zz6tGA",
        ],
        "val": ["-1Zz9-0aEJhfG2OCbm2uVQ", "02G5fLNWFtMmiFNEsyFnzg"],
        "unlabeled": ["--a1LiJdXJdbu8lHhQ0n1A", "0GhR2xUYl5tmaOw5yT8oyA", "zQ51aJdbu8lHhQ0n1AxLiA"],
    },
    "coco": {
        "train": ["000000000009", "000000000025", "000000000030", "000000581929"],
        "val": ["000000000139", "000000000285"],
    },
    "ADEChallengeData2016": {
        "train": ["ADE_train_00000001", "ADE_train_00000002", "ADE_train_00000003", "ADE_train_00020210"],
        "val": ["ADE_val_00000001", "ADE_val_00002000"],
    },
}
CLASSES_OF = {
    "camvid": CAMVID,
    "idd_lite": IDD_LITE,
    "dsb2018": ("background", "nucleus"),
    "voc2012": CLASSES["voc"][0],
    "cityscapes": CLASSES["cityscapes"][0],
    "kitti": CLASSES["cityscapes"][0],
    "mapillary": tuple(f"Label {number}" for number in range(65)),
    "coco": CLASSES["coco"][0],
    "ADEChallengeData2016": CLASSES["ade20k"][0],
}
SPLIT = {"camvid": "test", "dsb2018": "test", "kitti": "test"}
"""What is reported where it is not val."""


TINY_DPT = [
    "network.encoder=vit_small_patch14_dinov2", "network.options={width: 16, channels: [8, 8, 16, 16]}",
    "network.encoder_options={embed_dim: 32, depth: 4, num_heads: 2, img_size: 56}",
]  # fmt: skip


def draw(rng: np.random.Generator, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image of noise whose left half is darker, and a mask of blocks with some ignored pixels."""
    image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    image[:, : SIZE[1] // 2] //= 2
    mask = np.kron(rng.integers(0, classes, (6, 8)), np.ones((8, 8))).astype(np.uint8)
    mask[:2] = 255
    return image, mask


def save(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_voc(folder: Path, rng: np.random.Generator) -> None:
    """VOC's masks have a palette and a border, SBD's are grey and have none; the images of both lie together."""
    names, lists = NAMES["voc2012"], folder / "ImageSets/Segmentation"
    official = [*names["train"][:2], *names["val"]]
    (folder / "SegmentationClass").mkdir(parents=True)
    for name in (*names["train"], *names["val"]):
        image, mask = draw(rng, 21)
        save(folder / f"JPEGImages/{name}.jpg", image)
        save(folder / f"SegmentationClassAug/{name}.png", np.where(mask == 255, 0, mask).astype(np.uint8))
        if name in official:
            write_mask(folder / f"SegmentationClass/{name}.png", mask, default_palette(21))
    lists.mkdir(parents=True)
    for name, ids in (("train", official[:2]), ("val", names["val"]), ("trainval", official)):
        (lists / f"{name}.txt").write_text("\n".join(ids))


def write_cityscapes(folder: Path, rng: np.random.Generator) -> None:
    """Masks of raw ids (0 to 33) beside the files that come with them; those of test are empty, further ones coarse."""
    for split, names in NAMES["cityscapes"].items():
        kind = "gtCoarse" if split == "unlabeled" else "gtFine"
        for name in names:
            place = f"{split.replace('unlabeled', 'train_extra')}/{name.partition('_')[0]}/{name}"
            image, mask = draw(rng, 34)
            mask[:2] = 3
            save(folder / f"leftImg8bit/{place}_leftImg8bit.png", image)
            save(folder / f"{kind}/{place}_{kind}_labelIds.png", mask * (split != "test"))
            save(folder / f"{kind}/{place}_{kind}_color.png", image)


def write_kitti(folder: Path, rng: np.random.Generator) -> None:
    """Masks of raw ids (0 to 33) beside coloured ones, and test images without."""
    for split, names in NAMES["kitti"].items():
        for name in names:
            image, mask = draw(rng, 34)
            mask[:2] = 3
            place = "testing" if split == "unlabeled" else "training"
            save(folder / f"data_semantics/{place}/image_2/{name}.png", image)
            if place == "training":
                save(folder / f"data_semantics/training/semantic/{name}.png", mask)
                save(folder / f"data_semantics/training/semantic_rgb/{name}.png", image)


def write_mapillary(folder: Path, rng: np.random.Generator) -> None:
    """As the labels 1.2 came first: 66 in config.json, of which the last is not scored; test images without masks."""
    colours = default_palette(66)
    for split, names in NAMES["mapillary"].items():
        place = {"train": "training", "val": "validation", "unlabeled": "testing"}[split]
        (folder / place / "labels").mkdir(parents=True)
        for name in names:
            image, mask = draw(rng, 66)
            save(folder / place / f"images/{name}.jpg", image)
            if place != "testing":
                write_mask(folder / place / f"labels/{name}.png", mask.clip(max=65), colours)
    labels = [
        {
            "name": f"label--{i}",
            "readable": f"Label {i}",
            "color": colours[i],
            "evaluate": i < 65,
            "instances": i % 2 == 0,
        }
        for i in range(66)
    ]
    content = {
        "version": "1.2",
        "mapping": "public",
        "folder_structure": "{split}/{content}/{image_id}",
        "labels": labels,
    }
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")


def write_coco(folder: Path, rng: np.random.Generator) -> None:
    """Masks of 81 ids, train and val in one folder: as UniMatch publishes them."""
    for split, names in NAMES["coco"].items():
        for name in names:
            image, mask = draw(rng, 81)
            save(folder / f"{split}2017/{name}.jpg", image)
            save(folder / f"masks/{name}.png", mask)


def write_ade20k(folder: Path, rng: np.random.Generator) -> None:
    """Masks of 1 to 150, and 0 for what has no class."""
    for split, names in NAMES["ADEChallengeData2016"].items():
        place = {"train": "training", "val": "validation"}[split]
        for name in names:
            image, mask = draw(rng, 151)
            mask[:2] = 0
            save(folder / f"images/{place}/{name}.jpg", image)
            save(folder / f"annotations/{place}/{name}.png", mask)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that $SEMISEG_DATA names, with all data sets."""
    folder = tmp_path_factory.mktemp("shared")
    rng = np.random.default_rng(0)
    write_voc(folder / "voc2012", rng)
    write_cityscapes(folder / "cityscapes", rng)
    write_kitti(folder / "kitti", rng)
    write_mapillary(folder / "mapillary", rng)
    write_coco(folder / "coco", rng)
    write_ade20k(folder / "ADEChallengeData2016", rng)
    for name, classes in (("camvid", CAMVID), ("idd_lite", IDD_LITE), ("dsb2018", CLASSES_OF["dsb2018"])):
        palette = default_palette(len(classes))
        for split, stems in NAMES[name].items():
            (folder / name / "images" / split).mkdir(parents=True)
            for stem in stems:
                image, mask = draw(rng, len(classes))
                Image.fromarray(image).save(folder / name / "images" / split / f"{stem}.jpg")
                if split != "unlabeled":
                    write_mask(folder / name / "masks" / split / f"{stem}.png", mask, palette)
        content = {
            "name": name,
            "num_classes": len(classes),
            "classes": classes,
            "palette": palette,
            "ignore_index": 255,
            "counts": {split: len(stems) for split, stems in NAMES[name].items()},
        }
        (folder / name / "classes.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def shortened(path: Path) -> list[str]:
    """The overrides by which a recipe takes two steps on tiny images, with two labels where not all are."""
    recipe = load_recipe(path)
    small = [
        "data.size=[40,56]", "network.weights=random", "train.steps=2", "train.batch=2", "train.crop=[32,32]",
        "train.workers=0", "train.precision=fp32", "train.device=cpu", "train.threads=1", "train.evaluations=1",
        "train.save_every=2", "baseline=false",
    ]  # fmt: skip
    everything = recipe.data.labelled == "all"
    small += [] if everything else ["data.labelled=2"]
    return small + (["method.source.size=[40,56]"] if recipe.method.name == "transfer" else [])


def different() -> list[Path]:
    """One of those recipes that are the same when they are shortened: as a rule they differ in the number of labels."""
    seen: dict[str, Path] = {}
    for path in RECIPES:
        seen.setdefault(f"{path.parent} {load_recipe(path, shortened(path)).dump()}", path)
    return list(seen.values())


@pytest.mark.parametrize("path", different(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_two_steps_an_evaluation_and_a_prediction(
    path: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMISEG_DATA", str(shared))
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(path)
    assert recipe.network.encoder in timm.list_models()
    everything, small = recipe.data.labelled == "all", shortened(path)
    # Queues in the checkpoint of two steps would be hundreds of MB.
    small += ["method.queue=64", "method.queue_first=64", "method.push=64"] if recipe.method.name == "u2pl" else []
    small += ["network.encoder=test_resnet"] if recipe.network.encoder.startswith(("resne", "xception")) else []
    small += TINY_DPT if recipe.network.name == "dpt" else []

    threads = torch.get_num_threads()
    try:
        model = api.train(path, tmp_path / "run", overrides=small)
    finally:
        torch.set_num_threads(threads)

    root, names = recipe.data.root, NAMES[recipe.data.root]
    data, unlabelled = api.data_of(tmp_path / "run"), recipe.data.unlabelled
    assert model.classes == CLASSES_OF[root]
    assert len(data.labelled) == (4 if everything else 2)
    further = 3 if "unlabeled" in names and recipe.data.pool != "train" else 0
    of_all = {"none": 0, "rest": 4 - len(data.labelled) + further or 4, "all": 4 + further}
    assert len(data.unlabelled) == of_all[unlabelled]
    results = json.loads((tmp_path / "run/results.json").read_text())
    split = SPLIT[root] if root in SPLIT else "val"
    held = 1 if recipe.data.folds else len(names[split])
    assert (results["split"], results["images"]) == (split, held)
    evaluated = results["val_last"]["step"] if results["val_last"] else None
    assert evaluated == (None if recipe.data.folds else 2)

    rows = data.test if split == "test" else data.val
    done, _, failed = api.predict(model, [row.image for row in rows], tmp_path / "masks")
    assert (done, failed) == (held, {})
    for row in rows:
        mask = read_mask(tmp_path / "masks" / f"{row.image.stem}.png", MaskCode(len(model.classes)))
        assert mask.shape == SIZE

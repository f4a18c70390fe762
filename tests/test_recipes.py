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
from semiseg.data.formats import read_mask, write_mask
from semiseg.data.splits import default_palette, read_classes

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
}


def draw(rng: np.random.Generator, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image of noise whose left half is darker, and a mask of blocks with some ignored pixels."""
    image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    image[:, : SIZE[1] // 2] //= 2
    mask = np.kron(rng.integers(0, classes, (6, 8)), np.ones((8, 8))).astype(np.uint8)
    mask[:2] = 255
    return image, mask


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that $SEMISEG_DATA names, with both data sets."""
    folder = tmp_path_factory.mktemp("shared")
    rng = np.random.default_rng(0)
    for name, classes in (("camvid", CAMVID), ("idd_lite", IDD_LITE)):
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


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_two_steps_an_evaluation_and_a_prediction(
    path: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMISEG_DATA", str(shared))
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(path)
    assert recipe.network.encoder in timm.list_models()
    small = [
        "data.size=[40,56]", "network.weights=random", "train.steps=2", "train.batch=2", "train.crop=[32,32]",
        "train.workers=0", "train.precision=fp32", "train.device=cpu", "train.threads=1", "train.evaluations=1",
    ]  # fmt: skip
    everything = recipe.data.labelled == "all"
    small += [] if everything else ["data.labelled=2"]
    small += ["network.encoder=test_resnet"] if recipe.network.encoder == "resnet50" else []

    threads = torch.get_num_threads()
    try:
        model = api.train(path, tmp_path / "run", overrides=small)
    finally:
        torch.set_num_threads(threads)

    data, names = api.data_of(tmp_path / "run"), NAMES[recipe.data.root]
    assert model.classes == (CAMVID if recipe.data.root == "camvid" else IDD_LITE)
    assert len(data.labelled) == (4 if everything else 2)
    rest = 4 - len(data.labelled) + (3 if "unlabeled" in names else 0)
    assert len(data.unlabelled) == (rest or 4)
    results = json.loads((tmp_path / "run/results.json").read_text())
    split = "test" if "test" in names else "val"
    assert (results["split"], results["images"]) == (split, len(names[split]))
    assert results["val_last"]["step"] == 2

    done, _, failed = api.predict(model, [shared / recipe.data.root / "images" / split], tmp_path / "masks")
    assert (done, failed) == (len(names[split]), {})
    code = read_classes(data.config, shared / recipe.data.root)[2]
    for stem in names[split]:
        assert read_mask(tmp_path / "masks" / f"{stem}.png", code).shape == SIZE

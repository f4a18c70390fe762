"""The recipe that `init` writes: each choice follows from the folder, and its reason is true."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from semiseg import plan as module
from semiseg.config import Recipe, parse
from semiseg.data.formats import write_mask
from semiseg.data.splits import load_data
from semiseg.methods import FixMatch
from semiseg.plan import plan
from semiseg.types import InputError

Array = NDArray[np.uint8]


def folder(
    place: Path,
    masks: int = 6,
    images: int = 8,
    size: tuple[int, int] = (48, 64),
    values: tuple[int, ...] = (0, 1),
    names: str = "leaf{}",
    square: int = 20,
) -> Path:
    """images/ of noise and masks/ of the first value with a square of each other one."""
    for kind in ("images", "masks"):
        (place / kind).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(images):
        name = names.format(chr(97 + i // 26) + chr(97 + i % 26))
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(place / "images" / f"{name}.png")
        if i < masks:
            write_mask(place / "masks" / f"{name}.png", mask_of(size, values, square), ((0, 0, 0),))
    return place


def mask_of(size: tuple[int, int], values: tuple[int, ...], square: int) -> Array:
    mask = np.full(size, values[0], np.uint8)
    for i, value in enumerate(values[1:]):
        mask[1 : 1 + square, 1 + i * (square + 2) : 1 + i * (square + 2) + square] = value
    return mask


def planned(place: Path, hours: float | None = None) -> tuple[Recipe, dict[str, str]]:
    """The recipe, and the reason of each line by `section.key`."""
    text = plan(place, hours)
    reasons: dict[str, str] = {}
    for line in text.splitlines():
        if re.fullmatch(r"\w+:", line):
            section = line[:-1]
        elif line.startswith("  "):
            key, _, rest = line.strip().partition(": ")
            reasons[f"{section}.{key}"] = rest.rpartition("  # ")[2]
            assert "  # " in rest, line
    assert all(len(reason) > 5 for reason in reasons.values()), reasons
    return parse(yaml.safe_load(text), "plan"), reasons


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ---- the data ----------------------------------------------------------------------------------------------------


def test_few_masks_are_divided_into_folds(tmp_path: Path) -> None:
    recipe, reasons = planned(folder(tmp_path / "few", masks=6))
    assert (recipe.data.folds, recipe.data.fold, recipe.data.split) == (5, None, None)
    assert not recipe.data.group
    assert "6 masks are too few" in reasons["data.folds"]
    data = load_data(recipe.data)
    assert [len(rows) for rows in (data.labelled, data.unlabelled, data.val, data.test)] == [6, 2, 0, 0]
    assert recipe.method.name == "fixmatch"
    assert reasons["method.name"] == "6 labelled and 2 unlabelled images"


@pytest.mark.parametrize(("masks", "folds"), [(199, 5), (200, None)])
def test_many_masks_are_split(tmp_path: Path, masks: int, folds: int | None) -> None:
    recipe, reasons = planned(folder(tmp_path / "many", masks=masks, images=210, size=(16, 16), square=6))
    assert recipe.data.folds == folds
    assert recipe.data.split == (None if folds else (0.7, 0.15, 0.15))
    assert folds or "200 masks: train, val" in reasons["data.split"]


def test_sequences_stay_together(tmp_path: Path) -> None:
    place = folder(tmp_path / "videos", masks=26, images=26, names="v{}")
    for kind in ("images", "masks"):
        for i, path in enumerate(sorted((place / kind).iterdir())):
            path.rename(path.with_name(f"film{chr(97 + i // 4)}_{i:04}.png"))
    recipe, reasons = planned(place)
    assert recipe.data.group
    assert "frames of one stay together" in reasons["data.group"]


def test_a_division_that_is_there_is_kept(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
            source = folder(tmp_path / split, names=split + "{}") / kind
            source.rename(tmp_path / "set" / kind / split)
    recipe, _ = planned(tmp_path / "set")
    assert recipe.data.format == "splits"
    assert recipe.data.folds is None
    assert recipe.data.split is None


def test_where_every_image_has_a_mask(tmp_path: Path) -> None:
    _, reasons = planned(folder(tmp_path / "full", masks=8))
    assert "those with one serve twice" in reasons["method.name"]


def test_names_of_classes(tmp_path: Path) -> None:
    recipe, reasons = planned(folder(tmp_path / "set", values=(0, 1, 3), square=10))
    assert recipe.data.classes == ("background", "class_1", "class_2", "class_3")
    assert "found: 0, 1, 3 in 6 masks" in reasons["data.classes"]
    (tmp_path / "set/classes.json").write_text(json.dumps({"classes": ["soil", "leaf", "stem", "fruit"]}))
    recipe, _ = planned(tmp_path / "set")
    assert recipe.data.classes is None
    assert load_data(recipe.data).classes == ("soil", "leaf", "stem", "fruit")


@pytest.mark.parametrize("names", [None, ["soil", "leaf"]])
def test_masks_of_0_and_255(tmp_path: Path, names: list[str] | None) -> None:
    place = folder(tmp_path / "set", values=(0, 255))
    if names:
        (place / "classes.json").write_text(json.dumps({"classes": names}))
    recipe, reasons = planned(place)
    assert recipe.data.values == {0: 0, 255: 1}
    assert "255 is taken for class 1" in reasons["data.values"]
    assert recipe.data.classes == (None if names else ("background", "object"))


def test_255_beside_other_values_is_no_class(tmp_path: Path) -> None:
    recipe, _ = planned(folder(tmp_path / "set", values=(0, 1, 255), square=10))
    assert recipe.data.values is None
    assert recipe.data.classes == ("background", "class_1")


def test_coloured_masks_need_a_class_file(tmp_path: Path) -> None:
    place = folder(tmp_path / "set")
    for path in (place / "masks").iterdir():
        Image.fromarray(np.full((48, 64, 3), (200, 0, 10), np.uint8)).save(path)
    with pytest.raises(InputError, match=r"is an RGB mask, and there is no classes\.json.*\(200, 0, 10\)"):
        plan(place, None)
    entries = [{"name": "soil", "color": [0, 0, 0]}, {"name": "leaf", "color": [200, 0, 10]}]
    (place / "classes.json").write_text(json.dumps({"classes": entries}))
    assert planned(place)[0].data.values is None


def test_grey_images_fill_three_channels(tmp_path: Path) -> None:
    place = folder(tmp_path / "set")
    for path in (place / "images").iterdir():
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)).save(path)
    recipe, reasons = planned(place)
    assert recipe.data.channels == 3
    assert reasons["data.channels"].startswith("images are grey")


def test_all_channels_are_used(tmp_path: Path) -> None:
    place = folder(tmp_path / "set")
    for path in list((place / "images").iterdir()):
        np.save(path.with_suffix(".npy"), np.random.default_rng(0).integers(0, 256, (48, 64, 5), dtype=np.uint8))
        path.unlink()
    recipe, reasons = planned(place)
    assert recipe.data.channels == 5
    assert "adapted" in reasons["data.channels"]


def test_a_damaged_unlabelled_image_is_no_obstacle(tmp_path: Path) -> None:
    place = folder(tmp_path / "set")
    (place / "images" / "leafah.png").write_bytes(b"damaged")
    planned(place)
    (place / "masks" / "leafaa.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"masks/leafaa\.png"):
        plan(place, None)


@pytest.mark.parametrize("name", ["with # and: colon", "it's “quoted”", "trees ä"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    recipe, _ = planned(folder(tmp_path / name))
    assert recipe.data.root == str(tmp_path / name)


@pytest.mark.parametrize(
    ("masks", "expected"),
    [(4, "has 4 masks: draw at least five"), (0, "has no labelled image: add masks below masks/")],
)
def test_too_few_masks(tmp_path: Path, masks: int, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        plan(folder(tmp_path / "set", masks=masks), None)


# ---- sizes -------------------------------------------------------------------------------------------------------


def test_small_images_stay_as_they_are(tmp_path: Path) -> None:
    recipe, reasons = planned(folder(tmp_path / "set"))
    assert recipe.data.size is None
    assert "data.size" not in reasons
    assert recipe.train.crop == (32, 64)
    assert "typically 48 high and 64 wide" in reasons["train.crop"]
    assert recipe.data.scale == (0.5, 2.0)


def test_large_images_are_shrunk_as_far_as_their_objects_allow(tmp_path: Path) -> None:
    recipe, reasons = planned(folder(tmp_path / "large", size=(600, 800), square=200))
    assert recipe.data.size == 256
    assert "class_1, the smallest, are mostly above 64 px then" in reasons["data.size"]
    assert recipe.train.crop == (160, 160)
    recipe, reasons = planned(folder(tmp_path / "small", size=(600, 800), square=20))
    assert recipe.data.size == 320, "800 / 20 * 8"
    assert "are mostly above 8 px then" in reasons["data.size"]
    assert recipe.data.scale == (0.5, 2.0), "half of 8 px is a cell"
    recipe, _ = planned(folder(tmp_path / "tiny", size=(600, 800), square=9))
    assert recipe.data.size == 512, "however small: twice a CPU's size"
    assert recipe.data.scale == (0.7, 2.0), "4 px of 5.8"


def test_specks_do_not_count(tmp_path: Path) -> None:
    place = folder(tmp_path / "set", size=(600, 800), square=200)
    for path in (place / "masks").iterdir():
        mask = mask_of((600, 800), (0, 1), 200)
        for top in range(300, 590, 40):
            for left in range(0, 780, 40):
                mask[top : top + 3, left : left + 3] = 1
        write_mask(path, mask, ((0, 0, 0),))
    assert planned(place)[0].data.size == 256


def test_images_of_several_sizes(tmp_path: Path) -> None:
    """Photographs show the same in more px; a microscope shows more."""
    photographs, slides = tmp_path / "photographs", tmp_path / "slides"
    for i, side in enumerate((300, 400, 600, 800, 1200, 300)):
        for place, square in ((photographs, side // 5), (slides, 60 + i)):
            folder(place, masks=1, images=1, size=(side, side), square=square, names=f"{i}" + "{}")
    recipe, _ = planned(photographs)
    assert recipe.data.size == 256
    recipe, reasons = planned(slides)
    assert recipe.data.size is None
    assert reasons["data.size"].startswith("images keep their sizes")
    assert recipe.train.crop == (160, 160)


def test_masks_without_any_object(tmp_path: Path) -> None:
    recipe, _ = planned(folder(tmp_path / "set", values=(255, 1), square=1))
    assert recipe.train.crop == (32, 64)


def test_choices_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path / "set", size=(600, 800), square=200)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for bf16, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda known=bf16: known)
        recipe, reasons = planned(place)
        assert recipe.data.size is None, "800 px are no burden there"
        assert recipe.train.crop == (320, 320)
        assert recipe.network.encoder == "resnet50"
        assert recipe.train.precision == precision
    assert reasons["train.precision"] == "this GPU has no bf16"


@pytest.mark.parametrize(("size", "mild"), [((96, 128), True), ((320, 480), False)])
def test_small_crops_have_a_mild_strong_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], mild: bool
) -> None:
    monkeypatch.setattr(module, "_crop", lambda side, most: side // 32 * 32)
    recipe, reasons = planned(folder(tmp_path / "set", size=size))
    options, plain = recipe.method.options.model_dump(), FixMatch.Config().model_dump()
    assert (max(recipe.train.crop) < 256) == mild
    assert (options["jitter"], options["blur"]) == (
        ((0.25, 0.25, 0.25, 0.1), 0) if mild else (plain["jitter"], plain["blur"])
    )
    assert ("method.blur" in reasons) == mild


# ---- time --------------------------------------------------------------------------------------------------------


STEP = "a step of 5 trainings, 5 labelled-only ones and the last one, timed here, takes 22 s"


@pytest.mark.parametrize(
    ("hours", "steps", "save_every", "ema", "reason"),
    [
        (10, 1472, 29, 0.986, f"10 h: {STEP}"),
        (0.5, 100, 10, 0.8, f"the fewest that make sense, some 41 min, longer than 0.5 h: {STEP}"),
        (1000, 40_000, 800, 0.99, f"more are rarely of use, although 1000 h have room for 147272: {STEP}"),
    ],
)
def test_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: float, steps: int, save_every: int, ema: float, reason: str
) -> None:
    """A tenth of the time is left for what is not training; the teacher of a short run remembers less."""
    timed: list[Any] = []
    monkeypatch.setattr(module, "_time_steps", lambda recipe: timed.append(recipe) or 2.0)
    recipe, reasons = planned(folder(tmp_path / "set"), hours)
    assert (recipe.train.steps, recipe.train.save_every, reasons["train.steps"]) == (steps, save_every, reason)
    assert recipe.method.options.model_dump()["ema"] == ema
    same = {"train": recipe.train, "method": recipe.method}
    assert timed[0].model_copy(update=same) == recipe, "what is timed is what is proposed"


@pytest.mark.parametrize("hours", [0, -1, float("nan")])
def test_hours_above_zero(tmp_path: Path, hours: float) -> None:
    with pytest.raises(InputError, match=r"--hours is .*, but it should be above 0\."):
        plan(tmp_path, hours)


def test_timing(tmp_path: Path) -> None:
    """Three steps of the proposed method, from random weights, whatever stands in the recipe."""
    place = folder(tmp_path / "set", size=(32, 32), square=8)
    recipe, _ = planned(place)
    network = recipe.network.model_copy(update={"name": "fpn", "encoder": "test_resnet"})
    small = recipe.train.model_copy(update={"batch": 2, "crop": (32, 32)})
    assert 0 < module._time_steps(recipe.model_copy(update={"network": network, "train": small})) < 10

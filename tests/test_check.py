"""What `check` reports of good and of bad data, and the pictures it draws."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from semiseg.data import check as module
from semiseg.data.check import Report, check, class_pixels, contact_sheet, leaks
from semiseg.data.formats import write_mask
from semiseg.data.rows import Row
from semiseg.data.splits import Data, DataConfig, load_data
from semiseg.types import IGNORE, InputError

REAL = os.environ.get("SEMISEG_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="$SEMISEG_DATA is not set")

Array = NDArray[np.uint8]
SIDE = 48
CLASSES = ("ground", "thing", "rare")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))


def scene(seed: int) -> Array:
    """Coarse blocks in random colours, so that two scenes differ and a scaled copy does not."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return blocks.repeat(SIDE // 6, 0).repeat(SIDE // 6, 1)


def put(root: Path, split: str, name: str, image: Array, mask: Array | None = None) -> None:
    for kind in ("images", "masks"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / "images" / split / f"{name}.png")
    if mask is not None:
        write_mask(root / "masks" / split / f"{name}.png", mask, ((0, 0, 0), (255, 0, 0), (0, 255, 0)))


def mask_of(*labels: int) -> Array:
    """Equal bands of the given ids."""
    return np.repeat(np.array(labels, np.uint8), SIDE // len(labels))[:, None].repeat(SIDE, 1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound set: 4 labelled, 2 unlabelled, 2 val, 2 test."""
    folder = tmp_path / "set"
    names = [("train", "abcd"), ("val", "ef"), ("test", "gh"), ("unlabelled", "ij")]
    for number, (split, name) in enumerate((split, name) for split, letters in names for name in letters):
        put(folder, split, name, scene(number), None if split == "unlabelled" else mask_of(0, 1, 2))
    (folder / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    return folder


def load(root: Path, **options: Any) -> Data:
    return load_data(DataConfig(root=str(root), **{"format": "splits", **options}))


def report(root: Path, **options: Any) -> Report:
    return check(load(root, **options))


def the_one(sentences: tuple[str, ...], *parts: str) -> None:
    """There is one sentence, it ends, and it has the parts."""
    assert len(sentences) == 1
    assert sentences[0].endswith(".")
    assert "\n" not in sentences[0]
    for part in parts:
        assert part in sentences[0]


def test_sound_data(root: Path) -> None:
    found = report(root)
    assert (found.problems, found.warnings) == ((), ())
    assert found.images == {"labelled": 4, "unlabelled": 2, "val": 2, "test": 2}
    assert found.sizes == (((SIDE, SIDE), 10),)
    third = SIDE * SIDE // 3
    assert found.pixels["labelled"].tolist() == [4 * third] * 3 + [0]
    assert found.shown["test"].tolist() == [2, 2, 2, 0]


def test_text_of_a_report(root: Path) -> None:
    put(root, "val", "e", scene(4), mask_of(0, 1, IGNORE))
    put(root, "test", "extra", scene(20)[:24], mask_of(0, 1, 2)[:24])
    lines = report(root).text().splitlines()
    assert lines[0] == "set official train/val/test, all 4 labelled"
    assert lines[1] == "images: 4 labelled, 2 unlabelled, 2 val, 3 test"
    assert lines[2] == "sizes (H x W in px): 10 of 48x48, 1 of 24x48"
    assert lines[4].split() == ["labelled", "val", "test"]
    assert lines[7].split() == ["rare", "33.33", "%", "4", "16.67", "%", "1", "26.67", "%", "2"]
    assert lines[8].split() == ["ignored", "0.00", "%", "0", "16.67", "%", "1", "0.00", "%", "0"]


def test_class_pixels_are_those_of_the_report(root: Path) -> None:
    put(root, "train", "a", scene(0), mask_of(0, 1, IGNORE))
    assert class_pixels(load(root)).tolist() == report(root).pixels["labelled"][:-1].tolist()


def test_mask_of_another_size(root: Path) -> None:
    put(root, "val", "e", scene(4), mask_of(0, 1, 2)[:, :24])
    the_one(report(root).problems, "masks/val/e.png", "24x48", "48x48")


def test_mask_values_that_are_no_class(root: Path) -> None:
    put(root, "train", "a", scene(0), mask_of(0, 7))
    the_one(report(root).problems, "masks/train/a.png", "7")
    for name in "abcd":
        put(root, "train", name, scene(0), mask_of(0, IGNORE))
    assert not report(root).problems


def test_many_wrong_masks_are_counted(root: Path) -> None:
    for i in range(9):
        put(root, "train", f"w{i}", scene(30 + i), mask_of(9))
    problems = report(root).problems
    assert len(problems) == 6
    assert problems[-1] == "Of the labelled images, 4 more cannot be used."


def test_corrupt_files(root: Path) -> None:
    for split, name in (("train", "a"), ("val", "e"), ("unlabelled", "i")):
        path = root / "images" / split / f"{name}.png"
        path.write_bytes(path.read_bytes()[:60])
    found = report(root)
    assert ["train/a.png" in found.problems[0], "val/e.png" in found.problems[1], len(found.problems)] == [
        True,
        True,
        2,
    ]
    the_one(found.warnings, "passed over (images/unlabelled/i.png)")
    assert found.sizes == (((SIDE, SIDE), 7),)
    assert found.shown["labelled"].tolist() == [3, 3, 3, 0]


def test_a_pool_of_corrupt_files_only(root: Path) -> None:
    for name in "ef":
        (root / f"images/val/{name}.png").write_bytes(b"")
    found = report(root)
    assert len(found.problems) == 2
    assert found.pixels["val"].tolist() == [0, 0, 0, 0]
    assert "val" in found.text()


def test_identical_images_in_two_splits(root: Path) -> None:
    put(root, "test", "copy", scene(1), mask_of(0, 1, 2))
    data = load(root)
    the_one(check(data).problems, "labelled and test", "(images/train/b.png = images/test/copy.png)")
    assert leaks(data) == check(data).problems
    assert not check(data).warnings


def test_identical_means_the_decoded_pixels(root: Path) -> None:
    Image.fromarray(scene(5)).save(root / "images/test/other.bmp")
    write_mask(root / "masks/test/other.png", mask_of(0, 1, 2), ((0, 0, 0),))
    the_one(leaks(load(root)), "val and test", "images/val/f.png = images/test/other.bmp")


def test_identical_images_in_one_split_do_no_harm(root: Path) -> None:
    put(root, "train", "b2", scene(1), mask_of(0, 1, 2))
    assert not report(root).problems


def test_unlabelled_copies_of_test_images_are_told(root: Path) -> None:
    put(root, "unlabelled", "k", scene(6))
    found = report(root)
    assert not found.problems
    the_one(found.warnings, "hold some of the test images too (images/test/g.png)")


@pytest.mark.parametrize(
    "change",
    [
        lambda image: np.clip(image * 0.8 + 10, 0, 255).astype(np.uint8),
        lambda image: image[::2, ::2],
        lambda image: image.repeat(3, 0).repeat(2, 1),
        lambda image: image ^ 1,
    ],
)
def test_near_duplicates(root: Path, change: Callable[[Array], Array]) -> None:
    image = change(scene(2))
    put(root, "val", "near", image, np.zeros(image.shape[:2], np.uint8))
    found = report(root)
    assert not found.problems
    the_one(found.warnings, "labelled and val images look almost the same", "images/train/c.png ~ images/val/near.png")


def test_flat_images_are_not_alike(root: Path) -> None:
    for split, value in (("train", 10), ("val", 11), ("test", 200)):
        put(root, split, "flat", np.full((SIDE, SIDE, 3), value, np.uint8), mask_of(0, 1, 2))
    assert not report(root).warnings


def test_classes_that_are_nowhere(root: Path) -> None:
    for name in "abcd":
        put(root, "train", name, scene("abcd".index(name)), mask_of(0, 1))
    for name in "gh":
        put(root, "test", name, scene("gh".index(name) + 6), mask_of(0, 2))
    warnings = report(root).warnings
    assert "No labelled image shows the class rare: it cannot be learned." in warnings
    assert "No test image shows the class thing: it is left out of test's mean." in warnings
    assert len(warnings) == 2


def test_masks_that_are_ignored_as_a_whole(root: Path) -> None:
    put(root, "train", "a", scene(0), mask_of(IGNORE))
    the_one(report(root).warnings, "Some labelled masks have no labelled pixel (images/train/a.png)")


def test_frames_of_one_video_in_two_splits(root: Path) -> None:
    for number in range(40, 52):
        split = ("train", "val", "test")[number % 3]
        put(root, split, f"drive{number // 4}_{number:04d}", scene(number), mask_of(0, 1, 2))
    for split, letters in (("train", "abcd"), ("val", "ef"), ("test", "gh")):
        for name in letters:
            (root / f"images/{split}/{name}.png").unlink()
    warnings = [w for w in report(root).warnings if "belong to no image" not in w]
    assert [w.split(" images")[0] for w in warnings] == ["Some val", "Some test"]
    assert all("name prefix" in w and "data.group" not in w for w in warnings)

    flat = root.parent / "flat"
    for number in range(40, 70):
        put(flat, "", f"drive{number // 6}_{number:04d}", scene(number), mask_of(0, 1, 2))
    options = {"format": "folder", "classes": CLASSES, "split": (0.6, 0.2, 0.2), "labelled": 10}
    assert all("set data.group: true" in w for w in report(flat, **options).warnings)
    assert len(report(flat, **options).warnings) == 2
    assert not report(flat, **options, group=True).warnings


def test_notes_are_warnings(root: Path) -> None:
    put(root, "train", "u", scene(99))
    (root / "images/train/u.png").rename(root / "images/val/u.png")
    the_one(report(root).warnings, "images/val has images without a mask", "u.png")


def test_many_unlabelled_images_are_sampled(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(9):
        put(root, "unlabelled", f"k{i}", scene(50 + i))
    monkeypatch.setattr(module, "MOST_UNLABELLED", 4)
    found = report(root)
    assert found.images["unlabelled"] == 11
    assert found.sizes[0][1] == 8 + 4
    the_one(found.warnings, "one in 3 was opened here: 4")


def test_leaks_opens_each_file_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read = module.open_pair

    def counting(row: Row, *options: Any) -> Any:
        opened.append(row.image.name)
        return read(row, *options)

    monkeypatch.setattr(module, "open_pair", counting)
    assert leaks(load(root)) == ()
    assert sorted(opened) == [f"{name}.png" for name in "abcdefgh"]
    opened.clear()
    assert leaks(load(root)) == ()
    assert opened == []
    put(root, "test", "h", scene(3), mask_of(0, 1, 2))
    os.utime(root / "images/test/h.png", ns=(1, 1))
    the_one(leaks(load(root)), "images/train/d.png = images/test/h.png")
    assert opened == ["h.png"]
    leaks(load(root, channels=1))
    assert len(opened) == 9


def test_leaks_without_a_usable_cache(root: Path, tmp_path: Path) -> None:
    put(root, "test", "h", scene(3), mask_of(0, 1, 2))
    expected = leaks(load(root))
    assert expected
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text("{ damaged")
    assert leaks(load(root)) == expected
    kept.unlink()
    (kept / "in the way").mkdir(parents=True)
    assert leaks(load(root)) == expected


def test_leaks_of_a_corrupt_image(root: Path) -> None:
    (root / "images/val/e.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"images/val/e\.png"):
        leaks(load(root))
    (root / "images/val/e.png").unlink()
    (root / "images/val/e.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"images/val/e\.png"):
        leaks(load(root))


# ------------------------------------------------------------------------------------------------------ contact sheet

PALETTE = ((0, 0, 0), (90, 180, 30), (255, 0, 0))


def drawn(path: Path) -> Array:
    return np.array(Image.open(path))


def test_contact_sheet_paints_masks(tmp_path: Path) -> None:
    images = torch.full((3, 3, 4, 10), 60, dtype=torch.uint8)
    masks = torch.ones(3, 4, 10, dtype=torch.uint8)
    masks[:, 0] = IGNORE
    contact_sheet(images, masks, PALETTE, tmp_path / "sheet.png")
    sheet = drawn(tmp_path / "sheet.png")
    assert sheet.shape == (12, 42, 3)
    assert (sheet[:4, :10] == 60).all()
    assert (sheet[5:8, 14:24] == [80, 140, 40]).all()
    assert (sheet[4, :10] == (60 + 2 * np.array([224, 224, 192])) // 3).all()
    assert (sheet[:, 10:14] == 255).all()


def test_contact_sheet_wraps_and_has_a_legend(tmp_path: Path) -> None:
    images = torch.zeros(5, 3, 8, 500, dtype=torch.uint8)
    contact_sheet(images, None, PALETTE, tmp_path / "plain.png")
    assert drawn(tmp_path / "plain.png").shape == (2 * 12, 3 * 504, 3)
    contact_sheet(images, None, PALETTE, tmp_path / "legend.png", CLASSES)
    legend = drawn(tmp_path / "legend.png")[24:]
    assert legend.shape == (20, 3 * 504, 3)
    assert (legend[8, 168] == PALETTE[1]).all()
    assert (legend[:, 181:300] < 128).any()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (torch.tensor([[[0, 1000, 4000]]]).to(torch.uint16), [0, 64, 255]),
        (torch.tensor([[[0, 51, 255]]], dtype=torch.uint8), [0, 51, 255]),
        (torch.tensor([[[0.0, 0.2, 1.5]]]), [0, 51, 255]),
    ],
)
def test_contact_sheet_of_any_depth(tmp_path: Path, image: torch.Tensor, expected: list[int]) -> None:
    contact_sheet(image[None], None, PALETTE, tmp_path / "sheet.png")
    assert drawn(tmp_path / "sheet.png")[0, :3, 0].tolist() == expected


def test_contact_sheet_of_any_channel_count(tmp_path: Path) -> None:
    image = torch.arange(4, dtype=torch.uint8)[None, :, None, None].expand(1, 4, 2, 2)
    for channels, expected in ((1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 1, 2])):
        contact_sheet(image[:, :channels], None, PALETTE, tmp_path / "sheet.png")
        assert drawn(tmp_path / "sheet.png")[0, 0].tolist() == expected


# ---------------------------------------------------------------------------------------------------------- real data


@needs_data
def test_real_pixel_shares(tmp_path: Path) -> None:
    """CamVid's shares agree with those in its class file, and its known overlaps of sequences are found."""
    data = load_data(DataConfig(root="camvid", format="camvid", labelled=8, unlabelled="none"))
    found = check(data)
    content = json.loads((Path(data.val.root) / "classes.json").read_text())
    for split in ("val", "test"):
        share = 100 * found.pixels[split] / found.pixels[split].sum()
        assert np.allclose(share[:-1], [content["pixel_fraction_percent"][split][c] for c in data.classes], atol=1e-3)
        assert found.shown[split][:-1].tolist() == [content["images_with_class"][split][c] for c in data.classes]
    assert found.problems == leaks(data) == ()
    overlaps = [w for w in found.warnings if "name prefix" in w]
    assert len(overlaps) == 2
    assert re.search(r"\(0016E5_.* and 98 more\)", overlaps[0])
    assert re.search(r"\(0001TP_.* and 59 more\)", overlaps[1])

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semiseg.data.synthetic import CLASSES, PALETTE, scene, write
from semiseg.types import IGNORE, InputError


def test_a_scene_is_a_function_of_its_seed() -> None:
    image, mask = scene(7)
    assert image.shape == (96, 128, 3)
    assert mask.shape == (96, 128)
    assert image.dtype == mask.dtype == np.uint8
    again, same = scene(7)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(mask, same)
    assert not np.array_equal(image, scene(8)[0])


@pytest.mark.parametrize("size", [(32, 48), (97, 61), (200, 300)])
def test_any_size_shows_the_same_scene(size: tuple[int, int]) -> None:
    for seed in range(6):
        image, mask = scene(seed, size)
        assert image.shape == (*size, 3)
        assert set(np.unique(mask)) <= {*range(len(CLASSES)), IGNORE}


def test_every_class_appears_and_the_sign_is_the_smallest() -> None:
    masks = np.stack([scene(seed)[1] for seed in range(150)])
    share = np.bincount(masks.ravel(), minlength=256) / masks.size
    assert share[: len(CLASSES)].sum() + share[IGNORE] == pytest.approx(1)
    assert share[:-1].max() < 0.5
    assert np.argmin(share[: len(CLASSES)]) == CLASSES.index("sign")
    assert 0.02 < share[CLASSES.index("sign")] < 0.06
    assert share[IGNORE] < 0.04
    for label, name in enumerate(CLASSES):
        assert np.mean((masks == label).any((1, 2))) > 0.2, name


def test_colour_alone_does_not_tell_the_class() -> None:
    """The nearest class centre in colour, fitted on the very scenes it is asked about, is often wrong."""
    pairs = [scene(seed) for seed in range(40)]
    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in pairs]).astype(np.float32)
    labels = np.concatenate([mask.ravel() for _, mask in pairs])
    centres = np.stack([pixels[labels == label].mean(0) for label in range(len(CLASSES))])
    nearest = np.argmin(((pixels[:, None] - centres) ** 2).sum(2), 1)
    recall = [np.mean(nearest[labels == label] == label) for label in range(len(CLASSES))]
    assert np.mean(recall) < 0.65


def test_written_folder(tmp_path: Path) -> None:
    write(tmp_path, train=3, labelled=2, val=1, test=2, seed=1, size=(32, 48))
    files = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.*"))
    assert files == [
        "classes.json",
        "images/test/scene-00000.png",
        "images/test/scene-00001.png",
        "images/train/scene-00000.png",
        "images/train/scene-00001.png",
        "images/train/scene-00002.png",
        "images/val/scene-00000.png",
        "masks/test/scene-00000.png",
        "masks/test/scene-00001.png",
        "masks/train/scene-00000.png",
        "masks/train/scene-00001.png",
        "masks/val/scene-00000.png",
    ]
    classes = json.loads((tmp_path / "classes.json").read_text())
    assert tuple(classes["classes"]) == CLASSES
    assert [tuple(colour) for colour in classes["palette"]] == list(PALETTE)
    drawn = {file.read_bytes() for file in (tmp_path / "images").rglob("*.png")}
    assert len(drawn) == 6
    with Image.open(tmp_path / "images/train/scene-00001.png") as image:
        np.testing.assert_array_equal(np.asarray(image), scene(1_000_001, (32, 48))[0])
    with Image.open(tmp_path / "masks/train/scene-00001.png") as mask:
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), scene(1_000_001, (32, 48))[1])


def test_a_smaller_set_is_the_beginning_of_a_larger_one(tmp_path: Path) -> None:
    write(tmp_path / "small", train=2, labelled=1, val=1, test=1, size=(32, 48))
    write(tmp_path / "large", train=4, val=2, test=1, size=(32, 48))
    for file in (tmp_path / "small").rglob("*.png"):
        assert file.read_bytes() == (tmp_path / "large" / file.relative_to(tmp_path / "small")).read_bytes()


def test_more_labels_than_scenes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labelled=5"):
        write(tmp_path, train=4, labelled=5)

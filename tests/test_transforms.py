"""Geometry of a training sample: the mask goes where the image goes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from semiseg.data.transforms import geometry
from semiseg.types import IGNORE

H, W = 60, 80
STEP = {torch.uint8: 3, torch.uint16: 800}


def ramps(dtype: torch.dtype, size: tuple[int, int] = (H, W)) -> tuple[Tensor, Tensor, Tensor]:
    """An image whose channels are its own y and x coordinates times STEP, and masks that are y and x."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return torch.stack([y, x]).mul(STEP[dtype]).to(dtype), y.to(torch.uint8), x.to(torch.uint8)


def crop_of(
    image: Tensor, mask: Tensor | None, seed: int, crop: tuple[int, int] = (32, 40), **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    settings = {"scale": (0.5, 2.0), "flip": True, **options}
    return geometry(image, mask, crop, rng=np.random.default_rng(seed), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_mask_follows_image(dtype: torch.dtype) -> None:
    image, y, x = ramps(dtype)
    shifts = []
    for seed in range(100):
        for axis, mask in enumerate((y, x)):
            moved, moved_mask, valid = crop_of(image, mask, seed)
            assert moved.dtype == dtype
            error = moved[axis].double() / STEP[dtype] - moved_mask.double()
            # Bilinear against nearest: half a pixel of the file, and at the edge of the window a little more.
            assert error[valid].abs().max() <= 1.5
            inner = error[2:-2, 2:-2][valid[2:-2, 2:-2]]
            shifts.append(float(inner.mean()))
    # Half a pixel of the crop between the two would show as 0.25 to 1 in the mean. Near a scale of 1/2 a crop may have
    # half a pixel of the file: there is no nearest one.
    assert abs(float(np.mean(shifts))) < 0.02
    assert np.median(np.abs(shifts)) < 0.05
    assert max(map(abs, shifts)) < 0.55


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 70), st.integers(1, 70), st.integers(0, 1000))
def test_any_size_and_crop(height: int, width: int, crop_h: int, crop_w: int, seed: int) -> None:
    image = torch.full((1, height, width), 200, dtype=torch.uint8)
    mask = torch.full((height, width), 5, dtype=torch.uint8)
    moved, moved_mask, valid = crop_of(image, mask, seed, (crop_h, crop_w), scale=(0.3, 3.0))
    assert moved.shape == (1, crop_h, crop_w)
    assert moved_mask.shape == valid.shape == (crop_h, crop_w)
    assert valid.any()
    np.testing.assert_array_equal(moved[0], np.where(valid, 200, 0))
    np.testing.assert_array_equal(moved_mask, np.where(valid, 5, IGNORE))


def test_what_the_image_does_not_fill_is_invalid() -> None:
    image, y, _ = ramps(torch.uint8, (10, 12))
    moved, mask, valid = crop_of(image, y, 0, (16, 20), scale=(1.0, 1.0), flip=False)
    np.testing.assert_array_equal(moved[:, :10, :12], image)
    np.testing.assert_array_equal(mask[:10, :12], y)
    assert valid.sum() == 120
    assert valid[:10, :12].all()
    assert (mask[~valid] == IGNORE).all()
    assert not moved[:, ~valid].any()


def test_without_a_mask_there_is_none_but_padding_is_known() -> None:
    image, y, _ = ramps(torch.uint8, (10, 12))
    with_mask, without = crop_of(image, y, 3, (16, 20)), crop_of(image, None, 3, (16, 20))
    np.testing.assert_array_equal(with_mask[0], without[0])
    np.testing.assert_array_equal(with_mask[2], without[2])
    assert (without[1] == IGNORE).all()
    assert not without[2].all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_a_flip_mirrors_all_three(dtype: torch.dtype) -> None:
    image, _, x = ramps(dtype, (10, 12))
    mirrored = 0
    for seed in range(40):
        plain = crop_of(image, x, seed, (16, 20), scale=(1.0, 1.0), flip=False)
        moved = crop_of(image, x, seed, (16, 20), scale=(1.0, 1.0), flip=True)
        same = torch.equal(plain[1], moved[1])
        mirrored += not same
        for one, other in zip(plain, moved, strict=True):
            np.testing.assert_array_equal(other, one if same else np.flip(one.numpy(), -1))
    assert 10 <= mirrored <= 30


def test_ids_are_never_blended() -> None:
    rng = np.random.default_rng(0)
    mask = torch.from_numpy(rng.choice([0, 100, IGNORE], (H, W)).astype(np.uint8))
    for seed in range(30):
        found = set(crop_of(mask[None], mask, seed)[1].unique().tolist())
        assert found <= {0, 100, IGNORE}


def test_scale_has_the_range_asked_for() -> None:
    """The slope of the x ramp in the crop is 1 / scale."""
    image, y, _ = ramps(torch.uint16, (80, 80))
    slopes = []
    for seed in range(200):
        moved, _, _ = crop_of(image, y, seed, (32, 32), scale=(0.5, 2.0), flip=False)
        row = moved[1, 16].double() / STEP[torch.uint16]
        slopes.append(float(row[25] - row[5]) / 20)
    factors = 1 / np.array(slopes)
    assert factors.min() == pytest.approx(0.5, abs=0.03)
    assert factors.max() == pytest.approx(2, abs=0.1)
    assert np.mean(factors) == pytest.approx(1.25, abs=0.1)


def test_crops_reach_every_corner() -> None:
    image, y, _ = ramps(torch.uint8)
    tops = {int(crop_of(image, y, seed, (H - 2, W), scale=(1.0, 1.0), flip=False)[1][0, 0]) for seed in range(60)}
    assert tops == {0, 1, 2}


def test_16_bit_keeps_its_range() -> None:
    image = torch.full((3, 20, 20), 65535, dtype=torch.uint16)
    image[:, :, :10] = 0
    for seed in range(20):
        moved, _, valid = crop_of(image, None, seed)
        values = moved.to(torch.int32)[:, valid]
        assert values.max() == 65535
        assert values.min() >= 0


def test_shrinking_averages() -> None:
    """Stripes of one pixel become grey: without antialiasing half of the size would be black or white."""
    image = torch.zeros(1, 64, 64, dtype=torch.uint8)
    image[:, :, ::2] = 200
    moved, _, _ = crop_of(image, None, 0, (32, 32), scale=(0.5, 0.5), flip=False)
    inner = moved[0, 4:-4, 4:-4].double()
    assert inner.mean() == pytest.approx(100, abs=5)
    assert inner.std() < 20


def test_the_same_key_gives_the_same_crop() -> None:
    image, y, _ = ramps(torch.uint8)
    for one, other in zip(crop_of(image, y, 7), crop_of(image, y, 7), strict=True):
        np.testing.assert_array_equal(one, other)

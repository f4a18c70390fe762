"""Scores: at the masks' own sizes, one confusion matrix an image, windows and mirror images averaged."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from semiseg.data.formats import read_mask, write_mask
from semiseg.data.splits import Data, DataConfig, load_data
from semiseg.engine.evaluate import (
    Scores,
    ahead,
    evaluate,
    load_scores,
    probabilities,
    save_scores,
    window_starts,
)
from semiseg.testing import CLASSES, PALETTE, write_data
from semiseg.types import IGNORE, InferenceConfig, InputError

CPU = torch.device("cpu")
WHOLE = InferenceConfig()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Data:
    write_data(tmp_path / "data", train=4, val=5)
    return load_data(DataConfig(root=str(tmp_path / "data"), format="splits"))


class Nearest(nn.Module):
    """The class whose colour is nearest: right for most pixels of the tiny data."""

    def forward(self, image: Tensor) -> Tensor:
        colours = torch.tensor(PALETTE).view(1, len(PALETTE), 3, 1, 1)
        return -(image[:, None].float() - colours).abs().mean(2)


class Windowed(nn.Module):
    """Logits that depend on all that the window shows, and on where in the window a pixel lies."""

    def forward(self, image: Tensor) -> Tensor:
        x = image.double() / 255
        x = x - x.mean((2, 3), keepdim=True)
        place = torch.linspace(0, 1, x.shape[2]).view(-1, 1) * torch.linspace(0, 2, x.shape[3])
        return 3 * x + place * torch.tensor([1.0, -1.0, 0.5]).view(3, 1, 1)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, 3, height, width), dtype=np.uint8))


# ---- windows, scales, mirror images ------------------------------------------------------------------------------


def test_windows_of_cityscapes() -> None:
    """methods.md case 50: 1024x2048 px, crop 798, stride 532."""
    assert window_starts(1024, 798, 532 / 798) == [0, 226]
    assert window_starts(2048, 798, 532 / 798) == [0, 532, 1064, 1250]


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 1))
def test_windows_cover_every_pixel_and_stay_inside(side: int, window: int, stride: float) -> None:
    starts = window_starts(side, window, stride)
    seen = np.zeros(side, bool)
    for start in starts:
        assert start == 0 or start + window <= side
        seen[start : start + window] = True
    assert seen.all()
    assert starts == sorted(set(starts))
    if side > window:
        assert starts[-1] == side - window
        assert max(np.diff(starts)) <= max(1, round(window * stride))


def test_constant_logits_give_a_constant_map() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0]).view(1, 3, 1, 1)
    for stride in (0.3, 2 / 3, 1.0):
        config = InferenceConfig(window=(13, 17), stride=stride, flip=True)
        probs = probabilities(lambda image: logits.expand(-1, -1, *image.shape[2:]), picture(40, 31), config)
        torch.testing.assert_close(probs, logits.softmax(1).expand(1, 3, 40, 31))


def slow_windows(net: nn.Module, image: Tensor, window: tuple[int, int], stride: float) -> Tensor:
    """Pixel by pixel: the mean over the windows that see it."""
    height, width = image.shape[2:]
    probs = {}
    for top in window_starts(height, window[0], stride):
        for left in window_starts(width, window[1], stride):
            part = image[:, :, top : top + window[0], left : left + window[1]]
            probs[top, left] = net(part).softmax(1)
    result = torch.zeros(1, 3, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            seen = [
                p[0, :, y - top, x - left]
                for (top, left), p in probs.items()
                if 0 <= y - top < window[0] and 0 <= x - left < window[1]
            ]
            result[0, :, y, x] = torch.stack(seen).mean(0)
    return result


@pytest.mark.parametrize("window", [(16, 16), (9, 40), (40, 11), (7, 50)])
def test_sliding_windows_against_a_slow_version(window: tuple[int, int]) -> None:
    image = picture(20, 27)
    probs = probabilities(Windowed(), image, InferenceConfig(window=window, stride=0.6))
    torch.testing.assert_close(probs, slow_windows(Windowed(), image, window, 0.6))
    torch.testing.assert_close(probs.sum(1), torch.ones(1, 20, 27, dtype=torch.float64))


def test_an_image_that_fits_is_seen_whole() -> None:
    shapes: list[tuple[int, ...]] = []

    def net(image: Tensor) -> Tensor:
        shapes.append(tuple(image.shape))
        return image.float()

    for size in ((20, 27), (16, 16), (12, 40)):
        probabilities(net, picture(*size), InferenceConfig(window=(20, 27)))
    assert shapes[:2] == [(1, 3, 20, 27), (1, 3, 16, 16)]
    assert shapes[2:] == [(1, 3, 12, 27), (1, 3, 12, 27)]


def test_mirror_image_and_scales_against_a_slow_version() -> None:
    image = picture(20, 28)
    views = []
    for scale in (0.5, 1.0, 1.5):
        size = (round(20 * scale), round(28 * scale))
        view = image if scale == 1 else F.interpolate(image.float() / 255, size, mode="bilinear")
        if scale != 1:
            view = view * 255  # Windowed takes 0..255; the engine hands floats in 0..1
        for flip in (False, True):
            probs = Windowed()(view.flip(3) if flip else view).softmax(1)
            probs = probs.flip(3) if flip else probs
            views.append(F.interpolate(probs, (20, 28), mode="bilinear"))

    def net(x: Tensor) -> Tensor:
        result: Tensor = Windowed()(x * 255 if x.is_floating_point() else x)
        return result

    probs = probabilities(net, image, InferenceConfig(flip=True, scales=(0.5, 1.0, 1.5)))
    torch.testing.assert_close(probs, torch.stack(views).mean(0))


def test_nothing_keeps_a_graph() -> None:
    assert not probabilities(nn.Conv2d(3, 2, 1), picture(8, 8).float(), WHOLE).requires_grad


# ---- scores ------------------------------------------------------------------------------------------------------


def slow_confusion(label: np.ndarray, mask: np.ndarray) -> np.ndarray:
    matrix = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for predicted, reference in zip(label.ravel(), mask.ravel(), strict=True):
        if reference != IGNORE:
            matrix[reference, predicted] += 1
    return matrix


def masks_of(data: Data) -> Iterator[np.ndarray]:
    return (read_mask(row.mask, data.code) for row in data.val if row.mask is not None)


def test_one_confusion_matrix_an_image(data: Data) -> None:
    scores = evaluate(Nearest(), data.val, data, WHOLE, CPU)
    assert scores.confusions.shape == (5, 3, 3)
    assert scores.confusions.dtype == np.int64
    assert scores.names == tuple(f"images/val/{i}.png" for i in range(5))
    for row, mask, matrix in zip(data.val, masks_of(data), scores.confusions, strict=True):
        image = torch.from_numpy(np.array(Image.open(row.image))).permute(2, 0, 1)[None]
        np.testing.assert_array_equal(matrix, slow_confusion(Nearest()(image).argmax(1)[0].numpy(), mask))


def test_scores_come_from_all_pixels_together(data: Data) -> None:
    """Not the mean of the images' scores."""
    scores = evaluate(Nearest(), data.val, data, WHOLE, CPU)
    total = scores.confusions.sum(0)
    expected = {
        name: total[k, k] / (total[k].sum() + total[:, k].sum() - total[k, k]) for k, name in enumerate(CLASSES)
    }
    assert scores.per_class == pytest.approx(expected)
    assert scores.miou == pytest.approx(np.mean(list(expected.values())))
    assert 0.5 < scores.miou < 1
    assert scores.absent == ()


def test_an_absent_class_is_left_out_and_named(data: Data) -> None:
    """A class that the reference has not does not count as 0 where it is predicted, nor as 1 where it is not."""
    for row, mask in zip(data.val, list(masks_of(data)), strict=True):
        assert row.mask is not None
        write_mask(row.mask, np.where(mask == 2, IGNORE, mask).astype(np.uint8), PALETTE)
    scores = evaluate(Nearest(), data.val, data, WHOLE, CPU)
    assert scores.absent == ("rare",)
    assert np.isnan(scores.per_class["rare"])
    assert scores.miou == pytest.approx((scores.per_class["ground"] + scores.per_class["thing"]) / 2)


def test_perfect_and_worst(data: Data) -> None:
    for number, wanted in ((0, 1.0), (1, 0.0)):
        masks = iter([*masks_of(data)])

        class Oracle(nn.Module):
            def forward(self, image: Tensor) -> Tensor:
                mask = torch.from_numpy(next(masks)).long().clamp(max=2)  # noqa: B023
                return F.one_hot((mask + number) % 3, 3).permute(2, 0, 1)[None].double()  # noqa: B023

        assert evaluate(Oracle(), data.val, data, WHOLE, CPU).miou == wanted


@pytest.mark.parametrize("size", [(20, 24), 24, (64, 64)])
def test_scores_are_at_the_masks_own_size(data: Data, size: int | tuple[int, int]) -> None:
    """The network sees resized images; every pixel of the mask counts."""
    resized = load_data(data.config.model_copy(update={"size": size}))
    seen = []

    class Watched(Nearest):
        def forward(self, image: Tensor) -> Tensor:
            seen.append(tuple(image.shape[2:]))
            return super().forward(image)

    scores = evaluate(Watched(), resized.val, resized, WHOLE, CPU)
    assert set(seen) == {size if isinstance(size, tuple) else (20, 24)}
    pixels = [int((mask != IGNORE).sum()) for mask in masks_of(data)]
    assert scores.confusions.sum((1, 2)).tolist() == pixels
    assert scores.miou > 0.5


def test_the_masks_of_a_split_may_have_many_sizes(data: Data) -> None:
    row = data.val[0]
    assert row.mask is not None
    Image.fromarray(np.zeros((31, 57, 3), np.uint8)).save(row.image)
    write_mask(row.mask, np.zeros((31, 57), np.uint8), PALETTE)
    assert evaluate(Nearest(), data.val, data, WHOLE, CPU).confusions[0].sum() == 31 * 57


def test_a_network_is_left_as_it_was(data: Data) -> None:
    """Training mode of every part: a method may keep the batch norms of its student in eval mode."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 3, 1))

    class Floats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, image: Tensor) -> Tensor:
            assert not any(part.training for part in self.modules())
            result: Tensor = self.net(image.float())
            return result

    whole = Floats().train()
    net[1].eval()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(whole, data.val, data, WHOLE, CPU)
    assert {name: part.training for name, part in whole.named_modules()} == {
        name: name != "net.1" for name, _ in whole.named_modules()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_scores_survive_their_file(data: Data, tmp_path: Path) -> None:
    scores = evaluate(Nearest(), data.val, data, WHOLE, CPU)
    save_scores(tmp_path / "results.npz", scores)
    again = load_scores(tmp_path / "results.npz")
    assert isinstance(again, Scores)
    np.testing.assert_array_equal(again.confusions, scores.confusions)
    assert (again.names, again.classes) == (scores.names, scores.classes)
    with pytest.raises(InputError, match="finish the run"):
        load_scores(tmp_path / "none.npz")


def test_ahead_keeps_the_order_and_passes_errors_on() -> None:
    assert list(ahead(lambda i: i * i, range(50))) == [i * i for i in range(50)]
    assert list(ahead(lambda i: i, [])) == []

    def fail(i: int) -> int:
        if i == 3:
            raise InputError("3 cannot be read")
        return i

    results = ahead(fail, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="3 cannot"):
        next(results)


def test_ahead_reads_no_more_than_a_few() -> None:
    begun: list[int] = []

    def note(i: int) -> int:
        begun.append(i)
        return i

    results: Callable[[], int] = ahead(note, range(1000), depth=4).__next__
    results()
    assert len(begun) <= 4

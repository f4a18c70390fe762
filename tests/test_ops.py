"""Every operation against a slow NumPy version, and the cases that can be computed by hand."""

import colorsys
import copy
import math
from collections.abc import Callable
from functools import partial

import kornia
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics.functional.classification
import torchvision.transforms.v2.functional as tvf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from semiseg.ops import colour, ema, losses, metrics, mix, norm, pseudo, resize
from semiseg.ops.threshold import Thresholds
from semiseg.types import IGNORE, VIEW, Share

C = 4
LOSSES: dict[str, Callable[[Tensor, Tensor], Share]] = {
    "cross_entropy": losses.cross_entropy,
    "weighted": lambda z, y: losses.cross_entropy(z, y, torch.tensor([0.5, 2.0, 1.0, 0.1])),
    "ohem": lambda z, y: losses.ohem(z, y, min_kept=7),
    "dice": losses.dice,
    "masked": lambda z, y: losses.masked_cross_entropy(z, y.long(), y != 0, y != IGNORE),
    "binary": lambda z, y: losses.binary_cross_entropy(z[:, :1], 1.0, y != IGNORE),
    "squared": lambda z, y: losses.squared_difference(z, torch.full_like(z, 1 / C), y != IGNORE),
}


def batch(seed: int, ignored: float = 0.3, size: tuple[int, int] = (5, 6), classes: int = C) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(2, classes, *size))
    mask = rng.integers(0, classes, (2, *size))
    mask[rng.random(mask.shape) < ignored] = IGNORE
    return torch.from_numpy(logits), torch.from_numpy(mask.astype(np.uint8))


def uniforms(seed: int, size: int = 4) -> dict[str, Tensor]:
    table = np.random.default_rng(seed).random((size, len(VIEW)), dtype=np.float32)
    return dict(zip(VIEW, torch.from_numpy(table).unbind(1), strict=True))


def slow_softmax(logits: Tensor) -> np.ndarray:
    z: np.ndarray = logits.numpy()
    e: np.ndarray = np.exp(z - z.max(1, keepdims=True))
    total: np.ndarray = e.sum(1, keepdims=True)
    probs: np.ndarray = e / total
    return probs


def slow_pixels(logits: Tensor, mask: Tensor) -> list[tuple[int, float]]:
    """(true class, its probability) of every pixel that is not ignored."""
    probs = slow_softmax(logits)
    found = []
    for (b, y, x), k in np.ndenumerate(mask.numpy()):
        if k != IGNORE:
            found.append((int(k), float(probs[b, k, y, x])))
    return found


def value(share: Share) -> float:
    return float(share.total / share.count)


# losses


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_cross_entropy(dtype: torch.dtype) -> None:
    logits, mask = batch(0)
    share = losses.cross_entropy(logits, mask.to(dtype))
    pixels = slow_pixels(logits, mask)
    assert float(share.count) == len(pixels)
    assert share.total.item() == pytest.approx(-sum(math.log(q) for _, q in pixels), rel=1e-12)


def test_cross_entropy_with_class_weights() -> None:
    logits, mask = batch(1)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.5])
    share = losses.cross_entropy(logits, mask, weight)
    pixels = slow_pixels(logits, mask)
    assert float(share.count) == pytest.approx(sum(float(weight[k]) for k, _ in pixels))
    assert share.total.item() == pytest.approx(-sum(float(weight[k]) * math.log(q) for k, q in pixels), rel=1e-12)


def test_soft_cross_entropy_by_hand() -> None:
    """Two pixels, two of three classes: q = (.8, .2) and, of the sum that was kept, (.75, .25); and one ignored."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]], dtype=torch.float64)
    logits = p.log().T.view(1, 3, 1, 3)
    mask = torch.tensor([0, 2, IGNORE], dtype=torch.uint8).view(1, 1, 3)
    soft = torch.tensor([[204, 150, 255], [51, 50, 0], [1, 0, 255]], dtype=torch.uint8).view(1, 3, 1, 3)
    share = losses.soft_cross_entropy(logits, mask, soft)
    first = -(0.8 * math.log(0.5) + 0.2 * math.log(0.3))
    second = -(0.75 * math.log(0.3) + 0.25 * math.log(0.1))
    assert share.total.item() == pytest.approx(first + second)
    assert share.count.item() == 2
    weighted = losses.soft_cross_entropy(logits, mask, soft, torch.tensor([2.0, 1.0, 0.5]))
    assert weighted.total.item() == pytest.approx(2 * first + 0.5 * second)
    assert weighted.count.item() == 2.5


@pytest.mark.parametrize("weight", [None, torch.tensor([2.0, 1.0, 0.5])])
def test_soft_cross_entropy_of_certain_labels_is_cross_entropy(weight: Tensor | None) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 4, requires_grad=True)
    mask = torch.randint(0, 3, (2, 5, 4), dtype=torch.uint8)
    mask[0, 0] = IGNORE
    soft = torch.zeros(2, 5, 5, 4, dtype=torch.uint8)
    soft[:, 0] = 255
    soft[0, :, 0] = IGNORE
    a, b = losses.soft_cross_entropy(logits, mask, soft, weight), losses.cross_entropy(logits, mask, weight)
    assert torch.allclose(a.total, b.total)
    assert torch.equal(a.count, b.count)
    grads = [torch.autograd.grad(share.total, logits)[0] for share in (a, b)]
    assert torch.allclose(*grads, atol=1e-6)
    assert not grads[0][0, :, 0].any()
    nothing = losses.soft_cross_entropy(logits, torch.full_like(mask, IGNORE), soft, weight)
    assert nothing.total.item() == nothing.count.item() == 0
    assert nothing.total.requires_grad


@pytest.mark.parametrize(("min_kept", "expected"), [(1, 1.1513), (3, 0.8419), (5, 0.6443)])
def test_ohem_by_hand(min_kept: int, expected: float) -> None:
    true = torch.tensor([0.2, 0.5, 0.8, 0.95, 0.01])
    logits = torch.stack([true.log(), (1 - true).log()]).view(1, 2, 1, 5)
    mask = torch.tensor([[[0, 0, 0, 0, IGNORE]]])
    assert value(losses.ohem(logits, mask, 0.7, min_kept)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("min_kept", [1, 10, 30, 42, 43, 1000])
def test_ohem(min_kept: int) -> None:
    logits, mask = batch(2)
    true = sorted(q for _, q in slow_pixels(logits, mask))
    if min_kept <= len(true):
        limit = max(0.3, true[min_kept - 1])
        true = [q for q in true if q <= limit * (1 + 1e-12)]
    share = losses.ohem(logits, mask, 0.3, min_kept)
    assert float(share.count) == len(true)
    assert share.total.item() == pytest.approx(-sum(math.log(q) for q in true), rel=1e-12)


def test_ohem_keeps_ties() -> None:
    share = losses.ohem(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2).long(), threshold=0.1, min_kept=1)
    assert float(share.count) == 4


def test_dice() -> None:
    logits, mask = batch(3)
    mask[mask == 2] = IGNORE
    probs, reference = slow_softmax(logits), mask.numpy()
    scores = []
    for k in (0, 1, 3):
        overlap = probs[:, k][reference == k].sum()
        scores.append(2 * overlap / (probs[:, k][reference != IGNORE].sum() + (reference == k).sum()))
    share = losses.dice(logits, mask)
    assert float(share.count) == 1
    assert share.total.item() == pytest.approx(1 - np.mean(scores), rel=1e-12)


def test_dice_of_a_perfect_prediction_is_zero() -> None:
    _, mask = batch(4, ignored=0)
    logits = 100 * F.one_hot(mask.long(), C).movedim(3, 1).double()
    assert losses.dice(logits, mask).total.item() == pytest.approx(0, abs=1e-9)


def test_masked_cross_entropy() -> None:
    logits, mask = batch(5)
    rng = np.random.default_rng(5)
    selected, counted = (torch.from_numpy(rng.random(mask.shape) < 0.5) for _ in range(2))
    expected = slow_pixels(logits, torch.where(selected & counted, mask, IGNORE))
    share = losses.masked_cross_entropy(logits, mask.long(), selected, counted)
    assert float(share.count) == int(counted.sum())
    assert share.total.item() == pytest.approx(-sum(math.log(q) for _, q in expected), rel=1e-12)


def test_masked_cross_entropy_divides_by_all_counted_pixels() -> None:
    logits = torch.tensor([0.0, math.log(math.e**2 - 1)]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    selected = torch.tensor([[[True, False], [False, False]]])
    label, counted = torch.zeros(1, 2, 2).long(), torch.ones(1, 2, 2).bool()
    assert value(losses.masked_cross_entropy(logits, label, selected, counted)) == pytest.approx(0.5)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_binary_cross_entropy(target: float) -> None:
    logits, mask = batch(13)
    answer = logits[:, :1] * 20  # so large that the sigmoid rounds to 0 or 1
    share = losses.binary_cross_entropy(answer, target, mask != IGNORE)
    counted = [float(d) for d, k in zip(answer.flatten(), mask.flatten(), strict=True) if k != IGNORE]
    assert float(share.count) == len(counted)
    expected = sum(max(d, 0) - d * target + math.log1p(math.exp(-abs(d))) for d in counted)
    assert share.total.item() == pytest.approx(expected, rel=1e-12)


def test_binary_cross_entropy_of_no_opinion_is_ln_2() -> None:
    for target in (0.0, 1.0):
        share = losses.binary_cross_entropy(torch.zeros(2, 1, 3, 4), target, torch.ones(2, 3, 4).bool())
        assert value(share) == pytest.approx(math.log(2))


def test_squared_difference() -> None:
    logits, mask = batch(14)
    taught = torch.from_numpy(slow_softmax(batch(15)[0])).requires_grad_()
    share = losses.squared_difference(logits.requires_grad_(), taught, mask != IGNORE)
    p, q = slow_softmax(logits.detach()), taught.detach().numpy()
    counted = [i for i, k in np.ndenumerate(mask.numpy()) if k != IGNORE]
    expected = sum(float((p[b, k, y, x] - q[b, k, y, x]) ** 2) for b, y, x in counted for k in range(C))
    assert float(share.count) == len(counted)
    assert share.total.item() == pytest.approx(expected, rel=1e-12)
    torch.autograd.backward(share.total)
    assert logits.grad is not None
    assert taught.grad is None


def test_squared_difference_of_opposites_is_2() -> None:
    logits, probs = torch.tensor([99.0, -99.0]).view(1, 2, 1, 1), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    assert value(losses.squared_difference(logits, probs, torch.ones(1, 1, 1).bool())) == 2
    assert value(losses.squared_difference(logits, 1 - probs, torch.ones(1, 1, 1).bool())) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_ignored_pixels_gives_zero_with_a_graph(name: str) -> None:
    logits = batch(6)[0].requires_grad_()
    share = LOSSES[name](logits, torch.full((2, 5, 6), IGNORE))
    assert share.total.item() == 0
    assert float(share.count) == 0
    assert share.total.requires_grad
    assert not share.count.requires_grad
    torch.autograd.backward(share.total)
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_change_nothing(name: str) -> None:
    logits, mask = batch(7)
    junk = 1e3 * torch.randn(2, C, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for z, y in ((logits, mask), (torch.cat([logits, junk], 3), F.pad(mask, (0, 3), value=IGNORE))):
        z = z.clone().requires_grad_()
        share = LOSSES[name](z, y)
        torch.autograd.backward(share.total)
        assert z.grad is not None
        assert not z.grad[..., 6:].any()
        results.append((share.total.item(), float(share.count), z.grad[..., :6]))
    assert results[0][:2] == pytest.approx(results[1][:2], rel=1e-12)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_correct_gradients(name: str) -> None:
    logits, mask = batch(8, size=(2, 3))
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, mask).total, logits.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_reduced_in_float32_at_least(name: str, dtype: torch.dtype) -> None:
    logits, mask = batch(9)
    share = LOSSES[name](logits.to(dtype), mask)
    wide = torch.promote_types(dtype, torch.float32)
    assert (share.total.dtype, share.count.dtype) == (wide, wide)
    assert torch.equal(share.total, LOSSES[name](logits.to(dtype).to(wide), mask).total)


@pytest.mark.parametrize("name", ["cross_entropy", "ohem", "dice"])
def test_a_single_class_is_always_right(name: str) -> None:
    logits, mask = batch(10, classes=1)
    assert LOSSES[name](logits, mask).total.item() == 0


def test_losses_run_in_deterministic_mode() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for loss in LOSSES.values():
            logits, mask = batch(11)
            torch.autograd.backward(loss(logits.requires_grad_(), mask).total)
        metrics.confusion(batch(11)[1], batch(12)[1], IGNORE)
    finally:
        torch.use_deterministic_algorithms(False)


def test_class_weights_by_hand() -> None:
    counts = torch.tensor([100, 25, 0, 4])
    torch.testing.assert_close(losses.class_weights(counts), torch.tensor([0.375, 0.75, 0, 1.875]))
    assert not losses.class_weights(torch.zeros(3, dtype=torch.int64)).any()


# pseudo-labels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_pseudo_label(dtype: torch.dtype) -> None:
    logits = batch(20)[0].to(dtype)
    probs = slow_softmax(logits.double())
    label, confidence = pseudo.pseudo_label(logits.requires_grad_())
    assert (label.dtype, confidence.dtype) == (torch.int64, torch.promote_types(dtype, torch.float32))
    np.testing.assert_array_equal(label.numpy(), probs.argmax(1))
    np.testing.assert_allclose(confidence.numpy(), probs.max(1), rtol=1e-5)
    assert not confidence.requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_one_hot(dtype: torch.dtype, smoothing: float) -> None:
    mask = batch(21)[1].to(dtype)
    probs = pseudo.one_hot(mask, C, smoothing, torch.float64)
    assert (probs.shape, probs.dtype) == ((2, C, 5, 6), torch.float64)
    for (b, y, x), k in np.ndenumerate(mask.numpy()):
        own = [1 - smoothing if c == k else smoothing / (C - 1) for c in range(C)]
        assert probs[b, :, y, x].tolist() == pytest.approx([0.0] * C if k == IGNORE else own, rel=1e-15)
    assert pseudo.one_hot(mask, C, smoothing).dtype == torch.float32


def test_one_hot_of_a_single_class() -> None:
    mask = torch.tensor([[[0, IGNORE]]])
    assert pseudo.one_hot(mask, 1).tolist() == [[[[1, 0]]]]
    assert pseudo.one_hot(mask, 1, 0.2)[0, 0, 0].tolist() == pytest.approx([0.8, 0])


# mixing


def slow_box(u: dict[str, float], size: tuple[int, int], area: tuple[float, float], probability: float) -> np.ndarray:
    box = np.zeros(size, dtype=bool)
    if u["mix"] < probability:
        share = area[0] + (area[1] - area[0]) * u["area"]
        side_y = share ** u["ratio"]
        h, w = round(side_y * size[0]), round(share / side_y * size[1])
        top, left = int(u["top"] * (size[0] - h + 1)), int(u["left"] * (size[1] - w + 1))
        box[top : top + h, left : left + w] = True
    return box


@pytest.mark.parametrize("size", [(8, 8), (13, 40), (128, 160)])
@pytest.mark.parametrize("area", [(0.02, 0.4), (0.25, 0.5), (1.0, 1.0)])
def test_cutmix_box(size: tuple[int, int], area: tuple[float, float]) -> None:
    u = uniforms(30, 64)
    boxes = mix.cutmix_box(u, size, area, 0.5)
    assert boxes.shape == (64, *size)
    for i, box in enumerate(boxes):
        np.testing.assert_array_equal(box.numpy(), slow_box({k: float(v[i]) for k, v in u.items()}, size, area, 0.5))


LAST = 1 - 2**-24  # the largest uniform number in float32
uniform = st.floats(0, LAST, width=32)


@settings(max_examples=100, deadline=None)
@given(
    u=st.fixed_dictionaries(dict.fromkeys(VIEW, uniform)),
    size=st.tuples(st.integers(1, 1100), st.integers(1, 50)),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
)
def test_every_box_fits_and_has_its_area(u: dict[str, float], size: tuple[int, int], low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    box = mix.cutmix_box({k: torch.tensor([v]) for k, v in u.items()}, size, (low, high), 1.0)[0]
    h, w = int(box.any(1).sum()), int(box.any(0).sum())
    assert int(box.sum()) == h * w
    wanted = (low + (high - low) * u["area"]) * size[0] * size[1]
    assert abs(h * w - wanted) <= (size[0] + size[1]) / 2 + 1


def test_the_last_position_is_inside() -> None:
    u = {name: torch.tensor([LAST]) for name in VIEW} | {"mix": torch.tensor([0.0]), "ratio": torch.tensor([0.5])}
    for side in range(1, 1100):
        box = mix.cutmix_box(u, (side, 4), (0.25, 0.25), 1.0)
        assert int(box.sum()) == 2 * round(side / 2)


def test_half_boxes_stay_within_a_row_of_half_the_area() -> None:
    areas = mix.cutmix_box(uniforms(31, 500), (8, 8), (0.5, 0.5), 1.0).sum((1, 2))
    assert int((areas - 32).abs().max()) <= 8


def test_box_probability() -> None:
    u = uniforms(32, 200)
    for probability in (0.0, 0.3, 1.0):
        drawn = mix.cutmix_box(u, (8, 8), (0.5, 0.5), probability).any(2).any(1)
        assert torch.equal(drawn, u["mix"] < probability)


def test_mix() -> None:
    u = uniforms(33)
    box = mix.cutmix_box(u, (6, 7), (0.3, 0.6), 0.8)
    partner = torch.tensor([2, 0, 3, 1])
    shapes = ((4, 3, 6, 7), (4, 6, 7), (4, 6, 7), (4, 6, 7))
    image, label, confidence, valid = (torch.rand(s, generator=torch.Generator().manual_seed(0)) for s in shapes)
    tensors = (image, (9 * label).long(), confidence, valid < 0.5)
    mixed = mix.mix(box, partner, *tensors)
    for old, new in zip(tensors, mixed, strict=True):
        assert new.dtype == old.dtype
        for (b, y, x), inside in np.ndenumerate(box.numpy()):
            assert torch.equal(new[b, ..., y, x], old[partner[b] if inside else b, ..., y, x])


def test_an_empty_box_mixes_nothing() -> None:
    image = torch.rand(3, 2, 4, 4)
    (mixed,) = mix.mix(torch.zeros(3, 4, 4).bool(), torch.tensor([1, 2, 0]), image)
    assert torch.equal(mixed, image)


def test_padding_of_the_partner_stays_invalid() -> None:
    valid = torch.ones(2, 4, 4).bool()
    valid[1, :, 2:] = False
    box = torch.zeros(2, 4, 4).bool()
    box[0, 1:3, 1:4] = True
    (mixed,) = mix.mix(box, torch.tensor([1, 0]), valid)
    assert torch.equal(~mixed[0], box[0] & ~valid[1])


def slow_half(u: dict[str, float], size: tuple[int, int], probability: float) -> np.ndarray:
    box = np.zeros(size, dtype=bool)
    if u["mix"] < probability:
        widths = [w for w in range(size[1]) if w > size[1] // 2]
        w = widths[int(u["ratio"] * len(widths))]
        h = round(size[0] * size[1] / 2 / w)
        top, left = int(u["top"] * (size[0] - h + 1)), int(u["left"] * (size[1] - w + 1))
        box[top : top + h, left : left + w] = True
    return box


@pytest.mark.parametrize("size", [(3, 3), (8, 8), (13, 40), (128, 161)])
def test_half_box(size: tuple[int, int]) -> None:
    u = uniforms(34, 64)
    boxes = mix.half_box(u, size, 0.5)
    assert boxes.shape == (64, *size)
    for i, box in enumerate(boxes):
        np.testing.assert_array_equal(box.numpy(), slow_half({k: float(v[i]) for k, v in u.items()}, size, 0.5))


def test_half_boxes_by_hand() -> None:
    u = uniforms(35, 600) | {"ratio": (torch.arange(600) + 0.5) / 600}
    boxes = mix.half_box(u, (8, 8), 1.0)
    sides = [(int(box.any(0).sum()), int(box.any(1).sum())) for box in boxes]
    assert {side: sides.count(side) for side in sides} == {(5, 6): 200, (6, 5): 200, (7, 5): 200}
    assert int((boxes.sum((1, 2)) - 32).abs().max()) <= 8


def test_half_boxes_fit_at_both_ends_of_chance() -> None:
    for number in (0.0, LAST):
        u = {name: torch.tensor([number]) for name in VIEW} | {"mix": torch.tensor([0.0])}
        for side in range(3, 1100):
            (box,) = mix.half_box(u, (9, side), 1.0)
            h, w = int(box.any(1).sum()), int(box.any(0).sum())
            assert w == (side // 2 + 1 if number == 0 else side - 1)
            assert int(box.sum()) == h * w
            assert abs(h * w - 9 * side / 2) <= w / 2


def labels(seed: int, size: int, classes: int = 6) -> Tensor:
    label = torch.randint(0, classes, (size, 6, 7), generator=torch.Generator().manual_seed(seed))
    for i in range(size):
        label[i][label[i] == i % classes] = IGNORE
    label[0], label[1] = IGNORE, classes - 1
    return label


def test_class_region_is_half_the_classes() -> None:
    label, u = labels(36, 40), uniforms(36, 40)
    regions = mix.class_region(u, label, 6, 0.7)
    assert regions.shape == label.shape
    assert not regions[0].any()
    for i in range(40):
        there = set(label[i].flatten().tolist()) - {IGNORE}
        chosen = set(label[i][regions[i]].tolist())
        assert chosen <= there
        assert len(chosen) == ((len(there) + 1) // 2 if u["mix"][i] < 0.7 else 0)
        assert torch.equal(regions[i], torch.isin(label[i], torch.tensor(sorted(chosen))))
        alone = mix.class_region({k: v[i : i + 1] for k, v in u.items()}, label[i : i + 1], 6, 0.7)
        assert torch.equal(alone[0], regions[i])


def test_class_region_chooses_evenly() -> None:
    u = uniforms(37, 6000)
    regions = mix.class_region(u, torch.arange(4).view(1, 2, 2).expand(6000, -1, -1), 4, 1.0).flatten(1)
    pairs, counts = regions.unique(dim=0, return_counts=True)
    assert pairs.sum(1).tolist() == [2] * 6
    assert counts.tolist() == [pytest.approx(1000, abs=120)] * 6  # 4 standard deviations
    for low in (u["top"], u["left"]):  # whatever the numbers from which it is drawn
        shares = regions[low < 0.1].double().mean(0)
        assert shares.tolist() == [pytest.approx(0.5, abs=0.09)] * 4


# colour


def picture(seed: int, size: int = 4, channels: int = 3) -> Tensor:
    values = np.random.default_rng(seed).integers(0, 9, (size, channels, 20, 24))  # few levels: greys and ties occur
    return torch.from_numpy(values / 8).float()


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers).view(-1, 1, 1, 1)


def slow_hue(image: Tensor, shift: float) -> np.ndarray:
    result = image.numpy().copy()
    for y, x in np.ndindex(*image.shape[1:]):
        h, s, v = colorsys.rgb_to_hsv(*(float(c) for c in image[:, y, x]))
        result[:, y, x] = colorsys.hsv_to_rgb((h + shift) % 1, s, v)
    return result


def test_hue() -> None:
    image, shift = picture(40), column(-0.25, 0, 0.1, 0.5)
    result = colour.adjust_hue(image, shift)
    for i in range(4):
        np.testing.assert_allclose(result[i].numpy(), slow_hue(image[i], float(shift[i])), atol=2e-6)
    torch.testing.assert_close(
        result, kornia.enhance.adjust_hue(image, 2 * math.pi * shift.flatten()), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(result[2], tvf.adjust_hue(image[2], 0.1), atol=1e-5, rtol=0)


def test_brightness_contrast_saturation_and_grey() -> None:
    image, factor = picture(41), column(0.5, 0.8, 1, 1.5)
    flat = factor.flatten()
    bright, contrast, saturation = (
        change(image, factor) for change in (colour.adjust_brightness, colour.adjust_contrast, colour.adjust_saturation)
    )
    close = partial(torch.testing.assert_close, atol=1e-6, rtol=0)
    close(bright, kornia.enhance.adjust_brightness_accumulative(image, flat))
    expected = kornia.enhance.adjust_contrast_with_mean_subtraction(image, flat)
    close(contrast, expected)
    expected = kornia.enhance.adjust_saturation_with_gray_subtraction(image, flat)
    close(saturation, expected)
    close(colour.grey(image), kornia.color.rgb_to_grayscale(image))
    for i, f in enumerate(flat.tolist()):
        close = partial(torch.testing.assert_close, atol=1e-3, rtol=0)  # torchvision's shares of grey add up to 0.9999
        close(bright[i], tvf.adjust_brightness(image[i], f))
        close(contrast[i], tvf.adjust_contrast(image[i], f))
        close(saturation[i], tvf.adjust_saturation(image[i], f))


def test_contrast_and_saturation_slowly() -> None:
    image = picture(42, 1)
    pixels = image[0].numpy().astype(np.float64)
    luma = np.tensordot(colour.LUMA, pixels, 1)
    for factor in (0.5, 1.5):
        contrast = np.clip(luma.mean() + factor * (pixels - luma.mean()), 0, 1)
        saturation = np.clip(luma + factor * (pixels - luma), 0, 1)
        np.testing.assert_allclose(colour.adjust_contrast(image, column(factor))[0].numpy(), contrast, atol=1e-6)
        np.testing.assert_allclose(colour.adjust_saturation(image, column(factor))[0].numpy(), saturation, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_blur(channels: int) -> None:
    image, sigma = picture(43, 2, channels), (0.7, 1.6)
    result = colour.blur(image, torch.tensor(sigma), torch.tensor([True, True]), 2.0)
    distance = np.arange(-6, 7)
    for i, s in enumerate(sigma):
        kernel = np.exp(-0.5 * (distance / s) ** 2)
        kernel /= kernel.sum()
        for k in range(channels):
            padded = np.pad(image[i, k].numpy().astype(np.float64), 6, mode="edge")
            across = np.apply_along_axis(np.convolve, 1, padded, kernel, "valid")
            expected = np.apply_along_axis(np.convolve, 0, across, kernel, "valid")
            np.testing.assert_allclose(result[i, k].numpy(), expected, atol=1e-6)


def test_blur_off_is_exact_and_small_images_work() -> None:
    image, sigma = picture(44), torch.full((4,), 1.5)
    on = torch.tensor([True, False, False, True])
    result = colour.blur(image, sigma, on, 2.0)
    assert torch.equal((result != image).flatten(1).any(1), on)
    constant = torch.full((1, 3, 1, 2), 0.25)
    torch.testing.assert_close(colour.blur(constant, sigma[:1], on[:1], 2.0), constant)


def test_strong_is_its_parts_in_order() -> None:
    image, u = picture(45), uniforms(45)
    u["jitter"], u["grey"], u["blur"] = (
        torch.tensor(v) for v in ([0.1, 0.9, 0.7, 0.3], [0.5] * 4, [0.4, 0.4, 0.6, 0.6])
    )
    u["grey"][3] = 0.1
    result = colour.strong(image, u)
    for i in range(4):
        expected = image[i : i + 1]
        if i != 1:
            steps = zip(
                (colour.adjust_brightness, colour.adjust_contrast, colour.adjust_saturation),
                ("brightness", "contrast", "saturation"),
                strict=True,
            )
            for change, name in steps:
                expected = change(expected, column(1 + 0.5 * (2 * float(u[name][i]) - 1)))
            expected = colour.adjust_hue(expected, column(0.25 * (2 * float(u["hue"][i]) - 1)))
        if i == 3:
            expected = colour.grey(expected).expand(1, 3, -1, -1)
        if i < 2:
            expected = colour.blur(expected, 0.1 + 1.9 * u["sigma"][i : i + 1], torch.tensor([True]), 2.0)
        torch.testing.assert_close(result[i : i + 1], expected, atol=2e-6, rtol=0)


def test_strong_without_any_change() -> None:
    image = picture(46)
    result = colour.strong(image, uniforms(46), jitter_probability=0, grey_probability=0, blur_probability=0)
    torch.testing.assert_close(result, image, atol=1e-6, rtol=0)


def test_strong_stays_in_range_and_treats_samples_apart() -> None:
    image, u = torch.rand(8, 3, 64, 80, generator=torch.Generator().manual_seed(0)), uniforms(47, 8)
    before = image.clone()
    result = colour.strong(image, u)
    assert torch.equal(image, before)
    assert 0 <= float(result.min()) <= float(result.max()) <= 1 + 1e-6
    for i in range(8):
        alone = colour.strong(image[i : i + 1], {name: values[i : i + 1] for name, values in u.items()})
        assert torch.equal(alone[0], result[i])


def test_contrast_does_not_depend_on_the_batch_with_threads() -> None:
    image, factor = torch.rand(8, 3, 320, 320, generator=torch.Generator().manual_seed(2)), column(*[0.0] * 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = [colour.adjust_contrast(one, f) for one, f in zip(image.split(1), factor.split(1), strict=True)]
        assert torch.equal(torch.cat(alone), colour.adjust_contrast(image, factor))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_are_only_blurred(channels: int) -> None:
    image, u = picture(48, channels=channels), uniforms(48)
    expected = colour.blur(image, 0.1 + 1.9 * u["sigma"], u["blur"] < 0.5, 2.0)
    torch.testing.assert_close(colour.strong(image, u), expected, atol=1e-7, rtol=0)


def test_to_float() -> None:
    kinds = (torch.uint8, 255), (torch.uint16, 65535), (torch.bfloat16, 1.0), (torch.float64, 1.0)
    for dtype, white in kinds:
        result = colour.to_float(torch.tensor([0, white], dtype=dtype))
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert result.tolist() == [0, 1]


# the teacher


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5))


@pytest.mark.parametrize(("step", "decay"), [(0, 0.0), (1, 0.5), (9, 0.9), (99, 0.99), (100, 0.99), (10**6, 0.99)])
def test_ema_decay(step: int, decay: float) -> None:
    teacher, student = (nn.Linear(1, 1, bias=False).double() for _ in range(2))
    nn.init.constant_(teacher.weight, 2)
    nn.init.constant_(student.weight, 4)
    ema.ema_update(teacher, student, step, 0.99)
    assert teacher.weight.item() == pytest.approx(2 * decay + 4 * (1 - decay), rel=1e-12)
    assert student.weight.item() == 4


def test_ema_averages_float_buffers_and_copies_the_others() -> None:
    student = net()
    teacher = ema.make_teacher(student)
    before = copy.deepcopy(teacher.state_dict())
    for _ in range(29):
        student(torch.rand(2, 2, 4, 4))
    ema.ema_update(teacher, student, 10**6, 0.996)
    for name, new in student.state_dict().items():
        expected = 0.996 * before[name] + 0.004 * new if new.is_floating_point() else new
        torch.testing.assert_close(teacher.state_dict()[name], expected)
    assert int(teacher.state_dict()["1.num_batches_tracked"]) == 29


def test_the_first_update_copies_exactly() -> None:
    student = net()
    teacher = ema.make_teacher(student)
    student(torch.rand(2, 2, 4, 4))
    ema.ema_update(teacher, student, 0, 0.99)
    for new, old in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
        assert torch.equal(new, old)


def test_the_teacher_shares_nothing_with_the_student() -> None:
    student = net()
    teacher = ema.make_teacher(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert student.training
    assert not any(m.training for m in teacher.modules())
    before = copy.deepcopy(teacher.state_dict())
    student(torch.rand(2, 2, 4, 4)).sum().backward()
    torch.optim.SGD(student.parameters(), lr=1).step()
    for name, tensor in teacher.state_dict().items():
        assert tensor.data_ptr() != student.state_dict()[name].data_ptr()
        assert torch.equal(tensor, before[name])


def test_pseudo_labels_leave_the_teacher_and_chance_alone() -> None:
    teacher = ema.make_teacher(net())
    before, chance = copy.deepcopy(teacher.state_dict()), torch.get_rng_state()
    image = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    first, second = (pseudo.pseudo_label(teacher(image)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(chance, torch.get_rng_state())
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])


# sizes


def slow_resize(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    out = np.empty(size)
    for i, j in np.ndindex(*size):
        at = [max((k + 0.5) * old / new - 0.5, 0) for k, old, new in zip((i, j), x.shape, size, strict=True)]
        (y, x0), (dy, dx) = (int(a) for a in at), (a - int(a) for a in at)
        y1, x1 = min(y + 1, x.shape[0] - 1), min(x0 + 1, x.shape[1] - 1)
        upper = (1 - dx) * x[y, x0] + dx * x[y, x1]
        out[i, j] = (1 - dy) * upper + dy * ((1 - dx) * x[y1, x0] + dx * x[y1, x1])
    return out


@pytest.mark.parametrize("size", [(10, 12), (7, 9), (3, 2), (1, 1), (5, 13)])
def test_resize(size: tuple[int, int]) -> None:
    x = batch(60)[0]
    result = resize.resize(x, size)
    for b, c in np.ndindex(2, C):
        np.testing.assert_allclose(result[b, c].numpy(), slow_resize(x[b, c].numpy(), size), atol=1e-12)


def test_the_same_size_is_the_same_tensor() -> None:
    logits, _ = batch(62)
    assert resize.resize(logits, (5, 6)) is logits


# metrics


def test_iou_by_hand() -> None:
    mask = torch.tensor([[0, 0, 1, 1, IGNORE, 2]])
    matrix = metrics.confusion(torch.tensor([[0, 1, 1, 1, 2, 0]]), mask, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert metrics.iou(matrix).tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert float(metrics.miou(matrix)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("seed", range(3))
def test_confusion(seed: int) -> None:
    logits, mask = batch(70 + seed)
    label = logits.argmax(1)
    expected = np.zeros((C, C), dtype=np.int64)
    for k, predicted in zip(mask.flatten().tolist(), label.flatten().tolist(), strict=True):
        if k != IGNORE:
            expected[k, predicted] += 1
    matrix = metrics.confusion(label, mask, C)
    assert matrix.dtype == torch.int64
    np.testing.assert_array_equal(matrix.numpy(), expected)
    assert torch.equal(metrics.confusion(label.to(torch.uint8), mask.long(), C), matrix)
    theirs = torchmetrics.functional.classification.multiclass_jaccard_index(
        label, mask.long(), C, average="none", ignore_index=IGNORE
    )
    torch.testing.assert_close(metrics.iou(matrix), theirs.double(), atol=1e-6, rtol=0)


def test_a_class_absent_from_the_reference_is_left_out() -> None:
    matrix = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 2, 2]])
    assert metrics.iou(matrix).tolist() == pytest.approx([3 / 4, math.nan, 1 / 2], nan_ok=True)
    assert float(metrics.miou(matrix)) == pytest.approx(5 / 8)
    assert math.isnan(float(metrics.miou(torch.zeros(3, 3, dtype=torch.int64))))


def test_iou_of_many_matrices() -> None:
    stack = torch.stack([metrics.confusion(batch(s)[0].argmax(1), batch(s)[1], C) for s in range(3)])
    torch.testing.assert_close(metrics.iou(stack), torch.stack([metrics.iou(m) for m in stack]), equal_nan=True)
    torch.testing.assert_close(metrics.miou(stack), torch.stack([metrics.miou(m) for m in stack]), equal_nan=True)


def test_ignored_reference_gives_an_empty_matrix() -> None:
    assert not metrics.confusion(torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), IGNORE), 3).any()


def test_weights_of_images() -> None:
    """An image that counts twice is as if it were there twice; one that counts nothing as if it were not."""
    logits, mask = batch(90)
    double = losses.cross_entropy(torch.cat([logits, logits[:1]]), torch.cat([mask, mask[:1]]))
    found = losses.cross_entropy(logits, mask, of_image=torch.tensor([2.0, 1.0]))
    torch.testing.assert_close((found.total, found.count), (double.total, double.count))
    weight = torch.tensor([0.5, 2.0, 1.0, 0.1])
    soft = torch.cat(
        [torch.full_like(mask, 200)[:, None], torch.full_like(mask, 55)[:, None], (mask[:, None] + 1) % C], 1
    )
    for loss in (
        losses.cross_entropy,
        lambda z, y, w, i: losses.soft_cross_entropy(z, y, soft[: len(z)], w, i),
    ):
        one, alone = loss(logits, mask, weight, torch.tensor([1.0, 0.0])), loss(logits[:1], mask[:1], weight, None)
        torch.testing.assert_close((one.total, one.count), (alone.total, alone.count))


# ---- thresholds ------------------------------------------------------------------------------------------------------


def test_thresholds_by_hand() -> None:
    """Four valid pixels: two of class 0 with 0.9 and 0.7, two of class 1 with 0.5 and 0.3; class 2 is never seen."""
    label = torch.tensor([[[0, 0, 1, 1, 2]]])
    confidence = torch.tensor([[[0.9, 0.7, 0.5, 0.3, 0.99]]])
    valid = torch.tensor([[[True, True, True, True, False]]])
    follows = Thresholds(3, None, class_wise=True, decay=0.9)
    counts = follows.counts(label, confidence, valid, 3)
    torch.testing.assert_close(counts, torch.tensor([[1.6, 2], [0.8, 2], [0, 0]], dtype=torch.float64))
    follows.update(counts, 0)
    assert follows.level.item() == pytest.approx(0.6)
    assert follows.sure.tolist() == pytest.approx([0.8, 0.4, 1 / 3])
    assert follows.of_classes().tolist() == pytest.approx([0.6, 0.3, 0.25])
    follows.update(follows.counts(label[..., :1], confidence[..., :1], valid[..., :1], 3), 1)  # d = 1/2
    assert follows.level.item() == pytest.approx((0.6 + 0.9) / 2)
    assert follows.sure.tolist() == pytest.approx([(0.8 + 0.9) / 2, 0.4, 1 / 3])
    follows.update(torch.zeros(3, 2, dtype=torch.float64), 2)
    assert follows.level.item() == pytest.approx(0.75), "a batch of padding changes nothing"


def test_thresholds_of_fixed_height_and_of_all_classes_alike() -> None:
    fixed, alike = Thresholds(2, 0.95, class_wise=True, decay=0.9), Thresholds(2, None, class_wise=False, decay=0.9)
    for one in (fixed, alike):
        one.update(torch.tensor([[8.0, 10.0], [4.0, 10.0]], dtype=torch.float64), 0)
    assert fixed.of_classes().tolist() == pytest.approx([0.95, 0.475])
    assert alike.of_classes().tolist() == pytest.approx([0.6, 0.6])


@given(st.integers(0, 10_000))
def test_threshold_counts_are_sums_over_pixels(seed: int) -> None:
    logits, mask = batch(seed)
    label, confidence = pseudo.pseudo_label(logits)
    valid = mask != IGNORE
    found = Thresholds.counts(label, confidence, valid, C).numpy()
    for c in range(C):
        mine = confidence.numpy()[(label.numpy() == c) & valid.numpy()]
        np.testing.assert_allclose(found[c], [mine.sum(), len(mine)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_device() -> None:
    logits, mask = (t.cuda() for t in batch(80))
    image, u = picture(80, 2).cuda(), {name: values.cuda() for name, values in uniforms(80, 2).items()}
    partner, weight, student = torch.tensor([1, 0]).cuda(), torch.ones(C).cuda(), net().cuda()
    teacher = ema.make_teacher(student)
    logits.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        label, confidence = pseudo.pseudo_label(logits)
        terms = [
            losses.cross_entropy(logits, mask),
            losses.cross_entropy(logits, mask, weight),
            losses.ohem(logits, mask),
            losses.dice(logits, mask),
            losses.masked_cross_entropy(logits, label, confidence > 0.5, mask != IGNORE),
            losses.binary_cross_entropy(logits[:, :1], 1.0, mask != IGNORE),
        ]
        pseudo.one_hot(mask, C, 0.1)
        torch.autograd.backward([term.total for term in terms])
        losses.class_weights(partner)
        box = mix.cutmix_box(u, (20, 24), (0.2, 0.5), 0.5)
        mix.mix(box, partner, colour.strong(colour.to_float(image), u), box)
        ema.ema_update(teacher, student, 3, 0.99)
        resize.resize(logits, (9, 9))
        metrics.miou(metrics.confusion(label, mask, C))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kept_statistics() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.BatchNorm2d(4, momentum=None))
    image = torch.rand(2, 3, 5, 5)
    expected = copy.deepcopy(net)(image)
    before = [buffer.clone() for buffer in net.buffers() if buffer.is_floating_point()]
    with norm.kept_statistics(net):
        torch.testing.assert_close(net(image), expected)  # still normalised by the batch
    after = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert [module.momentum for module in net[1:]] == [0.3, None]
    net(image)
    assert not torch.equal(after[0], before[0])

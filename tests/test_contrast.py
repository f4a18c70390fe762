"""U2PL's operations: the split by entropy, the queues and the contrastive loss, each against a slow NumPy version."""

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from semiseg.ops.bank import Bank
from semiseg.ops.contrast import at, candidates, class_sums, contrast, draw_anchors, draw_keys
from semiseg.ops.partition import BINS, entropy, histogram, quantile, threshold
from semiseg.types import IGNORE

LAST = 1 - 2**-24  # the largest uniform number in float32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the split -------------------------------------------------------------------------------------------------------


def nats_of(seed: int, certainty: float, classes: int = 21, size: int = 64) -> Tensor:
    """(4, size, size) entropies of predictions whose first class leads by about `certainty` nats."""
    logits = torch.randn(4, classes, size, size, generator=generator(seed))
    logits[:, 0] += certainty
    return entropy(logits.softmax(1))


def by_histogram(nats: Tensor, valid: Tensor, share: float, classes: int = 21) -> Tensor:
    return threshold(histogram(nats, valid, classes), share, classes)


def everywhere(nats: Tensor) -> Tensor:
    return torch.ones_like(nats, dtype=torch.bool)


def test_entropies_and_limits_by_hand() -> None:
    rows = [[1, 0, 0], [0.9, 0.1, 0], [0.8, 0.1, 0.1], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]]
    nats = entropy(torch.tensor(rows, dtype=torch.float64).T.view(1, 3, 1, 5))
    assert nats.flatten().tolist() == pytest.approx([0, 0.3251, 0.6390, 0.6931, 1.0986], abs=5e-5)
    limit = quantile(nats, everywhere(nats), 0.8)
    assert float(limit) == pytest.approx(0.7742, abs=5e-5)
    assert (nats >= limit).flatten().tolist() == [False] * 4 + [True]
    assert float(quantile(nats, everywhere(nats), 0.2)) == pytest.approx(0.2601, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0, 0.001, 0.2, 0.5, 0.8, 0.9975, 1])
def test_quantile_is_numpys_percentile(share: float, dtype: torch.dtype) -> None:
    for seed in range(5):
        nats = torch.rand(3, 17, 19, generator=generator(seed)).to(dtype)
        valid = torch.rand(3, 17, 19, generator=generator(seed + 100)) < 0.7
        expected = np.percentile(nats[valid].numpy(), 100 * share)
        assert float(quantile(nats, valid, share)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("limit", [quantile, by_histogram])
def test_one_limit_for_the_whole_batch(limit: Any) -> None:
    nats = torch.stack([torch.linspace(0.01, 0.1, 16), torch.linspace(0.9, 1, 16)]).view(2, 4, 4)
    valid = everywhere(nats)
    assert (nats < limit(nats, valid, 0.5)).sum((1, 2)).tolist() == [16, 0]
    for image in range(2):
        assert int((nats[image] < limit(nats[image], valid[image], 0.5)).sum()) == 8


CERTAINTIES = {"unsure": 0.0, "typical": 5.0, "sure": 12.0, "entropies of 1e-6": 20.0}


@pytest.mark.parametrize("certainty", CERTAINTIES.values(), ids=CERTAINTIES)
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8, 0.9, 0.9975])
def test_the_histogram_knows_the_limit(share: float, certainty: float) -> None:
    nats = nats_of(0, certainty)
    valid = torch.rand(nats.shape, generator=generator(1)) < 0.8
    limit = by_histogram(nats, valid, share)
    assert float(limit) == pytest.approx(float(quantile(nats, valid, share)), rel=0.005)
    selected = ((nats < limit) & valid).sum() / valid.sum()
    assert float(selected) == pytest.approx(share, abs=0.001)


def test_the_surest_predictions_of_these_tests_have_entropies_of_1e_6() -> None:
    assert float(nats_of(0, CERTAINTIES["entropies of 1e-6"]).median()) == pytest.approx(1e-6, rel=0.5)


@pytest.mark.parametrize("limit", [quantile, by_histogram])
def test_without_a_valid_pixel_nothing_lies_on_either_side(limit: Any) -> None:
    nats = nats_of(2, 3.0)
    for share in (0, 0.8, 1):
        found = limit(nats, ~everywhere(nats), share)
        assert found.isnan()
        assert not (nats < found).any()
        assert not (nats >= found).any()


@pytest.mark.parametrize("limit", [quantile, by_histogram])
def test_invalid_pixels_change_no_limit(limit: Any) -> None:
    nats = nats_of(3, 3.0)
    valid = torch.rand(nats.shape, generator=generator(3)) < 0.5
    for junk in (0.0, 2.0, 99.0):
        assert torch.equal(limit(nats.masked_fill(~valid, junk), valid, 0.8), limit(nats, valid, 0.8))


def test_histograms_are_added_up() -> None:
    nats = nats_of(4, 3.0)
    valid = torch.rand(nats.shape, generator=generator(4)) < 0.5
    whole = histogram(nats, valid, 21)
    halves = [histogram(n, v, 21) for n, v in zip(nats.split(2), valid.split(2), strict=True)]
    assert torch.equal(whole, halves[0] + halves[1])
    assert (whole.shape, whole.dtype) == ((BINS,), torch.float64)
    assert float(whole.sum()) == int(valid.sum())


def test_the_ends_of_the_histogram() -> None:
    nats = torch.tensor([[[0.0, 1e-30, math.log(21), math.log(21) * (1 + 1e-6)]]])
    counts = histogram(nats, everywhere(nats), 21)
    assert (float(counts[0]), float(counts[-1])) == (2, 2)


# ---- queues ----------------------------------------------------------------------------------------------------------


def keys_of(bank: Bank, k: int) -> list[float]:
    """The first number of every key of class k, the oldest first."""
    fill, place, capacity, first = (int(t[k]) for t in (bank.fill, bank.next, bank.capacity, bank.first))
    kept: list[float] = bank.keys[first : first + capacity, 0].tolist()
    return kept[place:] + kept[:place] if fill == capacity else kept[:fill]


def push(bank: Bank, *numbers: int) -> None:
    bank.push(torch.tensor(numbers, dtype=torch.float32).view(1, -1, 1), torch.ones(1, len(numbers)).bool())


def test_the_queue_by_hand() -> None:
    bank = Bank([4], 1)
    push(bank, 1, 2, 3)
    assert (keys_of(bank, 0), bank.fill.tolist()) == ([1, 2, 3], [3])
    push(bank, 4, 5, 6)
    assert (keys_of(bank, 0), bank.fill.tolist(), bank.next.tolist()) == ([3, 4, 5, 6], [4], [2])
    push(bank, *range(7, 18))
    assert (keys_of(bank, 0), bank.fill.tolist()) == ([14, 15, 16, 17], [4])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("capacities", [[3, 7, 5], [1, 1], [20, 2, 11, 4]])
def test_queues_are_first_in_first_out(capacities: list[int], share: float) -> None:
    rng, bank = np.random.default_rng(len(capacities)), Bank(capacities, 2)
    queues = [deque[float]([], capacity) for capacity in capacities]
    for _ in range(40):
        shape = len(capacities), int(rng.integers(1, 15))
        numbers, good = rng.integers(1, 2048, shape), rng.random(shape) < share
        keys = torch.from_numpy(numbers).float().unsqueeze(2).expand(-1, -1, 2)
        bank.push(keys, torch.from_numpy(good))
        for k, queue in enumerate(queues):
            queue.extend(float(n) for n, kept in zip(numbers[k], good[k], strict=True) if kept)
            assert keys_of(bank, k) == list(queue)
        assert bank.fill.tolist() == [len(queue) for queue in queues]
    assert torch.equal(bank.keys[:, 0], bank.keys[:, 1])


def test_keys_are_kept_in_half_precision() -> None:
    bank = Bank([300, 200, 200], 64)
    assert bank.keys.dtype == torch.float16
    stored = sum(tensor.nbytes for tensor in bank.state_dict().values())
    assert stored <= 700 * 64 * 4 / 2 + 100
    keys = torch.nn.functional.normalize(torch.randn(3, 50, 64, generator=generator(0)), dim=-1)
    bank.push(keys, torch.ones(3, 50).bool())
    drawn = bank.draw((torch.arange(50) + 0.5).expand(3, -1) / 50)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, keys, rtol=0, atol=0.0005)


def test_queues_come_back_from_a_checkpoint() -> None:
    def pushed(bank: Bank, seed: int) -> None:
        good = torch.rand(2, 4, generator=generator(seed)) < 0.7
        bank.push(torch.randn(2, 4, 3, generator=generator(seed)), good)

    bank, other = Bank([5, 9], 3), Bank([5, 9], 3)
    for seed in range(3):
        pushed(bank, seed)
    other.load_state_dict(bank.state_dict())
    for each in (bank, other):
        pushed(each, 3)
    assert set(bank.state_dict()) == {"keys", "fill", "next"}
    assert all(torch.equal(a, b) for a, b in zip(bank.buffers(), other.buffers(), strict=True))
    u = torch.rand(2, 30, generator=generator(4))
    assert torch.equal(bank.draw(u), other.draw(u))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fill", [1, 2, 3, 1023, 30_000, 49_999, 50_000])
def test_no_draw_beyond_the_fill(fill: int, dtype: torch.dtype) -> None:
    bank = Bank([50_000, 1024], 1)
    for part in torch.ones(1, fill, 1).split(1024, 1):
        bank.push(torch.cat([part, -part]), torch.ones(2, part.shape[1]).bool())
    last = 1 - torch.finfo(dtype).eps / 2
    u = torch.tensor([0, 0.5, LAST, last], dtype=dtype).expand(2, -1)
    assert bank.draw(u).squeeze(2).tolist() == [[1] * 4, [-1] * 4]
    numbers = torch.arange(1024, dtype=dtype)
    bank.keys[:1024, 0], bank.fill[0] = numbers.half(), 1024
    assert torch.equal(bank.draw((numbers.expand(2, -1) + 0.5) / 1024)[0, :, 0], numbers)


def test_a_class_without_a_key() -> None:
    bank = Bank([3, 2], 4)
    bank.push(torch.ones(2, 2, 4), torch.tensor([[True, True], [False, False]]))
    drawn = bank.draw(torch.tensor([[0, 0.5, LAST]]).expand(2, -1))
    assert drawn.shape == (2, 3, 4)
    assert drawn.isfinite().all()
    assert torch.equal(drawn[0], torch.ones(3, 4))
    assert bank.fill.tolist() == [2, 0]


# ---- candidates and draws --------------------------------------------------------------------------------------------


def told(
    label: int, probs: list[float], least: float = 0.3, ranks: tuple[int, int] = (1, 3), **flags: bool
) -> tuple[list[int], list[int]]:
    """One pixel: the classes of which it is an anchor, and those of which it is a negative."""
    trusted, masked, keyed = (torch.tensor([flags.get(name, False)]) for name in ("trusted", "masked", "keyed"))
    found = candidates(torch.tensor([label]), torch.tensor([probs]), trusted, masked, keyed, least, ranks)
    anchors, negatives = (pixels[0].nonzero().flatten().tolist() for pixels in found)
    return anchors, negatives


def test_a_labelled_pixel_is_a_negative_of_the_class_that_tempted_the_teacher() -> None:
    assert told(1, [0.3, 0.5, 0.2], ranks=(2, 3), trusted=True, masked=True) == ([1], [0])
    assert told(2, [0.3, 0.5, 0.2], ranks=(2, 3), trusted=True, masked=True) == ([], [0, 1])


FIVE = [0.15, 0.1, 0.3, 0.05, 0.4]  # classes 4, 2, 0, 1, 3


def test_an_unreliable_pixel_is_a_negative_of_the_classes_of_middle_ranks() -> None:
    assert told(4, FIVE, keyed=True) == ([], [0, 2])
    assert told(4, FIVE, ranks=(2, 9), keyed=True) == ([], [0, 1, 3])


def test_a_reliable_pixel_is_a_negative_of_none() -> None:
    assert told(4, FIVE, trusted=True) == ([4], [])
    assert told(4, FIVE) == ([], [])


def test_a_pixel_without_a_label_is_nothing() -> None:
    assert told(IGNORE, FIVE, trusted=True, masked=True) == ([], [])
    assert told(IGNORE, FIVE, trusted=True) == ([], [])


def test_an_anchors_class_has_more_than_the_least_probability() -> None:
    assert told(0, [0.5, 0.5], least=0.5, trusted=True)[0] == []
    assert told(0, [0.5, 0.5], least=0.49, trusted=True)[0] == [0]


def test_anchors_are_drawn_evenly() -> None:
    label = torch.tensor([1, 3, 0, 1, 3, 3, 1, 3, IGNORE, 4])
    anchors = label.unsqueeze(1) == torch.arange(5)
    anchors[-1] = False
    drawn = draw_anchors(anchors, label, ((torch.arange(12) + 0.5) / 12).expand(5, -1))
    assert drawn[0].tolist() == [2] * 12
    assert drawn[1].tolist() == [0] * 4 + [3] * 4 + [6] * 4
    assert drawn[3].tolist() == [1] * 3 + [4] * 3 + [5] * 3 + [7] * 3
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < 10
    assert draw_anchors(anchors, label, torch.full((5, 1), LAST)).flatten()[[0, 1, 3]].tolist() == [2, 6, 7]


def test_draws_where_all_pixels_are_anchors_or_none() -> None:
    u = torch.tensor([0, 0.5, LAST]).expand(3, -1)
    for there, label in ((False, torch.full((6,), IGNORE)), (True, torch.zeros(6).long())):
        anchors = torch.zeros(6, 3).bool()
        anchors[:, 0] = there
        drawn = draw_anchors(anchors, label, u)
        assert drawn.shape == (3, 3)
        assert drawn[0].tolist() == [0, 3, 5] or not there
        assert 0 <= int(drawn.min()) <= int(drawn.max()) < 6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sums_and_features_of_pixels_of_maps(layout: torch.memory_format) -> None:
    maps = torch.randn(3, 4, 5, 6, generator=generator(0), dtype=torch.float64).to(memory_format=layout)
    flat = maps.movedim(1, 3).reshape(-1, 4)
    pixels = torch.randint(90, (7, 8), generator=generator(1))
    assert torch.equal(at(maps, pixels), flat[pixels])
    anchors = torch.rand(90, 7, generator=generator(2)) < 0.3
    anchors[:, 2] = False
    sums, count = class_sums(anchors, maps)
    assert count.tolist() == anchors.sum(0).tolist()
    for k in range(7):
        torch.testing.assert_close(sums[k], flat[anchors[:, k]].sum(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("most", [1, 7, 40, 100])
def test_keys_are_drawn_without_replacement(most: int) -> None:
    negatives = torch.rand(40, 4, generator=generator(0)) < torch.tensor([0.0, 0.2, 0.6, 1.0])
    u = torch.rand(4, 40, generator=generator(1))
    u[:, ::9] = 0
    pixels, good = draw_keys(negatives, u, most)
    assert pixels.shape == good.shape == (4, min(most, 40))
    for k in range(4):
        drawn = pixels[k, good[k]].tolist()
        wanted = sorted(negatives[:, k].nonzero().flatten().tolist(), key=lambda p: -float(u[k, p]))
        assert len(drawn) == len(set(drawn)) == min(most, len(wanted))
        assert sorted(float(u[k, p]) for p in drawn) == sorted(float(u[k, p]) for p in wanted[:most])
        assert set(drawn) <= set(wanted)


# ---- the loss --------------------------------------------------------------------------------------------------------


def along(*numbers: float, scale: float = 1.0) -> Tensor:
    return scale * torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
@pytest.mark.parametrize(("count", "expected"), [(50, 3.9318), (256, 5.5491)])
def test_where_all_cosines_are_equal(count: int, expected: float, temperature: float) -> None:
    anchors, positive = along(1, 2).expand(1, 3, 2), along(1, 2, scale=7).view(1, 2)
    pool, picks = along(1, 2, scale=0.1).expand(1, 9, 2), torch.arange(count).expand(1, 3, -1) % 9
    nats, _ = contrast(anchors, positive, pool, picks, temperature)
    assert nats.tolist() == [[pytest.approx(expected, abs=1e-4)] * 3]


@pytest.mark.parametrize(("negative", "expected"), [((0, 5), 2.0499), ((-3, 0), 0.6501)])
def test_where_the_positive_is_near(negative: tuple[float, float], expected: float) -> None:
    anchors, positive, pool = along(2, 0).view(1, 1, 2), along(9, 0).view(1, 2), along(*negative).view(1, 1, 2)
    nats, nearest = contrast(anchors, positive, pool, torch.zeros(1, 1, 50).long(), 0.5)
    assert nats.item() == pytest.approx(expected, abs=1e-4)
    assert nearest.tolist() == [[True]]
    _, nearest = contrast(anchors, along(0, 1).view(1, 2), positive.view(1, 1, 2), torch.zeros(1, 1, 50).long(), 0.5)
    assert nearest.tolist() == [[False]]


def test_only_anchors_have_a_gradient() -> None:
    draw = generator(0)
    features, keys = (torch.randn(2, 4, 3, 5, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    label = torch.arange(30) % 3
    anchors = label.unsqueeze(1) == torch.arange(3)
    anchors[:, 1] = False
    pixels = draw_anchors(anchors, label, torch.rand(3, 8, generator=draw))
    positive, _ = class_sums(anchors, keys)
    pool = at(keys, torch.randint(30, (3, 5), generator=draw))
    nats, _ = contrast(at(features, pixels), positive, pool, torch.randint(5, (3, 8, 6), generator=draw), 0.5)
    torch.autograd.backward(nats[::2].sum())
    assert keys.grad is None
    assert features.grad is not None
    reached = features.grad.any(1).flatten().nonzero().flatten().tolist()
    assert reached == sorted(set(pixels[::2].flatten().tolist()))
    assert all(p % 3 != 1 for p in reached)


def test_the_loss_has_correct_gradients() -> None:
    draw = generator(1)
    anchors, positive, pool = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((2, 3, 4), (2, 4), (2, 5, 4))
    )
    picks = torch.randint(5, (2, 3, 6), generator=draw)
    assert torch.autograd.gradcheck(
        lambda a: contrast(a, positive, pool, picks, 0.5)[0].sum(), anchors.requires_grad_()
    )


# ---- all of it, slowly -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """What a step of the contrastive loss is computed from: pixels, and uniform numbers."""

    label: Tensor
    probs: Tensor
    trusted: Tensor
    masked: Tensor
    keyed: Tensor
    features: Tensor
    keys: Tensor
    u_keys: Tensor
    u_anchors: Tensor
    u_pool: Tensor
    picks: Tensor


@dataclass(frozen=True)
class Sizes:
    """`ranks` (low, high), and what else does not come from images."""

    classes: int
    ranks: tuple[int, int]
    capacities: tuple[int, ...]
    most: int
    least: float = 0.2
    temperature: float = 0.5


def pixels_of(seed: int, sizes: Sizes, anchors: int = 6, pool: int = 11, negatives: int = 5) -> Drawn:
    """Two images of 8x8 px, one labelled; the last class is in neither, and every fifth pixel has no label."""
    rng, p, c = np.random.default_rng(seed), 128, sizes.classes

    def uniform(*shape: int) -> Tensor:
        return torch.from_numpy(rng.random(shape))

    label = torch.from_numpy(rng.integers(0, c - 1, p))
    label[::5] = IGNORE
    masked = torch.arange(p) < p // 2
    reliable = uniform(p) < 0.6
    return Drawn(
        label=label,
        probs=(2 * torch.from_numpy(rng.normal(size=(p, c)))).softmax(1),
        trusted=torch.where(masked, label != IGNORE, reliable),
        masked=masked,
        keyed=~masked & ~reliable & (uniform(p) < 0.8),
        features=torch.from_numpy(rng.normal(size=(p, 4))),
        keys=torch.from_numpy(rng.normal(size=(p, 4))),
        u_keys=uniform(c, p),
        u_anchors=uniform(c, anchors),
        u_pool=uniform(c, pool),
        picks=torch.from_numpy(rng.integers(0, pool, (c, anchors, negatives))),
    )


Result = tuple[list[int], list[list[float]], list[list[bool]]]
"""Anchors of each class; of the classes that have anchors and keys the loss and `nearest`, else nothing."""


def fast(drawn: Drawn, sizes: Sizes, bank: Bank) -> Result:
    d = drawn
    anchors, negatives = candidates(d.label, d.probs, d.trusted, d.masked, d.keyed, sizes.least, sizes.ranks)
    features, keys = (pixels.view(2, 8, 8, -1).movedim(3, 1) for pixels in (d.features, d.keys))
    positive, count = class_sums(anchors, keys)
    pixels, good = draw_keys(negatives, d.u_keys, sizes.most)
    bank.push(torch.nn.functional.normalize(at(keys, pixels), dim=-1), good)
    taken = at(features, draw_anchors(anchors, d.label, d.u_anchors))
    nats, nearest = contrast(taken, positive, bank.draw(d.u_pool), d.picks, sizes.temperature)
    used = (count > 0) & (bank.fill > 0)
    losses = [row.tolist() if there else [] for row, there in zip(nats, used, strict=True)]
    near = [row.tolist() if there else [] for row, there in zip(nearest, used, strict=True)]
    return count.int().tolist(), losses, near


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(float(a @ a)) / math.sqrt(float(b @ b)))


class Slow:
    """Class by class and pixel by pixel; a queue is a ring, as which of its keys a number draws depends on it."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.rings: list[dict[int, np.ndarray]] = [{} for _ in range(sizes.classes)]
        self.pushed = [0] * sizes.classes

    def __call__(self, drawn: Drawn) -> Result:
        counts, losses, near = [], [], []
        for k in range(self.sizes.classes):
            found = self._of_class(k, **{name: tensor.numpy() for name, tensor in vars(drawn).items()})
            for kept, value in zip((counts, losses, near), found, strict=True):
                kept.append(value)
        return counts, losses, near

    def _of_class(self, k: int, **d: np.ndarray) -> tuple[Any, Any, Any]:
        s, (low, high), ring = self.sizes, self.sizes.ranks, self.rings[k]
        anchors, negatives = [], []
        for p, label in enumerate(d["label"]):
            rank = int((d["probs"][p] > d["probs"][p, k]).sum())
            if label == k and d["trusted"][p] and d["probs"][p, k] > s.least:
                anchors.append(p)
            if d["masked"][p] and label not in (k, IGNORE) and rank < low:
                negatives.append(p)
            if d["keyed"][p] and low <= rank < high:
                negatives.append(p)

        negatives.sort(key=lambda p: -float(d["u_keys"][k, p]))
        for p in negatives[: s.most]:
            key = d["keys"][p] / np.sqrt((d["keys"][p] ** 2).sum())
            ring[self.pushed[k] % s.capacities[k]] = key.astype(np.float32).astype(np.float16).astype(np.float64)
            self.pushed[k] += 1
        if not anchors or not ring:
            return len(anchors), [], []

        positive = np.mean([d["keys"][p] for p in anchors], axis=0)
        pool = [ring[int(u * len(ring))] for u in d["u_pool"][k]]
        losses, near = [], []
        for m, u in enumerate(d["u_anchors"][k]):
            anchor = d["features"][anchors[int(u * len(anchors))]]
            own = cosine(anchor, positive)
            others = [cosine(anchor, pool[i]) for i in d["picks"][k, m]]
            total = sum(math.exp(c / s.temperature) for c in (own, *others))
            losses.append(-math.log(math.exp(own / s.temperature) / total))
            near.append(own > max(others))
        return len(anchors), losses, near


SIZES = {
    "five classes": Sizes(5, (1, 3), (9, 7, 7, 12, 7), most=6),
    "pushes larger than queues": Sizes(5, (2, 4), (9, 3, 7, 200, 2), most=50),
    "more keys than pixels": Sizes(4, (1, 9), (500, 300, 300, 300), most=1000),
    "many classes": Sizes(21, (3, 20), (50, *[30] * 20), most=10, least=0.1),
    "two classes": Sizes(2, (1, 2), (40, 30), most=20),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_contrastive_loss_is_the_slow_one(sizes: Sizes) -> None:
    """On random input one step after another, which fills the queues."""
    for start in range(0, 50, 5):
        bank, slow, compared = Bank(sizes.capacities, 4), Slow(sizes), 0
        for seed in range(start, start + 5):
            drawn = pixels_of(seed, sizes)
            counts, losses, near = fast(drawn, sizes, bank)
            expected = slow(drawn)
            assert (counts, near) == (expected[0], expected[2])
            assert losses == [pytest.approx(row, rel=1e-9) for row in expected[1]]
            assert bank.fill.tolist() == [len(ring) for ring in slow.rings]
            compared += sum(map(len, losses))
        assert compared > 0


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_order_of_the_classes_does_not_matter(sizes: Sizes) -> None:
    order = np.random.default_rng(0).permutation(sizes.classes)
    name = {int(old): new for new, old in enumerate(order)} | {IGNORE: IGNORE}
    moved_sizes = replace(sizes, capacities=tuple(sizes.capacities[old] for old in order))
    bank, moved_bank = Bank(sizes.capacities, 4), Bank(moved_sizes.capacities, 4)
    for seed in range(5):
        drawn = pixels_of(seed, sizes)
        rows = {field: getattr(drawn, field)[order] for field in ("u_keys", "u_anchors", "u_pool", "picks")}
        label = torch.tensor([name[int(k)] for k in drawn.label])
        moved = replace(drawn, label=label, probs=drawn.probs[:, order], **rows)
        before, after = fast(drawn, sizes, bank), fast(moved, moved_sizes, moved_bank)
        assert after[0] == [before[0][old] for old in order]
        assert after[1] == [pytest.approx(before[1][old], rel=1e-9) for old in order]
        assert after[2] == [before[2][old] for old in order]


def test_gradients_add_up_in_one_order_on_any_threads() -> None:
    """Many draws of few pixels at the sizes of a recipe: in an order of its own each run would end in other bits."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        maps = torch.randn(8, 64, 32, 40).contiguous(memory_format=torch.channels_last).requires_grad_()
        pixels = torch.randint(30, (11, 256)) + 300 * torch.arange(11).unsqueeze(1)
        weight = torch.randn(11, 256, 64)
        found = []
        for _ in range(60):
            maps.grad = None
            (at(maps, pixels) * weight).sum().backward()
            assert maps.grad is not None
            found.append(maps.grad.clone())
        assert all(torch.equal(found[0], other) for other in found)
    finally:
        torch.set_num_threads(threads)

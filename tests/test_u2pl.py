"""U2PL: the cases that can be computed by hand, and a slow version of its whole step."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from semiseg.methods import U2PL
from semiseg.methods.u2pl import POOL
from semiseg.networks.factory import Build, NetworkConfig, OptimConfig
from semiseg.networks.heads import Projected, Views
from semiseg.ops.mix import half_box
from semiseg.types import IGNORE, VIEW, Clock, InputError, Labelled, Share, Unlabelled

CLASSES = 3
SMALL: dict[str, Any] = {"width": 8, "anchors": 32, "keys": 5, "queue": 60, "queue_first": 90, "push": 20}
MIDDLE = Clock(40, 80)


class Watched(U2PL):
    """Keeps the terms of each update, and all gradients after it."""

    def backward(self, name: str, *terms: tuple[float, Share]) -> list[Tensor]:
        self.terms = terms
        values = super().backward(name, *terms)
        self.grads = {n: None if p.grad is None else p.grad.clone() for n, p in self.student.named_parameters()}
        return values


def built(classes: int = CLASSES) -> Build:
    network = NetworkConfig(name="fpn", encoder="test_resnet", weights="random", options={"decoder_dropout": 0.0})
    return Build(classes, 3, network, OptimConfig())


def made(classes: int = CLASSES, **options: Any) -> Watched:
    """The method in float64."""
    return Watched(U2PL.Config(**SMALL | options), built(classes)).double()


def batches(seed: int = 0, images: int = 2, size: tuple[int, int] = (32, 48), classes: int = CLASSES) -> dict[str, Any]:
    """In float64; masks have IGNORE, unlabelled images padding; by default the first image is mixed, the second not."""
    draw = torch.Generator().manual_seed(seed)
    shape, everywhere = (images, *size), torch.ones(images, *size, dtype=torch.bool)

    def image() -> Tensor:
        return torch.rand(images, 3, *size, generator=draw, dtype=torch.float64)

    mask = torch.randint(0, classes, (images, size[0] // 8, size[1] // 8), generator=draw, dtype=torch.uint8)
    mask = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)
    mask[torch.rand(shape, generator=draw) < 0.1] = IGNORE
    valid, table = everywhere.clone(), torch.rand(images, 1, len(VIEW), generator=draw)
    valid[0, :, -9:] = False
    valid[1, :5] = False
    table[:, 0, VIEW.index("mix")] = torch.arange(images) / images
    row, partner = torch.arange(images), torch.arange(images).roll(1)
    unlabelled = Unlabelled(image(), valid, table, partner, row)
    return {"labelled": Labelled(image(), mask, everywhere, table[:, :0], row), "unlabelled": unlabelled}


def values(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in losses.items()}


def filled(method: U2PL, seed: int = 0, classes: tuple[int, ...] = (0, 1, 2)) -> None:
    """Puts random keys into queues."""
    keys = torch.randn(CLASSES, 40, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    good = torch.zeros(CLASSES, 40).bool()
    good[list(classes)] = True
    method.bank.push(F.normalize(keys, dim=-1), good)


def moved(method: U2PL, before: dict[str, Tensor]) -> float:
    """The largest change of a weight of the student."""
    return max(float((p.detach() - before[name]).abs().max()) for name, p in method.student.named_parameters())


def weights_of(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


# ---- the clock -------------------------------------------------------------------------------------------------------


def test_alpha_falls_evenly() -> None:
    method = made(warm_up=0.0, quantile="exact", weight=0.0)
    found = {}
    for epoch in (0, 1, 20, 40, 60, 79):
        given = batches(epoch)
        found[epoch] = float(method.step(Clock(epoch, 80), **given)["reliable"])
    alpha = {0: 20, 1: 19.75, 20: 15, 40: 10, 60: 5, 79: 0.25}
    for epoch, percent in alpha.items():
        assert 1 - found[epoch] == pytest.approx(percent / 100, abs=0.001), epoch
    assert list(found.values()) == sorted(found.values())


@pytest.mark.parametrize("warm_up", [0.0, 0.25])
def test_the_teacher_is_copied_once_and_averaged_from_then_on(warm_up: float) -> None:
    method, begin = made(warm_up=warm_up), 8 * warm_up
    for step in range(5):
        before = weights_of(method.teacher)
        losses = method.step(Clock(step, 8), **batches(step))
        assert set(losses) == {"loss"} if step < begin else {"loss_unlabelled", "loss_contrastive"} <= set(losses)
        decay = min(1 - 1 / (max(0, step - begin) + 1), 0.99)
        student = weights_of(method.student)
        for name, p in method.teacher.named_parameters():
            torch.testing.assert_close(p.data, decay * before[name] + (1 - decay) * student[name])
    assert method.predictor() is method.teacher.net


def test_the_default_warm_up_is_one_of_80_epochs() -> None:
    method = made()
    assert set(method.step(Clock(249, 20_000), **batches())) == {"loss"}
    assert "limit" in method.step(Clock(250, 20_000), **batches())


# ---- the limit and the mixture ---------------------------------------------------------------------------------------


def test_both_limits_are_nearly_the_same() -> None:
    found = {}
    for kind in ("histogram", "exact"):
        method = made(quantile=kind)
        found[kind] = values(method.step(MIDDLE, **batches(size=(64, 64))))
    assert found["histogram"]["limit"] == pytest.approx(found["exact"]["limit"], rel=0.001)
    assert found["histogram"]["reliable"] == pytest.approx(found["exact"]["reliable"], abs=0.002)
    assert found["exact"]["reliable"] == pytest.approx(0.9, abs=0.001)


def taught(classes: int = CLASSES) -> tuple[Tensor, Views]:
    """Probabilities (2, C, 32, 48) of unlabelled images that differ in every pixel, and what belongs to them."""
    draw = torch.Generator().manual_seed(1)
    probs = (3 * torch.randn(2, classes, 32, 48, generator=draw, dtype=torch.float64)).softmax(1)
    small, features = (torch.randn(4, n, 8, 12, generator=draw, dtype=torch.float64) for n in (classes, 8))
    return probs, Views(probs.log(), small, features, None)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["cutmix", "classmix"])
def test_image_label_and_features_are_mixed_alike(kind: str, share: float) -> None:
    method, (probs, views), unlabelled = made(mix=kind, mix_share=share), taught(), batches()["unlabelled"]
    t = method._mix(unlabelled, views, 2)
    image, label, nats, valid, small, keys = t.image, t.label, t.nats, t.valid, t.probs, t.keys
    assert keys is not None
    assert views.features is not None
    own = (image == unlabelled.image).all(1)
    other = (image == unlabelled.image[unlabelled.partner]).all(1)
    assert bool((own ^ other).all())
    assert other.flatten(1).any(1).tolist() == [True, share == 1]
    wanted = (probs.argmax(1), -(probs * probs.log()).sum(1), unlabelled.valid)
    for mixed, before in zip((label, nats, valid), wanted, strict=True):
        torch.testing.assert_close(mixed, torch.where(other, before[unlabelled.partner], before))
    if kind == "cutmix":
        assert int(other[0].sum()) == pytest.approx(32 * 48 / 2, abs=24)
    else:
        assert bool(valid[other].all()), "padding is no class, and nothing of it is pasted"
        pasted, there = (set(t.tolist()) for t in (label[0][other[0]], wanted[0][1][unlabelled.valid[1]]))
        assert len(pasted) == (len(there) + 1) // 2
    middle = other[:, 2::4, 2::4].unsqueeze(1)
    for mixed, before in ((small, views.small.softmax(1)), (keys, views.features)):
        torch.testing.assert_close(mixed[:2], before[:2])
        torch.testing.assert_close(mixed[2:], torch.where(middle, before[2:].flip(0), before[2:]))


@pytest.mark.parametrize("kind", ["cutout", "none"])
def test_images_without_a_partner(kind: str) -> None:
    method, (probs, views), unlabelled = made(mix=kind), taught(), batches()["unlabelled"]
    t = method._mix(unlabelled, views, 2)
    image, label, nats, valid, small, keys = t.image, t.label, t.nats, t.valid, t.probs, t.keys
    assert keys is not None
    assert views.features is not None
    gone = (image != unlabelled.image).any(1)
    if kind == "cutout":
        assert not gone[1].any()
        assert int(gone[0].sum()) == pytest.approx(32 * 48 / 2, abs=24)
        mean = method.student.net.normalise.mean.flatten()
        torch.testing.assert_close(image[0][:, gone[0]].T, mean.expand(int(gone.sum()), 3))
    else:
        assert not gone.any()
    assert torch.equal(valid, unlabelled.valid & ~gone)
    assert torch.equal(label, probs.argmax(1))
    torch.testing.assert_close(nats, -(probs * probs.log()).sum(1))
    torch.testing.assert_close(small, views.small.softmax(1))
    assert torch.equal(keys, views.features)


def test_padding_changes_no_limit() -> None:
    method, unlabelled = made(mix="none", quantile="exact"), batches()["unlabelled"]
    _, views = taught()
    t = method._mix(unlabelled, views, 2)
    nats, valid = t.nats, t.valid
    limit = method._limit(nats, valid, 0.8)
    assert float(limit) == pytest.approx(np.percentile(nats[unlabelled.valid].numpy(), 80))
    assert torch.equal(method._limit(nats.masked_fill(~valid, 0), valid, 0.8), limit)


# ---- the contrastive loss --------------------------------------------------------------------------------------------


def of_features(method: U2PL) -> list[Tensor]:
    """The gradients of the student's features, once there are some."""
    found: list[Tensor] = []

    def watch(*seen: Any) -> None:
        seen[-1].register_hook(found.append)

    method.student.projection.register_forward_hook(watch)
    return found


def of_two_classes() -> dict[str, Any]:
    """Labels of the classes 0 and 2 alone; the unlabelled images are padding altogether."""
    given = batches()
    given["labelled"].mask[given["labelled"].mask == 1] = 2
    given["unlabelled"].valid.fill_(False)
    return given


def test_every_class_that_is_present_learns() -> None:
    method, given = made(least=0.0, anchors=2000), of_two_classes()
    filled(method)
    found = of_features(method)
    losses = values(method.step(MIDDLE, **given))
    (grad,) = found
    mask = method.student.pick(given["labelled"].mask.long(), grad, IGNORE)
    reached = grad.any(1)
    assert set(mask.unique().tolist()) == {0, 2, IGNORE}
    assert torch.equal(reached[:2], mask != IGNORE)
    assert not reached[2:].any()
    assert losses["loss_contrastive"] > 0
    assert math.isnan(losses["limit"])


def test_the_queue_of_an_absent_class_does_not_matter() -> None:
    found = []
    for seed in (1, 2):
        method = made(least=0.0)
        filled(method, 0, (0, 2))
        filled(method, seed, (1,))
        torch.manual_seed(0)
        found.append(values(method.step(MIDDLE, **of_two_classes())))
    assert found[0]["loss_contrastive"] == found[1]["loss_contrastive"] > 0


def test_the_contrastive_loss_is_a_mean_over_classes_with_anchors_and_keys() -> None:
    """At a high temperature all cosines are equal, and the loss of every class is ln(1 + keys)."""
    method = made(least=0.0, temperature=1e9)
    filled(method, classes=(0, 2))
    given = of_two_classes()
    assert float(method.step(MIDDLE, **given)["loss_contrastive"]) == pytest.approx(math.log(6), rel=1e-6)


def one_class(given: dict[str, Any]) -> None:
    mask = given["labelled"].mask
    mask[mask != IGNORE] = 1
    given["unlabelled"].valid.fill_(False)


def no_label(given: dict[str, Any]) -> None:
    given["labelled"].mask.fill_(IGNORE)
    given["unlabelled"].valid.fill_(False)


def no_mask(given: dict[str, Any]) -> None:
    given["labelled"].mask.fill_(IGNORE)


def no_pixel(given: dict[str, Any]) -> None:
    given["unlabelled"].valid.fill_(False)


@pytest.mark.parametrize("kind", ["histogram", "exact"])
@pytest.mark.parametrize("spoil", [one_class, no_label, no_mask, no_pixel])
def test_training_goes_on_without_labels(spoil: Callable[[dict[str, Any]], None], kind: str) -> None:
    method = made(quantile=kind, least=0.0, auxiliary=0.4, mix="classmix")
    filled(method)
    for seed in range(2):
        given, before = batches(seed), weights_of(method.student)
        spoil(given)
        losses = values(method.step(MIDDLE, **given))
        assert all(math.isfinite(value) for name, value in losses.items() if name.startswith("loss"))
        assert all(share.total.requires_grad for _, share in method.terms)
        grads = {name: grad for name, grad in method.grads.items() if grad is not None}
        assert len(grads) == len(before), "every weight has a gradient, if only of zeros"
        learned = any(bool(grad.any()) for grad in grads.values())
        assert learned == (spoil is not no_label)
        if spoil in (one_class, no_label):
            assert losses["loss_contrastive"] == losses["loss_unlabelled"] == 0
            assert not any(grad.any() for name, grad in grads.items() if name.startswith("projection."))
        assert (losses["loss"] > 0) == (spoil in (one_class, no_pixel))
        assert moved(method, before) > 0 or not learned
        assert all(p.isfinite().all() for p in (*method.parameters(), *method.bank.buffers()))


def test_without_a_partition_all_are_reliable() -> None:
    for kind in ("histogram", "exact"):
        assert values(made(alpha=0.0, warm_up=0.0, quantile=kind).step(MIDDLE, **batches()))["reliable"] == 1


def test_where_nothing_is_reliable_masks_are_learned() -> None:
    method, given = made(quantile="exact", alpha=100.0, warm_up=0.0), batches()
    one_class(given)
    given["unlabelled"].valid.fill_(True)
    before = weights_of(method.student)
    losses = values(method.step(Clock(0, 80), **given))
    assert losses["reliable"] == losses["loss_unlabelled"] == losses["loss_contrastive"] == 0
    assert losses["loss"] > 0
    assert moved(method, before) > 0
    assert method.bank.fill.sum() > 0


def test_without_the_contrastive_loss() -> None:
    method = made(weight=0.0)
    losses = method.step(MIDDLE, **batches())
    assert "loss_contrastive" not in losses
    assert not hasattr(method, "bank")
    assert method.student.projection is None
    assert not any(name.startswith("projection.") for name in method.state_dict())
    made(weight=0.0, queue=1)  # of no queue nothing can be wrong


def test_in_the_warm_up_every_weight_has_a_gradient() -> None:
    """Of zero where the loss does not reach it: a gradient that comes in later is another case for optimisers."""
    method = made(warm_up=0.5)
    method.step(Clock(0, 8), **batches())
    assert all(grad is not None for grad in method.grads.values())
    assert not any(grad.any() for name, grad in method.grads.items() if name.startswith("projection."))


def test_a_limit_that_misses_its_share_outweighs_nothing() -> None:
    """All entropies but a few are equal, in one bin of the histogram: few pixels are reliable, where 84 % should be."""
    method = made(mix="none")
    learned, valid = Share(torch.tensor(8.0), torch.tensor(4.0)), torch.ones(2, 10, 10, dtype=torch.bool)
    reliable = torch.zeros_like(valid)
    reliable[0, 0, :4] = True
    found = method._adapted(learned, valid, reliable, 0.8)
    assert found.over is not None
    assert float(found.over) == pytest.approx(2 * 4 / 0.8)
    reliable[:, :8] = True
    assert float(method._adapted(learned, valid, reliable, 0.8).over or 0) == 200


def test_two_classes_have_negatives() -> None:
    method = made(2, least=0.0)
    assert method.ranks == (1, 2)
    losses = values(method.step(MIDDLE, **batches(classes=2)))
    assert min(losses["queue/0"], losses["queue/1"]) > 0
    assert losses["loss_contrastive"] > 0


@pytest.mark.parametrize(
    ("classes", "expected"), [(2, (1, 2)), (3, (1, 3)), (8, (2, 8)), (11, (2, 11)), (12, (3, 12)), (21, (3, 20))]
)
def test_ranks_by_default(classes: int, expected: tuple[int, int]) -> None:
    assert made(classes).ranks == expected


@pytest.mark.parametrize("kind", ["unreliable", "reliable", "all"])
def test_which_pixels_are_negatives(kind: str) -> None:
    """Without masks nothing but unlabelled pixels gives keys."""
    method, given = made(negatives=kind, quantile="exact", push=1000, queue=1000, queue_first=1000), batches()
    no_mask(given)
    given["unlabelled"].valid.fill_(True)
    losses = values(method.step(MIDDLE, **given))
    keys = sum(value for name, value in losses.items() if name.startswith("queue/"))
    # of three classes a pixel is a negative of two, and the features see one pixel in 16
    share = {"unreliable": 1 - losses["reliable"], "reliable": losses["reliable"], "all": 1}[kind]
    assert keys == pytest.approx(2 * share * 2 * 8 * 12, abs=0 if kind == "all" else 40)


class Waits(TorchDispatchMode):
    """Notes what would wait for a GPU: numbers, or sizes, that leave the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sizes = ("nonzero", "masked_select", "unique", "bincount", "repeat_interleave")
        waits = any(name in str(func) for name in ("_local_scalar_dense", "aten.equal", *sizes))
        if "aten.index" in str(func):  # a mask as index has to be counted
            places = args[1] if isinstance(args[1], list | tuple) else ()
            waits |= any(isinstance(place, Tensor) and place.dtype in (torch.bool, torch.uint8) for place in places)
        if waits:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
        lambda x: x.nonzero(),
        lambda x: x.sum().item(),
        lambda x: torch.bincount(x.long()),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_what_waits_is_noted(wait: Any) -> None:
    with Waits() as waits:
        wait(torch.ones(3))
    assert waits.found


@pytest.mark.parametrize("kind", ["cutmix", "classmix", "cutout"])
@pytest.mark.parametrize("quantile", ["histogram", "exact"])
def test_nothing_waits_for_the_device(kind: str, quantile: str) -> None:
    method, given = made(mix=kind, quantile=quantile, auxiliary=0.4), batches()
    with Waits() as waits:
        method.step(MIDDLE, **given)
    assert waits.found == []


# ---- wrong input -----------------------------------------------------------------------------------------------------

OWN = """
from torch import nn

def piece(channels, classes):
    return nn.Conv2d(channels, classes, 1)
"""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            "method.rank_low=3 method.rank_high=3",
            "method.rank_high: with ranks 3 to 3 of 7 classes no pixel is a negative of any: set it above 3, ",
        ),
        ("method.rank_high=1", "method.rank_high: with ranks 1 to 1 of 7 classes no pixel is a negative of any: "),
        ("method.rank_low=7", "method.rank_low is 7, but 7 classes have ranks 0 to 6: set it lower."),
        (
            "method.queue=10000000000",
            "method.queue: 7 queues of up to 10000000000 keys with method.width=256 need more",
        ),
        ("method.keys=1000000000", "method.anchors=256 a class with method.keys=1000000000 need "),
        ("train.crop=[32,2]", "train.crop: [32, 2] has no box of half its area: take 3 px or more."),
        (
            "method.rank_low=7 method.rank_high=9",
            "method.rank_low is 7, but 7 classes have ranks 0 to 6: set it lower.",
        ),
        ("method.rank_low=0", "method.rank_low is 0, but it should be above 0."),
        ("method.queue=1000", "method.queue is 1000, smaller than one push: set it to method.push=1024 or more, "),
        ("method.queue_first=50 method.push=60", "method.queue_first is 50, smaller than one push: set it to "),
        ("method.alpha=100.5", "method.alpha is 100.5, but it should be at most 100."),
        ("method.alpha=-1", "method.alpha is -1, but it should be at least 0."),
        ("method.temperature=0", "method.temperature is 0, but it should be above 0."),
        ("method.least=2", "method.least is 2, but it should be at most 1."),
        ("method.width=0", "method.width is 0, but it should be above 0."),
        ("method.mix=cutmx", "method.mix is 'cutmx', but it should be cutmix, classmix, cutout or none."),
        ("method.anchors=1000000000", "method.anchors=1000000000 a class with method.keys=50 need "),
        ("network.name=own.py:piece", "network.name: own.py:piece is one piece, and the method needs encode, fuse "),
    ],
)
def test_option(semiseg: Any, recipe: Path, tmp_path: Path, overrides: str, expected: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    assert semiseg("train", recipe, "-o", "run", "method=u2pl", *overrides.split()).sentence.startswith(expected)
    assert not Path("run").exists()


def test_anchors_within_half_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 MB hold 180 anchors a class: 4 bytes for 3 classes' similarities, features and picks."""
    monkeypatch.setattr(Build, "memory", lambda _: 10e6)
    with pytest.raises(
        InputError, match=r"^method\.anchors=500 .*, more than half the memory: set it to 1 to (\d+)\.$"
    ) as e:
        made(anchors=500)
    most = int(str(e.value).rpartition(" ")[2].rstrip("."))
    assert 100 < most < 300
    made(anchors=most)
    with pytest.raises(InputError, match=r"^method\.anchors="):
        made(anchors=most + 1)


def test_of_few_classes_no_high_rank() -> None:
    with pytest.raises(InputError, match=r"^method\.rank_low is 3, but 2 classes have ranks 0 to 1: set it lower\."):
        made(2, rank_low=3)
    made(2, rank_low=3, weight=0)
    with pytest.raises(InputError, match=r"^method\.weight: .* needs two classes, the data has one: set it to 0\."):
        made(1)
    made(1, weight=0)


def test_features_too_wide_for_any_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Build, "memory", lambda _: 10e6)
    with pytest.raises(InputError, match=r"^method\.queue: .* more than half the memory: lower method\.width\.$"):
        made(width=10**6)


# ---- the whole step, slowly ------------------------------------------------------------------------------------------


def slow_ce(logits: Tensor, label: Tensor, counted: Tensor) -> Tensor:
    probs = logits.exp() / logits.exp().sum(1, keepdim=True)
    own = probs.gather(1, label.clamp(max=CLASSES - 1).unsqueeze(1))[:, 0]
    return -(counted * own.log()).sum() / max(1, int(counted.sum()))


class Slow:
    """One step as the method's description has it: class by class, pixel by pixel, with the same random numbers.

    Images of 32x48 px, which the network pads to 32x64.
    """

    def __init__(self, method: U2PL) -> None:
        self.student, self.teacher = copy.deepcopy(method.student), copy.deepcopy(method.teacher)
        self.config = method.config
        self.rings: list[list[Tensor]] = [[] for _ in range(CLASSES)]
        self.pushed = [0] * CLASSES
        encoder = list(self.student.net.encoder.parameters())
        rest = [p for p in self.student.parameters() if all(p is not q for q in encoder)]
        groups = [{"params": encoder, "lr": 3e-4}, {"params": rest, "lr": 3e-3}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01)

    def step(self, clock: Clock, labelled: Labelled, unlabelled: Unlabelled) -> dict[str, float]:
        c, mask, begin = self.config, labelled.mask.long(), math.ceil(self.config.warm_up * clock.total)
        known, found = mask != IGNORE, {}
        if clock.step < begin:
            seen = self.student(labelled.image)
            loss = self._supervised(seen, mask) + 0 * seen.features.sum()
        else:
            image, label, probs, valid, small, keys = self._taught(labelled, unlabelled)
            nats = -(probs * probs.log()).sum(1)
            alpha = c.alpha * (1 - clock.step / clock.total)
            found["limit"] = np.percentile(nats[valid].numpy(), 100 - alpha)
            reliable, unreliable = valid & (nats < found["limit"]), valid & (nats >= found["limit"])
            found["reliable"] = int(reliable.sum()) / int(valid.sum())
            seen = self.student(torch.cat([labelled.image, image]))
            learned = slow_ce(seen.logits[2:], label, reliable)
            if c.adaptive:
                learned = learned / found["reliable"]
            everything, trusted = torch.cat([mask, label]), torch.cat([known, reliable])
            keyed = torch.cat([torch.zeros_like(valid), unreliable])
            contrastive = self._contrast(seen.features, keys, small, everything, trusted, keyed)
            loss = self._supervised(seen, mask)
            found |= {"loss_unlabelled": learned.item(), "loss_contrastive": contrastive.item()}
            loss = loss + learned + c.weight * contrastive
        found["loss"] = slow_ce(seen.logits[:2], mask, known).item()
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        decay = min(1 - 1 / (max(0, clock.step - begin) + 1), c.ema)
        for old, new in zip(self.teacher.state_dict().values(), self.student.state_dict().values(), strict=True):
            old.copy_(decay * old + (1 - decay) * new if old.is_floating_point() else new)
        return found

    def _supervised(self, seen: Views, mask: Tensor) -> Tensor:
        loss = slow_ce(seen.logits[:2], mask, mask != IGNORE)
        if seen.auxiliary is None:
            return loss
        return loss + self.config.auxiliary * slow_ce(seen.auxiliary[:2], mask, mask != IGNORE)

    @torch.no_grad()
    def _taught(self, labelled: Labelled, unlabelled: Unlabelled) -> tuple[Tensor, ...]:
        views = self.teacher(torch.cat([labelled.image, unlabelled.image]))
        probs, small, keys = views.logits[2:].softmax(1), views.small.softmax(1), views.features.clone()
        image, mixed, valid = unlabelled.image.clone(), probs.clone(), unlabelled.valid.clone()
        box = half_box(unlabelled.view(0), (32, 48), self.config.mix_share)
        before = small.clone(), keys.clone()
        for b, y, x in box.nonzero().tolist():
            other = int(unlabelled.partner[b])
            for new, old in ((image, unlabelled.image), (mixed, probs), (valid, unlabelled.valid)):
                new[b, ..., y, x] = old[other, ..., y, x]
            if y % 4 == x % 4 == 2:
                for new, old in zip((small, keys), before, strict=True):
                    new[2 + b, :, y // 4, x // 4] = old[2 + other, :, y // 4, x // 4]
        return image, mixed.argmax(1), mixed, valid, small, keys

    def _contrast(
        self, features: Tensor, keys: Tensor, small: Tensor, label: Tensor, trusted: Tensor, keyed: Tensor
    ) -> Tensor:
        c, pixels = self.config, [(b, i, j) for b in range(4) for i in range(8) for j in range(16)]
        u_keys, u_anchors = torch.rand(CLASSES, len(pixels)), torch.rand(CLASSES, c.anchors)
        u_pool = torch.rand(CLASSES, POOL, dtype=torch.float64)
        picks = torch.randint(POOL, (CLASSES, c.anchors, c.keys))
        anchors: list[list[Any]] = [[] for _ in range(CLASSES)]
        for k in range(CLASSES):
            negatives = []
            for p, (b, i, j) in enumerate(pixels):
                if j >= 12:
                    continue
                y, x, probs = 4 * i + 2, 4 * j + 2, small[b, :, i, j]
                rank, own = int((probs > probs[k]).sum()), int(label[b, y, x])
                if own == k and trusted[b, y, x] and probs[k] > c.least:
                    anchors[k].append((b, i, j))
                tempting = b < 2 and own not in (k, IGNORE) and rank < 1
                if tempting or (keyed[b, y, x] and 1 <= rank < 3):
                    negatives.append(p)
            for _, p in sorted((-float(u_keys[k, p]), p) for p in negatives)[: c.push]:
                b, i, j = pixels[p]
                self._push(k, keys[b, :, i, j] / keys[b, :, i, j].square().sum().sqrt())

        terms = []
        for k in range(CLASSES):
            if anchors[k] and self.rings[k]:
                positive = torch.stack([keys[b, :, i, j] for b, i, j in anchors[k]]).mean(0)
                pool = [self.rings[k][int(u * len(self.rings[k]))] for u in u_pool[k]]
                drawn = [anchors[k][int(u * len(anchors[k]))] for u in u_anchors[k]]
                nats = []
                for (b, i, j), chosen in zip(drawn, picks[k].tolist(), strict=True):
                    others = torch.stack([positive, *(pool[r] for r in chosen)])
                    cosines = F.cosine_similarity(features[b, :, i, j].unsqueeze(0), others)
                    nats.append(-(cosines / c.temperature).log_softmax(0)[0])
                terms.append(torch.stack(nats).mean())
        if sum(map(bool, anchors)) < 2:
            return 0 * features.sum()
        return torch.stack(terms).mean()

    def _push(self, k: int, key: Tensor) -> None:
        ring, capacity = self.rings[k], self.config.queue if k else self.config.queue_first
        if len(ring) < capacity:
            ring.append(key)
        else:
            ring[self.pushed[k] % capacity] = key
        self.pushed[k] += 1


@pytest.mark.parametrize(
    "options",
    [
        {"warm_up": 0.125},
        {"warm_up": 0.0, "adaptive": False, "auxiliary": 0.4, "alpha": 47.3, "mix_share": 1.0, "ema": 0.4},
        {"warm_up": 0.0, "weight": 1.5, "temperature": 0.1, "push": 25, "queue": 25, "queue_first": 30, "keys": 9},
    ],
    ids=["defaults", "auxiliary", "contrast"],
)
def test_the_step_is_the_slow_one(options: dict[str, Any]) -> None:
    method = made(**{"quantile": "exact", "anchors": 16, "least": 0.1} | options)
    slow, contrastive = Slow(method), []
    for step in range(4):
        given = batches(step)
        torch.manual_seed(step)
        expected = slow.step(Clock(step, 8), **given)
        torch.manual_seed(step)
        losses = values(method.step(Clock(step, 8), **given))
        for name, value in expected.items():
            accuracy = 1e-6 if name == "reliable" else 1e-9  # a quotient of counts is in float32
            assert losses[name] == pytest.approx(value, rel=accuracy, abs=1e-12), name
        contrastive.append(expected.get("loss_contrastive", 0))
    assert sum(value > 0 for value in contrastive) >= 2
    assert [len(ring) for ring in slow.rings] == method.bank.fill.tolist()
    for mine, its in ((slow.student, method.student), (slow.teacher, method.teacher)):
        assert isinstance(its, Projected)
        for (name, p), q in zip(mine.state_dict().items(), its.state_dict().values(), strict=True):
            torch.testing.assert_close(q, p, rtol=0, atol=1e-9, msg=name)

"""Mean Teacher and CutMix-Seg: the cases that can be computed by hand, and slow versions of their steps."""

import copy
import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from semiseg.methods import CutMixSeg, MeanTeacher
from semiseg.methods.meanteacher import ramped
from semiseg.networks.factory import Build, NetworkConfig, OptimConfig
from semiseg.networks.net import Normalise
from semiseg.ops.colour import strong
from semiseg.types import IGNORE, VIEW, Clock, Labelled, Unlabelled

CLASSES = 3
SIZE = 32
START = Clock(0, 8)

Array = NDArray[Any]
Kind = type[MeanTeacher] | type[CutMixSeg]
both_methods = pytest.mark.parametrize("kind", [MeanTeacher, CutMixSeg])


class Says(nn.Module):
    """A network that sees the same logits (1 or B, C, H, W) in all images, and remembers the images."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.normalise = Normalise((0.2, 0.4, 0.6), (1.0, 1.0, 1.0))
        self.logits = nn.Parameter(logits.double())
        self.saw: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.saw.append(image)
        return self.logits.expand(len(image), -1, -1, -1)


class Pixelwise(nn.Module):
    """A network to which a pixel is the same in every image."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = Normalise((0.2, 0.4, 0.6), (1.0, 1.0, 1.0))
        self.head = nn.Conv2d(3, CLASSES, 1).double()

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image)


def made(
    kind: Kind,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    classes: int = CLASSES,
    **options: Any,
) -> Any:
    """The method in float64; where networks are given, with these, and then an update is the gradient."""
    network = NetworkConfig(name="fpn", encoder="test_resnet", weights="random", options={"decoder_dropout": 0.0})
    method: Any = kind(kind.Config(**options), Build(classes, 3, network, OptimConfig())).double()
    if student is not None and teacher is not None:
        method.student, method.teacher = student, teacher.requires_grad_(False)
        method.optimizers["student"] = torch.optim.SGD(student.parameters(), 1.0)
    return method


def batches(seed: int = 0, images: int = 3, known: bool = True) -> dict[str, Any]:
    """In float64; padding lies at another border in each image. `known`: masks have labels, but not in all pixels."""
    draw = torch.Generator().manual_seed(seed)

    def padded(which: int) -> Tensor:
        valid = torch.ones(images, SIZE, SIZE, dtype=torch.bool)
        valid[which, -9:] = False
        valid[(which + 1) % images, :, -7:] = False
        return valid

    def image() -> Tensor:
        return torch.rand(images, 3, SIZE, SIZE, generator=draw, dtype=torch.float64)

    mask = torch.randint(0, CLASSES, (images, SIZE, SIZE), generator=draw, dtype=torch.uint8)
    mask[torch.rand(mask.shape, generator=draw) < (0.2 if known else 2)] = IGNORE
    row = torch.arange(images)
    labelled = Labelled(
        image(), mask.masked_fill(~padded(0), IGNORE), padded(0), torch.zeros(images, 0, len(VIEW)), row
    )
    table = torch.rand(images, 1, len(VIEW), generator=draw)
    return {"labelled": labelled, "unlabelled": Unlabelled(image(), padded(1), table, row.roll(1), row)}


def slow_box(unlabelled: Unlabelled, area: tuple[float, float]) -> Array:
    box = np.zeros((len(unlabelled.image), SIZE, SIZE), bool)
    for i, row in enumerate(unlabelled.table[:, 0].tolist()):
        u = dict(zip(VIEW, row, strict=True))
        share = area[0] + (area[1] - area[0]) * u["area"]
        high, wide = round(share ** u["ratio"] * SIZE), round(share ** (1 - u["ratio"]) * SIZE)
        top, left = int(u["top"] * (SIZE - high + 1)), int(u["left"] * (SIZE - wide + 1))
        box[i, top : top + high, left : left + wide] = True
    return box


def slow_mix(box: Array, partner: Tensor, what: Array) -> Array:
    mixed = what.copy()
    for i, other in enumerate(partner.tolist()):
        mixed[i, ..., box[i]] = what[other, ..., box[i]]
    return mixed


def slow_softmax(logits: Tensor) -> Array:
    e: Array = np.exp(logits.detach().numpy())
    return e / e.sum(1, keepdims=True)


def slow_cross_entropy(logits: Tensor, mask: Tensor) -> float:
    probs, y = slow_softmax(logits), mask.numpy()
    nats = [-np.log(probs[i, y[i, r, c], r, c]) for i, r, c in np.argwhere(y != IGNORE)]
    return float(np.mean(nats))


def logits_of(*confidences: float) -> Tensor:
    """(1, 2, SIZE, SIZE): as many parts of the columns as numbers, the probabilities of class 1."""
    p = torch.tensor(confidences, dtype=torch.float64).repeat_interleave(SIZE // len(confidences))
    return torch.stack([1 - p, p]).log().clamp(min=-1e3).unsqueeze(1).repeat(1, SIZE, 1).unsqueeze(0)


def random_logits(seed: int, images: int) -> Tensor:
    return torch.randn(images, CLASSES, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def moved(method: Any, given: dict[str, Any]) -> Array:
    """Where an update changes what the student says."""
    before = method.student.logits.detach().clone()
    method.step(START, **given)
    found: Array = (method.student.logits.detach() != before).any(1).numpy()
    return found


# ---- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "expected"), [(MeanTeacher, {}, 1), (CutMixSeg, {"confidence": "none"}, 2)], ids=str
)
def test_opposite_certainties(kind: Kind, options: dict[str, Any], expected: float) -> None:
    """Mean Teacher takes the mean over the classes, CutMix-Seg the sum."""
    method = made(kind, Says(logits_of(0.0)), Says(logits_of(1.0)), classes=2, **options)
    losses = method.step(START, **batches(known=False))
    assert float(losses["loss_consistency"]) == pytest.approx(expected, rel=1e-12)
    assert float(losses["loss"]) == 0


@pytest.mark.parametrize(
    ("confidence", "expected"), [("batch", (2 + 3 * 0.5) / 4 / 4), ("pixel", 2 / 4), ("none", (2 + 3 * 0.5) / 4)]
)
def test_a_quarter_of_the_pixels_is_confident(confidence: str, expected: float) -> None:
    """By one number over the batch the whole map is scaled; by pixel the others are left out."""
    given = batches(known=False)
    given["unlabelled"].valid.fill_(True)
    student, teacher = Says(logits_of(0.0)), Says(logits_of(1.0, 0.5, 0.5, 0.5))
    method = made(CutMixSeg, student, teacher, classes=2, confidence=confidence)
    losses = method.step(START, **given)
    assert float(losses["confident"]) == 0.25
    assert float(losses["loss_consistency"]) == pytest.approx(expected, rel=1e-12)


def test_confident_from_the_threshold_on() -> None:
    teacher = logits_of(0.75, 0.6)
    threshold = float(teacher.softmax(1).amax())
    for value, share in ((threshold, 0.5), (threshold + 1e-9, 0.0)):
        given = batches(known=False)
        given["unlabelled"].valid.fill_(True)
        method = made(CutMixSeg, Says(teacher), Says(teacher.clone()), classes=2, threshold=value)
        losses = method.step(START, **given)
        assert float(losses["confident"]) == share


@pytest.mark.parametrize(
    ("ramp", "step", "expected"),
    [
        (0.0, 0, 1),
        (0.5, 0, math.exp(-5)),
        (0.5, 2, math.exp(-1.25)),
        (0.5, 4, 1),
        (0.5, 7, 1),
        (1.0, 4, math.exp(-1.25)),
    ],
)
@both_methods
def test_the_weight_rises(kind: Kind, ramp: float, step: int, expected: float) -> None:
    assert ramped(step / 8, ramp) == pytest.approx(expected, rel=1e-12)
    says = Says(random_logits(0, 1))
    method = made(kind, says, copy.deepcopy(says), ramp=ramp, weight=6.0)
    with mock.patch.object(method, "backward", wraps=method.backward) as backward:
        method.step(Clock(step, 8), **batches())
    weights = [weight for call in backward.call_args_list for weight, _ in call.args[1:]]
    assert weights == pytest.approx([1, expected * (6 if kind is CutMixSeg else 6 / CLASSES)], rel=1e-12)


# ---- which pixels, and of which image --------------------------------------------------------------------------------


def test_mean_teacher_learns_from_all_that_is_no_padding() -> None:
    given = batches(known=False)
    found = moved(made(MeanTeacher, Says(random_logits(0, 6)), Says(random_logits(1, 6))), given)
    assert np.array_equal(found, np.concatenate([given["labelled"].valid, given["unlabelled"].valid]))


@pytest.mark.parametrize("confidence", ["batch", "pixel", "none"])
@pytest.mark.parametrize("mask", ["cutmix", "cutout"])
def test_cutmixseg_learns_from_these_pixels(mask: str, confidence: str) -> None:
    """Padding stays padding where it is mixed, and of a box that was taken out nothing is learned."""
    given, teacher = batches(known=False), Says(random_logits(1, 3))
    unlabelled = given["unlabelled"]
    options = {"mask": mask, "confidence": confidence, "threshold": 0.6, "area": (0.2, 0.6)}
    found = moved(made(CutMixSeg, Says(random_logits(0, 3)), copy.deepcopy(teacher), **options), given)
    box, valid, sure = slow_box(unlabelled, (0.2, 0.6)), unlabelled.valid.numpy(), slow_softmax(teacher.logits).max(1)
    if mask == "cutmix":
        valid, sure = (slow_mix(box, unlabelled.partner, what) for what in (valid, sure))
    else:
        valid = valid & ~box
    if confidence == "pixel":
        valid = valid & (sure >= 0.6)
    assert 0 < valid.mean() < 1
    assert np.array_equal(found, valid)


@pytest.mark.parametrize("mask", ["cutmix", "cutout"])
@pytest.mark.parametrize("jitter", [False, True])
def test_what_the_networks_see(mask: str, jitter: bool) -> None:
    given = batches()
    unlabelled = given["unlabelled"]
    student, teacher = Says(random_logits(0, 3)), Says(random_logits(1, 3))
    made(CutMixSeg, student, teacher, mask=mask, jitter=jitter, area=(0.2, 0.6)).step(START, **given)
    assert len(teacher.saw) == 1
    assert torch.equal(teacher.saw[0], unlabelled.image)
    assert torch.equal(student.saw[0], given["labelled"].image)

    view, box = unlabelled.image, slow_box(unlabelled, (0.2, 0.6))
    if jitter:
        view = strong(view, unlabelled.view(0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, blur_probability=0.0)
        assert not torch.equal(view, unlabelled.image)
    expected = slow_mix(box, unlabelled.partner, view.numpy())
    if mask == "cutout":
        mean = student.normalise.mean.double().numpy()
        expected = np.where(box[:, None], mean, view.numpy())
    assert np.array_equal(student.saw[1].numpy(), expected)


@pytest.mark.parametrize(("options", "equal"), [({}, True), ({"mask": "cutout"}, True), ({"jitter": True}, False)])
def test_the_mixed_target_fits_the_mixed_image(options: dict[str, Any], equal: bool) -> None:
    """Networks that see the same in a pixel wherever it lies agree, unless its colours were changed."""
    student = Pixelwise()
    method = made(CutMixSeg, student, copy.deepcopy(student), confidence="none", area=(0.2, 0.6), **options)
    loss = float(method.step(START, **batches())["loss_consistency"])
    assert (loss < 1e-25) == equal


@both_methods
def test_nothing_but_padding(kind: Kind) -> None:
    given = batches(known=False)
    for batch in given.values():
        batch.valid.fill_(False)
    method = made(kind, Says(random_logits(0, 1)), Says(random_logits(1, 1)))
    before = method.student.logits.detach().clone()
    losses = method.step(START, **given)
    assert float(losses["loss"]) == float(losses["loss_consistency"]) == 0
    assert torch.equal(method.student.logits, before)


# ---- the whole step, slowly ------------------------------------------------------------------------------------------


def slow_mean_teacher(method: MeanTeacher, labelled: Labelled, unlabelled: Unlabelled) -> dict[str, float]:
    student, teacher = copy.deepcopy(method.student), copy.deepcopy(method.teacher)
    images, count = torch.cat([labelled.image, unlabelled.image]), len(labelled.image)
    logits = student(images)
    difference = (slow_softmax(logits) - slow_softmax(teacher(images))) ** 2
    valid = np.concatenate([labelled.valid, unlabelled.valid])
    consistency = np.mean([difference[i, k, r, c] for i, r, c in np.argwhere(valid) for k in range(CLASSES)])
    return {"loss": slow_cross_entropy(logits[:count], labelled.mask), "loss_consistency": float(consistency)}


def slow_cutmixseg(method: CutMixSeg, labelled: Labelled, unlabelled: Unlabelled) -> dict[str, float]:
    c, student, teacher = method.config, copy.deepcopy(method.student), copy.deepcopy(method.teacher)
    box, valid, image = slow_box(unlabelled, c.area), unlabelled.valid.numpy(), unlabelled.image.numpy()
    probs, seen = slow_softmax(teacher(unlabelled.image)), np.ones_like(valid)
    if c.mask == "cutmix":
        image, valid, probs = (slow_mix(box, unlabelled.partner, what) for what in (image, valid, probs))
    else:
        mean = student.normalise.mean.numpy()
        image, seen = np.where(box[:, None], mean, image), ~box
    difference = (slow_softmax(student(torch.from_numpy(image))) - probs) ** 2
    pixels = [(difference[i, :, r, c].sum() * seen[i, r, c], probs[i, :, r, c].max()) for i, r, c in np.argwhere(valid)]
    share = float(np.mean([sure >= c.threshold for _, sure in pixels]))
    consistency = float(np.mean([d for d, _ in pixels]))
    if c.confidence == "batch":
        consistency *= share
    elif c.confidence == "pixel":
        consistency = float(np.mean([d * (sure >= c.threshold) for d, sure in pixels]))
    loss = slow_cross_entropy(student(labelled.image), labelled.mask)
    return {"loss": loss, "loss_consistency": consistency, "confident": share}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MeanTeacher, {}),
        (MeanTeacher, {"ema": 0.3, "weight": 3.0}),
        (CutMixSeg, {"threshold": 0.7}),
        (CutMixSeg, {"threshold": 0.85, "confidence": "pixel", "area": (0.1, 0.7), "ema": 0.3}),
        (CutMixSeg, {"threshold": 0.7, "confidence": "none", "mask": "cutout"}),
        (CutMixSeg, {"threshold": 0.7, "mask": "cutout", "area": (0.1, 0.7)}),
    ],
    ids=str,
)
def test_the_step_is_the_slow_one(kind: Kind, options: dict[str, Any]) -> None:
    method = made(kind, **options)
    slow: Any = slow_mean_teacher if kind is MeanTeacher else slow_cutmixseg
    shares = []
    for step in range(4):
        given, before = batches(step), copy.deepcopy(method.teacher)
        expected = slow(method, **given)
        losses = {name: float(value) for name, value in method.step(Clock(step, 8), **given).items()}
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert losses[name] == pytest.approx(value, rel=1e-6 if name == "confident" else 1e-10), name
        shares += [value for name, value in losses.items() if name == "confident"]
        decay = min(step / (step + 1), method.config.ema)
        for name, weight in method.teacher.named_parameters():
            average = decay * before.get_parameter(name) + (1 - decay) * method.student.get_parameter(name)
            torch.testing.assert_close(weight, average, rtol=1e-10, atol=1e-14)
    assert method.predictor() is method.teacher
    assert kind is MeanTeacher or any(0.1 < share < 0.9 for share in shares), shares

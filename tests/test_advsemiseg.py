"""AdvSemiSeg: the cases that can be computed by hand, and a slow version of its whole step."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semiseg import testing
from semiseg.data.splits import Data
from semiseg.methods import AdvSemiSeg
from semiseg.networks.factory import Build, NetworkConfig, OptimConfig
from semiseg.testing import Case, Moment
from semiseg.types import IGNORE, Clock, InputError, Labelled, Share, Unlabelled

CLASSES = 3
START, END = Clock(0, 20_000), Clock(19_999, 20_000)


class Watched(AdvSemiSeg):
    """Keeps of each update its terms' weights, whose weights the terms depend on, and all gradients after it."""

    def __init__(self, config: AdvSemiSeg.Config, build: Build) -> None:
        super().__init__(config, build)
        self.asks = False
        self.weights: dict[str, list[float]] = {}
        self.depends: dict[str, list[set[str]]] = {}
        self.grads: dict[str, dict[str, Tensor | None]] = {}

    def step(self, clock: Clock, **batches: Any) -> dict[str, Tensor]:  # type: ignore[override]
        self.weights.clear()
        return super().step(clock, **batches)

    def backward(self, name: str, *terms: tuple[float, Share]) -> list[Tensor]:
        self.weights.setdefault(name, []).extend(weight for weight, _ in terms)
        if self.asks:
            self.depends.setdefault(name, []).extend(self._depends(share.total) for _, share in terms)
        values = super().backward(name, *terms)
        self.grads[name] = {n: None if p.grad is None else p.grad.clone() for n, p in self.named_parameters()}
        return values

    def _depends(self, total: Tensor) -> set[str]:
        names, weights = zip(*self.named_parameters(), strict=True)
        grads = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
        return {name.partition(".")[0] for name, grad in zip(names, grads, strict=True) if grad is not None}


class Says(nn.Module):
    """A critic that answers what it is told, and remembers what it saw."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer.clone())
        self.saw: list[Tensor] = []

    def forward(self, probs: Tensor) -> Tensor:
        self.saw.append(probs)
        return self.answer.expand(len(probs), 1, *probs.shape[2:])


class KnowsMasks(nn.Module):
    """A critic that has won: nothing but a mask is certain of its classes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(60, dtype=torch.float64))

    def forward(self, probs: Tensor) -> Tensor:
        return self.scale * torch.where(probs.amax(1, keepdim=True) > 1 - 1e-9, 1, -1)


def built(precision: torch.dtype | None = None) -> Build:
    network = NetworkConfig(name="fpn", encoder="test_resnet", weights="random", options={"decoder_dropout": 0.0})
    return Build(CLASSES, 3, network, OptimConfig(), precision=precision)


def made(other: nn.Module | None = None, **options: Any) -> Watched:
    """The method in float64; `other` takes the place of its critic."""
    method = Watched(AdvSemiSeg.Config(**options), built()).double()
    if other is not None:
        method.add_module("critic", other)
        method.optimizers["critic"] = torch.optim.Adam(other.parameters(), 1e-4)
    return method


def batches(seed: int = 0, images: int = 2, size: tuple[int, int] = (64, 64)) -> dict[str, Any]:
    """In float64; the masks have IGNORE, and the unlabelled images padding, each in places of its own."""
    draw = torch.Generator().manual_seed(seed)
    shape, everywhere = (images, *size), torch.ones(images, *size, dtype=torch.bool)

    def image() -> Tensor:
        return torch.rand(images, 3, *size, generator=draw, dtype=torch.float64)

    def labelled() -> Labelled:
        mask = torch.randint(0, CLASSES, shape, generator=draw, dtype=torch.uint8)
        mask[torch.rand(shape, generator=draw) < 0.2] = IGNORE
        return Labelled(image(), mask, everywhere, torch.zeros(images, 0, 13), torch.arange(images))

    one, real, valid = labelled(), labelled(), everywhere.clone()
    one.mask[0, :20] = IGNORE
    real.mask[-1, -11:] = IGNORE
    valid[0, :, -13:] = False
    unlabelled = Unlabelled(image(), valid, torch.zeros(images, 0, 13), torch.arange(images), torch.arange(images))
    return {"labelled": one, "real": real, "unlabelled": unlabelled}


def quarters(*confidences: float) -> Tensor:
    """(1, 1, 64, 64) answers whose sigmoids are the four numbers, in 16 columns each."""
    return torch.tensor(confidences, dtype=torch.float64).logit().repeat_interleave(16).expand(1, 1, 64, 64)


def values(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in losses.items()}


def student_of(method: AdvSemiSeg) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in method.student.named_parameters()}


def furthest(method: AdvSemiSeg, before: dict[str, Tensor]) -> float:
    """The largest change of a weight of the student."""
    return max(float((p.detach() - before[name]).abs().max()) for name, p in method.student.named_parameters())


def bias(critic: nn.Module, value: float) -> None:
    """Makes the critic certain of one answer, whatever it sees."""
    with torch.no_grad():
        list(critic.parameters())[-1].fill_(value)


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_what_each_loss_depends_on() -> None:
    """L_semi takes the critic's answers as a condition only, and the critic learns from predictions as they are."""
    method = made(critic_unlabelled=True)
    method.asks = True
    losses = method.step(END, **batches(images=1))
    both = {"student", "critic"}
    assert method.depends == {"student": [{"student"}, both, both, {"student"}], "critic": [{"critic"}, {"critic"}]}
    assert not any(value.requires_grad for value in losses.values())


def test_each_update_has_gradients_for_its_own_network_alone() -> None:
    method = made()
    method.step(END, **batches())
    for name, grad in method.grads["student"].items():
        assert (grad is None) == name.startswith("critic."), name
    for name, grad in method.grads["critic"].items():
        assert (grad is None) == name.startswith("student."), name
    assert all(p.requires_grad and p.grad is None for p in method.parameters())


def test_the_critics_update_leaves_gradients_of_the_student() -> None:
    method = made()
    method.step(END, **batches())
    for p in method.student.parameters():
        p.grad = torch.full_like(p, 7)
    given = batches()
    probs = method.student(given["labelled"].image).softmax(1).detach()
    method._teach_critic(probs, given["labelled"].mask != IGNORE, given["real"].mask)
    assert all(bool((p.grad == 7).all()) for p in method.student.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in method.student.parameters())


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_under_a_dead_critic_adversarial_losses_are_ln_2_and_training_goes_on() -> None:
    method = made()
    with torch.no_grad():
        for p in method.critic.parameters():
            p.zero_()
    for seed in range(3):
        before = student_of(method)
        losses = values(method.step(END, **batches(seed)))
        for name in ("loss_adv", "loss_adv_unlabelled", "loss_critic"):
            assert losses[name] == pytest.approx(math.log(2), rel=1e-6), name
        assert losses["selected"] == 1
        assert all(math.isfinite(losses[name]) for name in ("loss", "loss_semi"))
        assert furthest(method, before) > 0
    assert all(p.isfinite().all() for p in method.parameters())


def test_pixels_are_selected_from_the_threshold_on() -> None:
    given = batches()
    given["unlabelled"] = replace(given["unlabelled"], valid=torch.ones(2, 64, 64, dtype=torch.bool))
    answers = quarters(0.1, 0.2, 0.3, 0.9)
    threshold = float(answers[0, 0, 0, 16].sigmoid())
    assert threshold == pytest.approx(0.2)
    method = made(Says(answers), threshold=threshold)
    student = copy.deepcopy(method.student)
    losses = values(method.step(END, **given))
    assert losses["selected"] == 3 / 4
    with torch.no_grad():
        nats = -student(given["unlabelled"].image).log_softmax(1).amax(1)
    assert losses["loss_semi"] == pytest.approx(float(nats[..., 16:].mean()), rel=1e-12)


def test_padding_is_not_selected() -> None:
    given = batches()
    losses = values(made(Says(quarters(0.1, 0.3, 0.3, 0.9))).step(END, **given))
    valid = given["unlabelled"].valid
    assert losses["selected"] == pytest.approx(float(valid[..., 16:].sum() / valid.sum()))


@pytest.mark.parametrize(("weight", "moves"), [(0.001, True), (0.0, False)])
def test_where_no_pixel_is_selected_the_adversarial_loss_remains(weight: float, moves: bool) -> None:
    """Released code drops the unlabelled images altogether in such an iteration."""
    method, given = made(lambda_adv_unlabelled=weight), batches()
    bias(method.critic, -12)
    given["labelled"].mask.fill_(IGNORE)
    losses = values(method.step(END, **given))
    assert losses["selected"] == losses["loss_semi"] == 0
    assert losses["loss_adv_unlabelled"] == pytest.approx(12, rel=0.1)
    grads = [grad for name, grad in method.grads["student"].items() if name.startswith("student.")]
    assert any(grad is not None and bool(grad.any()) for grad in grads) == moves


def test_answers_on_the_same_side_of_the_threshold_select_the_same() -> None:
    semi = [
        values(made(Says(quarters(*answers))).step(END, **batches()))["loss_semi"]
        for answers in ((0.1, 0.25, 0.3, 0.9), (0.19, 0.7, 0.21, 0.4), (0.1, 0.15, 0.3, 0.9))
    ]
    assert semi[0] == semi[1] != semi[2]


def test_answers_at_ignored_pixels_count_nowhere() -> None:
    given = batches()
    for name in ("labelled", "real"):
        given[name].mask[:, :9] = IGNORE
    given["unlabelled"].valid[:, :9] = False
    answers = quarters(0.1, 0.25, 0.3, 0.9)
    altered = answers.clone()
    altered[:, :, :9] = 5 - 3 * altered[:, :, :9]
    found = []
    for answer in (answers, altered):
        method = made(Says(answer), critic_unlabelled=True)
        found.append(values(method.step(END, **given)))
        grad = method.grads["critic"]["critic.answer"]
        assert grad is not None
        assert not grad[:, :, :9].any()
        assert grad[:, :, 9:].any()
    assert found[0] == found[1]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_what_the_critic_sees(smoothing: float) -> None:
    """Predictions before the update, of labelled images, and masks of others: zeros where they are unknown."""
    critic, given = Says(quarters(0.5, 0.5, 0.5, 0.5)), batches()
    method = made(critic, real_smoothing=smoothing)
    student = copy.deepcopy(method.student)
    method.step(END, **given)
    of_labelled, of_unlabelled, seen = critic.saw
    assert torch.equal(of_labelled, student(given["labelled"].image).softmax(1))
    assert torch.equal(of_unlabelled, student(given["unlabelled"].image).softmax(1))
    assert torch.equal(seen[:2], of_labelled)
    mask = given["real"].mask.long()
    known = (mask != IGNORE).unsqueeze(1).double()
    own = F.one_hot(mask.clamp(max=CLASSES - 1), CLASSES).movedim(3, 1) * known
    expected = own * (1 - smoothing) + (1 - own) * known * smoothing / (CLASSES - 1)
    torch.testing.assert_close(seen[2:], expected, rtol=1e-15, atol=0)
    assert seen.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "step", "expected"),
    [
        ({}, 0, [1, 0.01, 0.001, 0]),
        ({}, 4_999, [1, 0.01, 0.001, 0]),
        ({}, 5_000, [1, 0.01, 0.001, 0.1]),
        ({"semi_start": 0.0, "adv_start": 0.3}, 5_999, [1, 0.01, 0, 0.1]),
        ({"semi_start": 0.0, "adv_start": 0.3}, 6_000, [1, 0.01, 0.001, 0.1]),
        ({"lambda_adv": 0.2, "lambda_adv_unlabelled": 0.0, "lambda_semi": 0.5}, 5_000, [1, 0.2, 0, 0.5]),
    ],
)
def test_weights_of_the_losses_by_the_clock(options: dict[str, Any], step: int, expected: list[float]) -> None:
    method = made(**options)
    method.step(Clock(step, 20_000), **batches())
    assert method.weights == {"student": expected, "critic": [0.5, 0.5]}


def test_rates_of_the_paper(tmp_path: Path) -> None:
    optim = OptimConfig(name="sgd", lr=2.5e-4, head_lr=10, weight_decay=5e-4)
    paper = {0: 2.5e-4, 5_000: 1.930e-4, 10_000: 1.340e-4, 19_999: 3.4e-8}
    for step, rate in paper.items():
        assert 2.5e-4 * optim.rate(step / 20_000) == pytest.approx(rate, rel=0.011)  # the last is given with two digits

    case, found = Case("advsemiseg", tmp_path), []

    def look(moment: Moment) -> dict[str, Tensor]:
        (encoder, rest), (critic,) = (moment.method.optimizers[name].param_groups for name in ("student", "critic"))
        assert rest["lr"] == pytest.approx(10 * encoder["lr"], rel=1e-12)
        found.append((moment.clock.step, encoder["lr"], critic["lr"]))
        return {"loss": torch.zeros(())}

    data = case.data()
    testing.run(case, "run", look, replace(data, val=data.val[:0]), steps=8)
    assert found == [
        (t, pytest.approx(0.03 * (1 - t / 8) ** 0.9), pytest.approx(1e-4 * (1 - t / 8) ** 0.9)) for t in range(8)
    ]


# ---- critics that have won, one answer an image, bfloat16 ------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["says no to everything", "knows masks"])
def test_training_goes_on_under_a_critic_that_has_won(known: bool) -> None:
    method = made(KnowsMasks() if known else None)
    for seed in range(3):
        if not known:
            bias(method.critic, -60)
        before = student_of(method)
        losses = values(method.step(END, **batches(seed)))
        assert all(math.isfinite(value) for name, value in losses.items() if name.startswith("loss"))
        assert losses["selected"] == losses["loss_semi"] == 0
        assert losses["loss_adv"] > 50
        assert losses["critic_accuracy"] == 1 if known else 0.3 < losses["critic_accuracy"] < 0.7
        assert (losses["loss_critic"] < 1e-6) == known
        assert furthest(method, before) > 0
    assert all(p.isfinite().all() for p in method.parameters())


def test_how_well_the_critic_judges() -> None:
    given = batches()
    method = made(Says(quarters(0.1, 0.1, 0.9, 0.9)))
    student = copy.deepcopy(method.student)
    losses = values(method.step(START, **given))
    mask, real = given["labelled"].mask, given["real"].mask
    right = student(given["labelled"].image).argmax(1) == mask
    for name, columns in (("accuracy_rejected", slice(0, 32)), ("accuracy_selected", slice(32, 64))):
        known = (mask != IGNORE)[..., columns]
        assert losses[name] == pytest.approx(float(right[..., columns][known].double().mean()), rel=1e-6)
    known_p, known_m = mask != IGNORE, real != IGNORE
    correct = known_p[..., :32].sum() + known_m[..., 32:].sum()
    assert losses["critic_accuracy"] == pytest.approx(float(correct / (known_p.sum() + known_m.sum())))


def test_a_step_in_bfloat16() -> None:
    method = AdvSemiSeg(AdvSemiSeg.Config(), built(precision=torch.bfloat16))
    exact = AdvSemiSeg(AdvSemiSeg.Config(), built())
    given = {name: replace(batch, image=batch.image.float()) for name, batch in batches().items()}
    rough, fine = method.step(END, **given), exact.step(END, **given)
    for name, value in rough.items():
        assert value.dtype == fine[name].dtype == torch.float32, name
        if name.startswith("loss"):
            assert float(value) == pytest.approx(float(fine[name]), rel=0.05), name
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in method.parameters())


# ---- streams ---------------------------------------------------------------------------------------------------------


def without_unlabelled(case: Case) -> Data:
    data = case.data()
    config = data.config.model_copy(update={"unlabelled": "none"})
    return replace(data, config=config, unlabelled=data.unlabelled[:0], val=data.val[:0])


def test_masks_are_drawn_apart_from_the_images_whose_predictions_the_critic_sees(tmp_path: Path) -> None:
    rows: dict[str, list[list[int]]] = {"labelled": [], "real": []}

    def look(moment: Moment) -> dict[str, Tensor]:
        for name, found in rows.items():
            found.append(moment.batches[name].row.tolist())
        return {"loss": torch.zeros(())}

    case = Case("advsemiseg", tmp_path)
    data = case.data()
    testing.run(case, "run", look, replace(data, val=data.val[:0]), steps=6, batch=2)
    assert rows["labelled"] != rows["real"]
    assert {i for row in rows["real"] for i in row} == set(range(4))


def test_without_unlabelled_images_it_learns_from_labelled_ones(tmp_path: Path) -> None:
    """The paper's L_ce + L_adv, with full labels."""
    case = Case("advsemiseg", tmp_path, {"lambda_semi": 0.0, "lambda_adv_unlabelled": 0.0})
    found = []

    def look(moment: Moment) -> dict[str, Tensor]:
        found.append((set(moment.batches), moment.go()))
        return found[-1][1]

    testing.run(case, "run", look, without_unlabelled(case), steps=3)
    names = {"loss", "loss_adv", "loss_critic", "critic_accuracy", "accuracy_selected", "accuracy_rejected"}
    assert [set(scalars) for _, scalars in found] == [names] * 3
    assert [streams for streams, _ in found] == [{"labelled", "real"}] * 3


@pytest.mark.parametrize(
    "options", [{"lambda_semi": 0.1}, {"lambda_adv_unlabelled": 0.001}, {"critic_unlabelled": True}], ids=str
)
def test_options_of_unlabelled_images_where_there_are_none(tmp_path: Path, options: dict[str, Any]) -> None:
    case = Case("advsemiseg", tmp_path, options)
    expected = rf"^method\.{next(iter(options))} is given, but data\.unlabelled is none: remove the one or the other\.$"
    with pytest.raises(InputError, match=expected):
        testing.run(case, "run", data=without_unlabelled(case), steps=3)


# ---- the whole step, slowly ------------------------------------------------------------------------------------------


def slow_bce(answer: Tensor, target: float, counted: Tensor) -> Tensor:
    d = answer[:, 0]
    nats = d.clamp(min=0) - d * target + torch.log(1 + torch.exp(-d.abs()))
    return (counted * nats).sum() / max(1, int(counted.sum()))


def slow_ce(logits: Tensor, label: Tensor, counted: Tensor) -> Tensor:
    probs = logits.exp() / logits.exp().sum(1, keepdim=True)
    own = probs.gather(1, label.clamp(max=CLASSES - 1).unsqueeze(1))[:, 0]
    return -(counted * own.log()).sum() / max(1, int(counted.sum()))


class Slow:
    """One step as the method's description has it: the critic frozen, one backward pass a loss, then both steps."""

    def __init__(self, method: AdvSemiSeg) -> None:
        self.student, c = copy.deepcopy(method.student), method.config
        self.config, self.unlabelled = c, c.critic_unlabelled
        convolutions = [layer for layer in copy.deepcopy(method.critic).layers if isinstance(layer, nn.Conv2d)]
        self.critic = [w for conv in convolutions for w in (conv.weight, conv.bias) if w is not None]
        encoder = list(self.student.get_submodule("encoder").parameters())
        rest = [p for p in self.student.parameters() if all(p is not q for q in encoder)]
        groups = [{"params": encoder, "lr": 3e-4}, {"params": rest, "lr": 3e-3}]
        self.of_student = torch.optim.AdamW(groups, weight_decay=0.01)
        self.of_critic = torch.optim.Adam(self.critic, 1e-4, betas=(0.9, 0.99))

    def judge(self, probs: Tensor) -> Tensor:
        size, scale = probs.shape[2:], self.config.critic_scale
        x = probs
        if scale != 1:
            larger = [int(side * scale + 0.5) for side in size]
            x = F.interpolate(probs, size=larger, mode="bilinear", align_corners=False)
        for i in range(5):
            x = F.conv2d(x, self.critic[2 * i], self.critic[2 * i + 1], stride=2, padding=1)
            x = x if i == 4 else torch.maximum(x, 0.2 * x)
        if self.config.critic == "image":
            return x.mean((2, 3), keepdim=True) + torch.zeros(1, 1, *size)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    def step(self, progress: float, labelled: Labelled, real: Labelled, unlabelled: Unlabelled) -> dict[str, float]:
        c = self.config
        self.of_student.zero_grad()
        self.of_critic.zero_grad()
        for w in self.critic:
            w.requires_grad_(False)

        logits_u = self.student(unlabelled.image)
        answer_u = self.judge(torch.softmax(logits_u, 1))
        adversarial_u = slow_bce(answer_u, 1, unlabelled.valid)
        loss = (0.001 if c.lambda_adv_unlabelled is None else c.lambda_adv_unlabelled) * adversarial_u
        confidence = torch.sigmoid(answer_u.detach())[:, 0]
        selected = (confidence >= c.threshold) & unlabelled.valid
        semi = slow_ce(logits_u, logits_u.detach().argmax(1), selected)
        if progress >= c.semi_start:
            loss = loss + (0.1 if c.lambda_semi is None else c.lambda_semi) * semi
        torch.autograd.backward(loss)

        known = labelled.mask != IGNORE
        logits = self.student(labelled.image)
        supervised = slow_ce(logits, labelled.mask.long(), known)
        adversarial = slow_bce(self.judge(torch.softmax(logits, 1)), 1, known)
        torch.autograd.backward(supervised + c.lambda_adv * adversarial)

        for w in self.critic:
            w.requires_grad_(True)
        fake, counted = torch.softmax(logits.detach(), 1), known
        if c.critic_unlabelled:
            fake = torch.cat([fake, torch.softmax(logits_u.detach(), 1)])
            counted = torch.cat([known, unlabelled.valid])
        doubt = slow_bce(self.judge(fake), 0, counted)
        torch.autograd.backward(doubt / 2)
        true = torch.zeros(len(real.mask), CLASSES, *real.mask.shape[1:], dtype=torch.float64)
        for k in range(CLASSES):
            for other in range(CLASSES):
                share = 1 - c.real_smoothing if k == other else c.real_smoothing / (CLASSES - 1)
                true[:, k][real.mask == other] = share
        trust = slow_bce(self.judge(true), 1, real.mask != IGNORE)
        torch.autograd.backward(trust / 2)
        self.of_student.step()
        self.of_critic.step()
        losses = {"loss": supervised, "loss_adv": adversarial, "loss_adv_unlabelled": adversarial_u, "loss_semi": semi}
        losses |= {"loss_critic": doubt / 2 + trust / 2, "selected": selected.sum() / unlabelled.valid.sum()}
        return values({name: value.detach() for name, value in losses.items()})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.4999, "critic_unlabelled": True, "real_smoothing": 0.1, "critic_scale": 1.5, "semi_start": 0.0},
        {"threshold": 0.5, "critic": "image", "lambda_adv": 0.3, "lambda_adv_unlabelled": 0.2, "lambda_semi": 0.4},
    ],
    ids=["defaults", "critic options", "image"],
)
def test_the_step_is_the_slow_one(options: dict[str, Any]) -> None:
    method = made(**options)
    slow = Slow(method)
    for step in range(3):
        given = batches(step)
        losses, expected = values(method.step(Clock(step, 8), **given)), slow.step(step / 8, **given)
        assert {name: losses[name] for name in expected} == pytest.approx(expected, rel=1e-10, abs=1e-12)
    for name, p in slow.student.named_parameters():
        torch.testing.assert_close(method.student.get_parameter(name), p, rtol=0, atol=1e-10)
    for p, q in zip(method.critic.parameters(), slow.critic, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)

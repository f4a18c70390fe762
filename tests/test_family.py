"""FixMatch, CPS, UniMatch and UniMatch V2: a step against one that is written down slowly, and what perturbs what."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semiseg.methods import CPS, FixMatch, UniMatch, UniMatchV2
from semiseg.networks import deeplabv2
from semiseg.networks.factory import Build, NetworkConfig, OptimConfig
from semiseg.networks.weights import save_model
from semiseg.ops.colour import strong
from semiseg.ops.dropout import ComplementaryDropout
from semiseg.ops.mix import cutmix_box, mix
from semiseg.types import IGNORE, VIEW, Clock, Labelled, Unlabelled

CLASSES, SIZE, START = 3, 32, Clock(0, 10)


def method_of(kind: Any, **options: Any) -> Any:
    """In float64, without momentum and weight decay, so that an update is the gradient."""
    network = NetworkConfig(name="fpn", encoder="test_resnet", weights="random", options={"decoder_dropout": 0.0})
    method = kind(kind.Config(**options), Build(CLASSES, 3, network, OptimConfig())).double()
    for name, optimizer in method.optimizers.items():
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        method.optimizers[name] = torch.optim.SGD(weights, 1e-3)
    return method


def batches(views: int, images: int = 4) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)

    def image() -> Tensor:
        return torch.rand(images, 3, SIZE, SIZE, generator=draw, dtype=torch.float64)

    valid = torch.ones(images, SIZE, SIZE, dtype=torch.bool)
    valid[1, -9:] = False
    valid[2, :, -7:] = False
    mask = torch.randint(0, CLASSES, valid.shape, generator=draw, dtype=torch.uint8).masked_fill(~valid, IGNORE)
    row = torch.arange(images)
    labelled = Labelled(image(), mask, valid, torch.zeros(images, 0, len(VIEW)), row)
    table = torch.rand(images, views, len(VIEW), generator=draw)
    return {"labelled": labelled, "unlabelled": Unlabelled(image(), valid, table, row.roll(1), row)}


def nats(logits: Tensor, label: Tensor, selected: Tensor, valid: Tensor) -> Tensor:
    """Summed over the selected pixels, divided by the valid ones."""
    each = F.cross_entropy(logits, label.long().clamp(max=CLASSES - 1), reduction="none")
    return (each * (selected & valid)).sum() / valid.sum()


def gradient_of(net: nn.Module, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(net.parameters(), found, strict=True)]


def same_update(before: list[Tensor], net: nn.Module, gradient: list[Tensor]) -> bool:
    after = [w.detach() for w in net.parameters()]
    return all(torch.allclose(b - a, 1e-3 * g, atol=1e-10) for a, b, g in zip(after, before, gradient, strict=True))


def kept(net: nn.Module) -> list[Tensor]:
    return [w.detach().clone() for w in net.parameters()]


# ---- FixMatch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", ["apart", "joint"])
def test_fixmatch(forward: str) -> None:
    """The update is the gradient of half the labelled loss and half that to the teacher's confident labels."""
    method, given = method_of(FixMatch, forward=forward, weight=1.5), batches(1)
    labelled, unlabelled, net = given["labelled"], given["unlabelled"], method.student
    confidence, label = method.teacher(unlabelled.image).softmax(1).max(1)
    confident = confident_half(method, confidence) & unlabelled.valid
    assert 0 < confident.sum() < unlabelled.valid.sum()
    c, u = method.config, unlabelled.view(0)
    image = strong(unlabelled.image, u, c.jitter, blur_probability=c.blur, sigma=c.sigma)
    box = cutmix_box(u, (SIZE, SIZE), c.cutmix_area, c.cutmix)
    image, *mixed = mix(box, unlabelled.partner, image, label, confident, unlabelled.valid)
    logits, logits_strong = (
        net(torch.cat([labelled.image, image])).split([4, 4])
        if forward == "joint"
        else (net(labelled.image), net(image))
    )
    known = labelled.mask != IGNORE
    unsure = nats(logits_strong, *mixed)
    gradient = gradient_of(net, 0.5 * nats(logits, labelled.mask, known, known) + 0.5 * 1.5 * unsure)
    before = kept(net)
    scalars = method.step(START, **given)
    assert scalars["loss_unlabelled"].item() == pytest.approx(unsure.item())
    assert same_update(before, net, gradient)
    assert all(torch.equal(a, b) for a, b in zip(method.teacher.parameters(), net.parameters(), strict=True))
    assert method.predictor() is method.teacher


# ---- CPS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cutmix", [True, False])
def test_cps(cutmix: bool) -> None:
    """Each network's update is the gradient of its own cross-entropy and of that to the other's labels."""
    method, given = method_of(CPS, cutmix=cutmix, weight=1.5), batches(1)
    labelled, unlabelled = given["labelled"], given["unlabelled"]
    nets = [method.first, method.second]
    image, valid = unlabelled.image, unlabelled.valid
    with torch.no_grad():
        labels = [net(image).argmax(1) for net in nets]
        if cutmix:
            box = cutmix_box(unlabelled.view(0), (SIZE, SIZE), (0.25, 0.5), 1.0)
            image, valid, *labels = mix(box, unlabelled.partner, image, valid, *labels)
        else:
            image, valid = torch.cat([labelled.image, image]), torch.cat([labelled.valid, valid])
            labels = [
                torch.cat([net(labelled.image).argmax(1), found]) for net, found in zip(nets, labels, strict=True)
            ]
    gradients, cross = [], []
    for net, label in zip(nets, reversed(labels), strict=True):
        logits = net(labelled.image)
        crossing = net(image) if cutmix else torch.cat([logits, net(unlabelled.image)])
        cross.append(nats(crossing, label, valid, valid))
        loss = nats(logits, labelled.mask, labelled.mask != IGNORE, labelled.mask != IGNORE) + 1.5 * cross[-1]
        gradients.append(gradient_of(net, loss))
    before = [kept(net) for net in nets]
    scalars = method.step(START, **given)
    assert scalars["loss_cross"].item() == pytest.approx(sum(cross).item())
    for net, old, gradient in zip(nets, before, gradients, strict=True):
        assert same_update(old, net, gradient)


def test_cps_is_symmetric() -> None:
    """Swapped networks have the same losses (methods.md, case 7), and both start from other weights."""
    one, other, given = method_of(CPS), method_of(CPS), batches(1)
    assert not torch.equal(one.first.head.weight, one.second.head.weight)
    other.first.load_state_dict(one.second.state_dict())
    other.second.load_state_dict(one.first.state_dict())
    a, b = one.step(START, **given), other.step(START, **given)
    assert a["loss_cross"].item() == pytest.approx(b["loss_cross"].item())
    assert a["loss"].item() == pytest.approx(b["loss_second"].item())
    assert a["agreement"].item() == b["agreement"].item()
    assert one.predictor() is one.first


@pytest.mark.parametrize("weights", ["random", "run", "released"])
def test_the_networks_of_cps_differ(weights: str, tmp_path: Path) -> None:
    """Also where a run or a file has weights of the whole network: two that are one learn nothing from each other."""
    names = tuple("abc")
    options: dict[str, Any] = {"name": "fpn", "options": {"decoder_dropout": 0.0}}
    if weights == "released":
        options = {"name": "deeplabv2"}
    plain = Build(CLASSES, 3, NetworkConfig(encoder="test_resnet", weights="random", **options), OptimConfig())
    config = plain.config
    if weights == "run":
        card = {"network": config.model_dump(mode="json"), "classes": names, "channels": 3}
        save_model(tmp_path / "run/model", plain.network(7).state_dict(), card)
        config = config.model_copy(update={"weights": "run"})
    if weights == "released":
        net = plain.parts(7)
        tensors = {name.removeprefix("model."): t for name, t in net.encoder.state_dict().items()}
        heads = {name: t.clone() for name, t in deeplabv2.head_names(net.head).items()}
        torch.save(tensors | heads, tmp_path / "released.pth")
        config = config.model_copy(update={"weights": "released.pth"})
    build = replace(plain, config=config, base=tmp_path, names=names)
    method = CPS(CPS.Config(), build)
    one, other = method.first.state_dict(), method.second.state_dict()
    assert not all(torch.equal(t, other[name]) for name, t in one.items() if name.startswith("head."))
    if weights != "random":
        assert all(torch.equal(t, other[name]) for name, t in one.items() if name.startswith("encoder."))


# ---- UniMatch --------------------------------------------------------------------------------------------------------


def confident_half(method: Any, confidence: Tensor) -> Tensor:
    """The surer half of the pixels, from now on also for the method."""
    threshold = float(confidence.median())
    method.config = method.config.model_copy(update={"threshold": threshold})
    return confidence >= threshold


def views_of(method: Any, unlabelled: Unlabelled, label: Tensor, confident: Tensor) -> list[tuple[Tensor, ...]]:
    c, found = method.config, []
    for i in (0, 1):
        u = unlabelled.view(i)
        image = strong(unlabelled.image, u, c.jitter, blur_probability=c.blur, sigma=c.sigma)
        box = cutmix_box(u, (SIZE, SIZE), c.cutmix_area, c.cutmix)
        found.append(mix(box, unlabelled.partner, image, label, confident, unlabelled.valid))
    return found


def test_unimatch() -> None:
    """The whole step against its definition; every channel of the perturbed maps is 0, or twice what it was."""
    method, given = method_of(UniMatch), batches(2)
    labelled, unlabelled, net = given["labelled"], given["unlabelled"], method.student
    torch.manual_seed(1)
    maps = net.encode(torch.cat([labelled.image, unlabelled.image]))
    perturbed = [F.dropout2d(m[4:], 0.5) for m in maps]
    for m, p in zip(maps, perturbed, strict=True):
        channels = (p.flatten(2) == 0).all(2)
        assert 0 < channels.sum() < channels.numel()
        assert torch.equal(p[~channels], 2 * m[4:][~channels])
    fused = net.fuse([torch.cat(both) for both in zip(maps, perturbed, strict=True)])
    logits, weak, features = net.classify(fused, (SIZE, SIZE)).split([4, 4, 4])
    confidence, label = weak.detach().softmax(1).max(1)
    confident = confident_half(method, confidence) & unlabelled.valid
    assert 0 < confident.sum() < unlabelled.valid.sum()
    views = views_of(method, unlabelled, label, confident)
    both = net(torch.cat([view[0] for view in views])).split([4, 4])
    parts = [nats(z, *view[1:]) for z, view in zip(both, views, strict=True)]
    features_loss = nats(features, label, confident, unlabelled.valid)
    known = labelled.mask != IGNORE
    loss = 0.5 * (nats(logits, labelled.mask, known, known) + 0.25 * sum(parts) + 0.5 * features_loss)
    gradient, before = gradient_of(net, loss), kept(net)
    torch.manual_seed(1)
    scalars = method.step(START, **given)
    assert scalars["loss_strong"].item() == pytest.approx((sum(parts) / 2).item())
    assert scalars["loss_features"].item() == pytest.approx(features_loss.item())
    assert same_update(before, net, gradient)


def test_whole_features_are_a_plain_forward() -> None:
    """Beside the perturbed ones, the others give what a forward alone gives (methods.md, case 37)."""
    method, given = method_of(UniMatch).eval(), batches(2)
    both = torch.cat([given["labelled"].image, given["unlabelled"].image])
    with torch.no_grad():
        labelled, weak, features = method._weak(both, 4)
        assert torch.allclose(torch.cat([labelled, weak]), method.student(both), atol=1e-12)
    method.train()
    assert not torch.equal(method._weak(both, 4)[2], features)


def weights_of(kind: Any) -> float:
    """The sum of a step's terms, if each were 1."""
    method = method_of(kind)
    with mock.patch.object(method, "backward", wraps=method.backward) as backward:
        method.step(START, **batches(2))
    return float(sum(weight for call in backward.call_args_list for weight, _ in call.args[1:]))


@pytest.mark.parametrize("kind", [UniMatch, UniMatchV2])
def test_the_weights_add_up_to_one(kind: Any) -> None:
    assert weights_of(kind) == 1


# ---- UniMatch V2 -----------------------------------------------------------------------------------------------------


def test_unimatchv2() -> None:
    """The teacher labels; the views have complementary channels; the labelled images keep all of theirs."""
    method, given = method_of(UniMatchV2), batches(2)
    labelled, unlabelled, net = given["labelled"], given["unlabelled"], method.student
    confidence, label = method.teacher(unlabelled.image).softmax(1).max(1)
    confident = confident_half(method, confidence) & unlabelled.valid
    assert 0 < confident.sum() < unlabelled.valid.sum()
    views = views_of(method, unlabelled, label, confident)
    logits = net(labelled.image)
    torch.manual_seed(1)
    maps = method.drop(net.encode(torch.cat([view[0] for view in views])))
    both = net.classify(net.fuse(maps), (SIZE, SIZE)).split([4, 4])
    parts = [nats(z, *view[1:]) for z, view in zip(both, views, strict=True)]
    known = labelled.mask != IGNORE
    loss = 0.5 * (nats(logits, labelled.mask, known, known) + 0.5 * sum(parts))
    gradient, before = gradient_of(net, loss), kept(net)
    torch.manual_seed(1)
    scalars = method.step(START, **given)
    assert scalars["loss_strong"].item() == pytest.approx((sum(parts) / 2).item())
    assert same_update(before, net, gradient)
    assert all(torch.equal(a, b) for a, b in zip(method.teacher.parameters(), net.parameters(), strict=True))
    assert method.predictor() is method.teacher


@pytest.mark.parametrize(("images", "whole"), [(1, 0), (2, 1), (3, 1), (4, 2), (9, 4)])
@pytest.mark.parametrize("widths", [(7, 7, 7, 7), (5, 8, 16)])
def test_complementary_channels(images: int, whole: int, widths: tuple[int, ...]) -> None:
    drop = ComplementaryDropout()
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        maps = [torch.ones(2 * images, width, 3, 2) for width in widths]
        found = drop(maps)
        masks = [m[:, :, 0, 0] for m in found]
        assert all(torch.equal(m, mask[:, :, None, None].expand_as(m)) for m, mask in zip(found, masks, strict=True))
        first, second = (torch.cat([m[i * images : (i + 1) * images] for m in masks], 1) for i in (0, 1))
        assert torch.equal(first + second, torch.full_like(first, 2))
        kept_whole = (first == 1).all(1)
        assert int(kept_whole.sum()) == whole
        assert set(first[~kept_whole].unique().tolist()) <= {0.0, 2.0}
        if len(set(widths)) == 1:
            assert all(torch.equal(m, masks[0]) for m in masks)
        seen.add(tuple(kept_whole.tolist()))
    assert images == 1 or len(seen) > 1
    assert drop.eval()(maps) is maps

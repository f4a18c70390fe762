"""Every method that is one loop of steps with every decoder, optimiser and rate, and with a frozen encoder: one step.

Methods in stages (self-training, ST, ST++, transfer) train each network through one of these loops.
"""

from typing import Any

import pytest
import torch

from semiseg.methods import METHODS, StepMethod
from semiseg.networks.factory import _NAMES, Build, NetworkConfig, OptimConfig
from semiseg.types import VIEW, Clock, InputError, Labelled, Unlabelled

SIZE, CLASSES, BATCH = 64, 4, 2
STEPS: dict[str, Any] = {name: kind for name, kind in METHODS.items() if issubclass(kind, StepMethod)}
OPTIONS: dict[str, dict[str, Any]] = {
    "u2pl": {"width": 8, "queue": 64, "queue_first": 64, "push": 32, "anchors": 8, "keys": 8, "warm_up": 0},
}
DPT = {"width": 16, "channels": [8, 8, 16, 16]}
TRANSFORMER = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 56}


def config(decoder: str, **more: Any) -> NetworkConfig:
    if decoder == "dpt":
        known = {"encoder": "vit_small_patch14_dinov2", "options": DPT, "encoder_options": TRANSFORMER}
        return NetworkConfig(name=decoder, weights="random", **known, **more)
    return NetworkConfig(name=decoder, encoder="test_resnet", weights="random", **more)


def batch(kind: str, views: int) -> Labelled | Unlabelled:
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8)
    valid, row = torch.ones(BATCH, SIZE, SIZE, dtype=torch.bool), torch.arange(BATCH)
    table = torch.rand(BATCH, views, len(VIEW), generator=draw)
    if kind == "unlabelled":
        return Unlabelled(image, valid, table, row.flip(0), row)
    mask = torch.randint(0, CLASSES, valid.shape, generator=draw, dtype=torch.uint8)
    return Labelled(image, mask, valid, table[:, :0], row)


def step(method: Any) -> dict[str, torch.Tensor]:
    names = {"advsemiseg": ("labelled", "real", "unlabelled"), "supervised": ("labelled",)}
    name = next(known for known, kind in STEPS.items() if type(method) is kind)
    streams = names[name] if name in names else ("labelled", "unlabelled")
    scalars: dict[str, torch.Tensor] = method.step(Clock(1, 10), **{s: batch(s, 2) for s in streams})
    return scalars


def made(method: str, network: NetworkConfig, **optim: Any) -> Any:
    kind = STEPS[method]
    config = kind.Config(**(OPTIONS[method] if method in OPTIONS else {}))
    return kind(config, Build(CLASSES, 3, network, OptimConfig(**optim)))


@pytest.mark.parametrize("decoder", _NAMES)
@pytest.mark.parametrize("method", STEPS)
def test_a_step(method: str, decoder: str) -> None:
    found = made(method, config(decoder))
    before = {name: tensor.clone() for name, tensor in found.predictor().state_dict().items()}
    scalars = step(found)
    assert all(torch.isfinite(value) for name, value in scalars.items() if name.startswith("loss"))
    after = found.predictor().state_dict()
    assert all(torch.isfinite(tensor.float()).all() for tensor in after.values())
    changed = {name.partition(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {"encoder", "head"} <= changed


@pytest.mark.parametrize("method", STEPS)
def test_a_frozen_encoder(method: str) -> None:
    """Its weights stay, batch norm's statistics too where they are frozen, and the rest learns."""
    found = made(method, config("fpn", frozen=True, frozen_norm="encoder"))
    before = {name: tensor.clone() for name, tensor in found.predictor().state_dict().items()}
    step(found)
    for name, tensor in found.predictor().state_dict().items():
        if name.startswith("encoder."):
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(found.predictor().head.weight, before["head.weight"])
    assert all(len(optimizer.param_groups) == 1 for optimizer in found.optimizers.values())


@pytest.mark.parametrize("method", STEPS)
def test_rates_by_layers_with_sgd(method: str) -> None:
    """The encoder's layers learn at rates of their own, and all of them learn."""
    found = made(method, config("fpn"), name="sgd", lr=0.01, head_lr=5, layer_decay=0.5)
    before = {name: tensor.clone() for name, tensor in found.predictor().named_parameters()}
    groups = next(iter(found.optimizers.values())).param_groups
    assert [group["peak_lr"] for group in groups] == pytest.approx([0.01 * 0.5**n for n in (5, 4, 3, 2, 1)] + [0.05])
    step(found)
    changed = {n for n, weight in found.predictor().named_parameters() if not torch.equal(weight, before[n])}
    assert {"encoder.model.conv1.0.weight", "encoder.model.layer4.0.conv1.weight", "head.weight"} <= changed


def test_a_network_without_an_encoder(tmp_path: Any) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\ndef net(channels, classes):\n    return nn.Conv2d(channels, classes, 1)\n"
    )
    network = NetworkConfig(name="own.py:net", frozen=True)
    with pytest.raises(InputError, match=r"network\.frozen: own\.py:net is one piece without an encoder"):
        Build(CLASSES, 3, network, OptimConfig(), base=tmp_path).network()

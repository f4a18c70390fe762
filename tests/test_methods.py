"""What every method builds on: how losses become gradients, how methods are found and described."""

from pathlib import Path

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from semiseg import methods
from semiseg.data.sampling import Stream
from semiseg.data.splits import Data
from semiseg.methods import METHODS, StepMethod, describe, find
from semiseg.methods.labelled import LossConfig
from semiseg.networks.factory import Build, NetworkConfig, OptimConfig
from semiseg.types import VIEW, Clock, InputError, Options, Share, Unlabelled, described


class Pair(StepMethod):
    """Two weights of two optimisers; SGD with rate 1 makes an update the gradient."""

    Config = Options
    paper = "none"

    def __init__(self, clip: float | None = None) -> None:
        super().__init__()
        self.build = Build(2, 3, NetworkConfig(), OptimConfig(clip=clip))
        self.net, self.critic = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        for part, value in ((self.net, 2.0), (self.critic, 3.0)):
            nn.init.constant_(part.weight, value)
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)
        weights = {"net": [self.net.weight, self.frozen], "critic": [self.critic.weight]}
        self.optimizers = {name: torch.optim.SGD([{"params": p, "peak_lr": 1.0}], 1.0) for name, p in weights.items()}

    def streams(self, data: Data, batch: int, crop: tuple[int, int]) -> dict[str, Stream]:
        return {}

    def step(self, clock: Clock, **batches: object) -> dict[str, Tensor]:
        return {}

    def predictor(self) -> nn.Module:
        return self.net

    def share(self, count: float, over: float | None = None) -> Share:
        """A total of count times net times critic = 6 count."""
        total = count * (self.net.weight * self.critic.weight).sum()
        return Share(total, torch.tensor(count), None if over is None else torch.tensor(over))


def weight(part: nn.Linear) -> float:
    return part.weight.item()


def test_a_term_is_total_over_count_times_its_weight() -> None:
    method = Pair()
    values = method.update("net", (0.5, method.share(4.0)), (2.0, method.share(10.0)))
    assert [float(value) for value in values] == [6, 6]
    assert not any(value.requires_grad for value in values)
    assert weight(method.net) == 2 - (0.5 + 2) * 3


def test_colours_that_are_left_out_are_named() -> None:
    network = NetworkConfig(encoder="test_resnet", weights="random", options={"encoder_depth": 3})
    for channels, named in ((3, False), (4, True)):
        build = Build(2, channels, network, OptimConfig())
        for method in (methods.FixMatch, methods.ST, methods.STPlusPlus):
            build.report.clear()
            method(method.Config(), build)
            assert any("colours stay" in line for line in build.report) is named


def test_over_rescales() -> None:
    """U2PL's weight: total / count times over / count."""
    method = Pair()
    (value,) = method.update("net", (1.0, method.share(4.0, over=5.0)))
    assert float(value) == 6 * 5 / 4
    assert weight(method.net) == 2 - 3 * 5 / 4


@pytest.mark.parametrize("over", [None, 5.0])
def test_nothing_selected_is_zero_with_a_zero_gradient(over: float | None) -> None:
    method = Pair()
    values = method.backward("net", (1.0, method.share(0.0, over)))
    assert [float(value) for value in values] == [0]
    assert method.net.weight.grad is not None
    assert method.net.weight.grad.tolist() == [[0]]


def test_gradients_reach_the_optimisers_own_weights_only() -> None:
    """So an adversarial loss passes through the critic without moving or freezing it."""
    method = Pair()
    method.backward("net", (1.0, method.share(1.0)))
    assert method.critic.weight.grad is None
    assert method.critic.weight.requires_grad
    method.update("critic", (1.0, method.share(1.0)))
    assert (weight(method.net), weight(method.critic)) == (2, 1)
    assert method.net.weight.grad is not None
    assert method.net.weight.grad.tolist() == [[3]]
    assert method.critic.weight.grad is None


def test_backward_adds_up_until_update() -> None:
    method = Pair()
    method.backward("net", (1.0, method.share(1.0)))
    method.backward("net", (0.5, method.share(2.0)))
    method.update("net", (0.25, method.share(4.0)))
    assert weight(method.net) == 2 - 1.75 * 3
    assert method.net.weight.grad is None


def test_a_long_gradient_is_clipped() -> None:
    method = Pair(clip=0.5)
    method.update("net", (1.0, method.share(1.0)))
    assert weight(method.net) == pytest.approx(1.5, abs=1e-5)


def test_weights_of_a_loss_are_not_in_its_value() -> None:
    """A weight of 0 still reports what the loss is."""
    method = Pair()
    (value,) = method.update("net", (0.0, method.share(4.0)))
    assert float(value) == 6
    assert weight(method.net) == 2


def test_finding_methods(tmp_path: Path) -> None:
    assert find("fixmatch") is METHODS["fixmatch"]
    (tmp_path / "own.py").write_text(
        "from semiseg.methods import Supervised\nclass Mine(Supervised):\n    pass\nclass Other:\n    pass\n",
        encoding="utf-8",
    )
    assert find("own.py:Mine", tmp_path).__name__ == "Mine"
    assert find("semiseg.methods:Supervised") is METHODS["supervised"]
    with pytest.raises(InputError, match=r"did you mean fixmatch or unimatch"):
        find("fixmatc")
    with pytest.raises(InputError, match="not a subclass"):
        find("own.py:Other", tmp_path)
    with pytest.raises(InputError, match=r"own\.py has no Min; did you mean Mine"):
        find("own.py:Min", tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_described(name: str) -> None:
    found = describe(METHODS[name])
    assert [option for option, (_, text) in found.items() if not text] == []
    assert METHODS[name].paper
    assert METHODS[name].__doc__
    assert name in methods.METHODS


class Own(Options):
    """Of a user's method: what the package's have nowhere."""

    loss: LossConfig = LossConfig(kind="ohem")
    names: list[str] = Field(default_factory=lambda: ["a" * 60, "b" * 60])
    """Long."""
    needed: float


def test_defaults_of_every_kind() -> None:
    found = described(Own)
    assert found["loss.kind"][0] == "ohem"
    assert found["loss.ohem_kept"][0] == "100000"
    assert found["names"] == (f"[{'a' * 60}, {'b' * 60}]", "Long.")
    assert found["needed"] == ("(must be given)", "")


def test_a_class_that_is_less_sure_has_a_lower_threshold() -> None:
    """FixMatch with class_wise: 0.9 and 0.6 of confidence on average, and the threshold of the surest is 0.8."""
    build = Build(2, 3, NetworkConfig(name="fpn", encoder="test_resnet", weights="random"), OptimConfig())
    method = methods.FixMatch(methods.FixMatch.Config(threshold=0.8, class_wise=True), build)
    label, valid = torch.tensor([[[0, 0, 1, 1]]]), torch.ones(1, 1, 4, dtype=torch.bool)
    confidence = torch.tensor([[[0.95, 0.85, 0.65, 0.55]]])
    table, row = torch.zeros(1, 1, len(VIEW)), torch.zeros(1, dtype=torch.int64)
    unlabelled = Unlabelled(torch.zeros(1, 3, 1, 4, dtype=torch.uint8), valid, table, row, row)
    threshold = method._threshold(label, confidence, unlabelled, 0)
    assert isinstance(threshold, Tensor)
    assert threshold.flatten().tolist() == pytest.approx([0.8, 0.8, 0.8 * 0.6 / 0.9, 0.8 * 0.6 / 0.9])
    assert (confidence >= threshold).flatten().tolist() == [True, True, True, True]
    assert "thresholds.sure" in method.state_dict(), "it is in the checkpoint"
    plain = methods.FixMatch(methods.FixMatch.Config(threshold=0.8), build)
    assert plain._threshold(label, confidence, unlabelled, 0) == 0.8

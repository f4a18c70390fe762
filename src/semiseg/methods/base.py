"""What a method is: the contract between an algorithm and the engine that runs it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from semiseg import parallel
from semiseg.data.rows import Rows
from semiseg.data.sampling import Stream
from semiseg.data.splits import Data
from semiseg.networks.critic import Critic
from semiseg.networks.factory import Build, OptimConfig
from semiseg.networks.net import SegNet, Wrapped
from semiseg.types import Clock, InferenceConfig, Options, Share, TrainConfig


class Session(Protocol):
    """The engine, as a method sees it."""

    @property
    def config(self) -> TrainConfig: ...
    @property
    def inference(self) -> InferenceConfig: ...
    def stage(self, name: str) -> "Session": ...
    def starts_from(self, lines: Iterable[str]) -> None: ...
    def train(
        self,
        method: "StepMethod",
        data: Data,
        streams: Mapping[str, Stream] | None = None,
        keep: Sequence[float] = (),
    ) -> nn.Module: ...
    def kept(self, share: float, net: nn.Module) -> nn.Module: ...
    def pseudo_label(
        self, net: nn.Module, rows: Rows, data: Data, inference: InferenceConfig, least: float = 0.0, top: int = 1
    ) -> Rows: ...
    def reliability(
        self, nets: Sequence[nn.Module], rows: Rows, data: Data, inference: InferenceConfig
    ) -> NDArray[np.float64]: ...


class Method(ABC):
    """An algorithm of one or more stages.

    `Config` holds its options; `paper` is one line for `semiseg methods`.
    """

    Config: ClassVar[type[Options]]
    paper: ClassVar[str]

    @abstractmethod
    def __init__(self, config: Options, build: Build) -> None: ...

    @abstractmethod
    def fit(self, session: Session, data: Data) -> nn.Module:
        """Trains, and returns the network to deliver."""

    @classmethod
    def look(cls, config: Options, data: Data) -> list[str]:
        """For `semiseg check`: what the options mean for the data, in lines for the user; nothing is trained.

        Raises:
            InputError: they do not fit.
        """
        return []


class StepMethod(nn.Module, Method):
    """An algorithm that is one loop of steps.

    Networks, teachers and memories are submodules or buffers and optimisers stand in `optimizers`: that, and the step,
    is all that a checkpoint needs.
    """

    optimizers: dict[str, torch.optim.Optimizer]
    build: Build

    def fit(self, session: Session, data: Data) -> nn.Module:
        return session.train(self, data)

    @property
    def schedule(self) -> OptimConfig:
        """Whose `rate(progress)` the session applies to every group's `peak_lr`."""
        return self.build.optim

    @abstractmethod
    def streams(self, data: Data, batch: int, crop: tuple[int, int]) -> dict[str, Stream]:
        """The batches that a step needs; the names are the arguments of `step`."""

    @abstractmethod
    def step(self, clock: Clock, **batches: object) -> dict[str, Tensor]:
        """One update of everything. Returns scalars to log, still on the device; those named `loss*` must be finite."""

    @abstractmethod
    def predictor(self) -> nn.Module:
        """The network that is evaluated and delivered."""

    def compile(self, *options: Any, **more: Any) -> None:
        """All its networks through torch.compile, in place; they are compiled at their first forward."""
        for net in self.modules():
            if isinstance(net, SegNet | Wrapped | Critic):
                net.compile(*options, **more)

    def backward(self, name: str, *terms: tuple[float, Share]) -> list[Tensor]:
        """Adds the gradients of the weighted terms to the weights of optimiser `name`, and to no others.

        The loss of a term is that of all processes' images: its total over the counts of all.

        Returns:
            the value of each term, before its weight, detached; its mean over the processes is the loss.
        """
        if not terms:
            return []
        shares = [share for _, share in terms]
        sums = parallel.shared_sum([c for s in shares for c in (s.count, s.count if s.over is None else s.over)])
        values = []
        for share, count, over in zip(shares, sums[::2], sums[1::2], strict=True):
            some = count.to(share.total.dtype).masked_fill(count == 0, 1)  # the total is 0 then: a zero with a graph
            values.append(share.total / some * (over / some if share.over is not None else 1))
        loss = torch.stack([weight * value for (weight, _), value in zip(terms, values, strict=True)]).sum()
        loss.backward(inputs=self._weights(name))
        return [value.detach() * parallel.world() for value in values]

    def update(self, name: str, *terms: tuple[float, Share]) -> list[Tensor]:
        """`backward` of the last terms, then one step of optimiser `name` on the gradients of all processes."""
        with parallel.summed_gradients(self._weights(name)):
            values = self.backward(name, *terms)
        if self.build.optim.clip is not None:
            nn.utils.clip_grad_norm_(self._weights(name), self.build.optim.clip)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)
        return values

    def _weights(self, name: str) -> list[Tensor]:
        groups = self.optimizers[name].param_groups
        return [weight for group in groups for weight in group["params"] if weight.requires_grad]

"""How the size of crops changes in a run: `train.schedule`, for the streams of any method."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch

from semiseg.data.sampling import Phase, Stream
from semiseg.types import TrainConfig

RAMP = 0.05
"""Least share of a run over which a rate changes: an epoch of few images is a step or two."""


def scheduled(streams: Mapping[str, Stream], config: TrainConfig, power: float = 1.0) -> dict[str, Stream]:
    """The streams with the phases of the run's schedule; those that a method divides into phases itself as they are.

    power: n times the batch has n ** power times the rate; see `power_of`.
    """
    longest = max(config.batch, *(stream.epoch for stream in streams.values()))  # a phase has a step at least
    epoch = min(1.0, longest / (config.steps * config.batch))
    return {
        name: replace(stream, phases=phases(stream.phases[0], config, epoch, power))
        if len(stream.phases) == 1
        else stream
        for name, stream in streams.items()
    }


def power_of(optimizers: Iterable[torch.optim.Optimizer]) -> float:
    """How rates grow with the batch: evenly for SGD (Goyal et al. 2017), and like its root for optimisers that divide
    by the gradient's size, as Adam does (Malladi et al., NeurIPS 2022)."""
    return 1.0 if all(isinstance(optimizer, torch.optim.SGD) for optimizer in optimizers) else 0.5


def phases(phase: Phase, config: TrainConfig, epoch: float, power: float = 1.0) -> tuple[Phase, ...]:
    """The phases that the run's schedule makes of a single one; `epoch` is the share of the run's samples in one.

    power: as in `scheduled`. Source of the names: Zhu et al. 2020. Sizes, shares, rates and ramps are ours, the paper
    gives none.
    """
    name, plus = config.schedule.rstrip("+"), config.schedule.endswith("+")
    if name == "baseline":
        return (phase,)
    crop = (_small(phase.crop[0], config.small), _small(phase.crop[1], config.small))
    fit = phase.crop[0] * phase.crop[1] // (crop[0] * crop[1])
    times = max(1, min(config.small_batch, fit)) if plus else 1
    ramp = min(max(epoch, RAMP), config.small_share / 2, (1 - config.small_share) / 2) if plus else 0.0
    if name == "alternate":
        edges = [*(epoch * np.arange(1, math.ceil(0.9 / epoch - 1e-6))).tolist(), 0.9, 1.0]
        # The last tenth, and every second epoch before it, counted from the end, are whole.
        whole = [i == len(edges) - 1 or (len(edges) - i) % 2 == 1 for i in range(len(edges))]
        return tuple(replace(phase, until=u, crop=phase.crop if w else crop) for u, w in zip(edges, whole, strict=True))
    share = config.small_share if name == "coarse2fine" else 1 - config.small_share
    small = Phase(crop, times * phase.batch, share, float(times) ** power, ramp)
    if name == "coarse2fine":
        return small, replace(phase, ramp=ramp)
    return replace(phase, until=share), replace(small, until=1.0)


def _small(side: int, factor: float) -> int:
    """Of a crop: a multiple of 32 px, with which all networks work, where the side is large enough."""
    small = int(side * factor)
    return small // 32 * 32 if small >= 32 else max(1, small)

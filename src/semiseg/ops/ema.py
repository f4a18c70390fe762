"""The teacher as an exponential moving average of the student (Tarvainen and Valpola 2017), and how it gains weight."""

import copy
import math
from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def make_teacher(student: Net) -> Net:
    """A copy of the student, buffers included, in eval mode and without gradients."""
    return copy.deepcopy(student).eval().requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, step: int, decay: float) -> None:
    """teacher <- d teacher + (1 - d) student, in place, with d = min(1 - 1 / (step + 1), decay).

    `step` counts from 0 since averaging began, so the first update copies. Floating-point buffers are averaged too;
    others are copied: an averaged counter truncates.
    """
    d = min(1 - 1 / (step + 1), decay)
    olds = [*teacher.parameters(), *teacher.buffers()]
    news = [*student.parameters(), *student.buffers()]
    pairs = list(zip(olds, news, strict=True))
    averaged = [pair for pair in pairs if pair[0].is_floating_point()]
    copied = [pair for pair in pairs if not pair[0].is_floating_point()]
    if averaged:
        torch._foreach_lerp_([old for old, _ in averaged], [new for _, new in averaged], 1 - d)
    if copied:
        torch._foreach_copy_([old for old, _ in copied], [new for _, new in copied])


def ramped(progress: float, ramp: float) -> float:
    """A factor that rises from 0.007 to 1 over the first `ramp` (0..1) of a run (Laine & Aila, ICLR 2017)."""
    return math.exp(-5 * (1 - min(progress / ramp, 1)) ** 2) if ramp else 1.0

"""Who am I among the processes of a run, and sums over them; one process in this version."""

import os

import torch
from torch import Tensor

from semiseg.types import InputError


def rank() -> int:
    """The number of this process, from 0."""
    return 0


def world() -> int:
    """How many processes share the run.

    Raises:
        InputError: several processes were launched, which this version cannot keep equal to one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("WORLD_SIZE is above 1: this version trains in one process; start it without torchrun.")
    return 1


def shared_sum(values: list[Tensor]) -> list[Tensor]:
    """Adds each scalar over all processes, in one message; stays on the device."""
    return [value.detach() for value in values]


def device(name: str) -> torch.device:
    """The device that `train.device` names; `auto` takes a GPU where there is one.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device: cuda was asked for and torch sees no GPU; use cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")

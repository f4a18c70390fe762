"""What a refused allocation, on a GPU or a CPU, means to the user."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from semiseg.types import InputError, TrainConfig


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Tells the user `Out of memory` with the advice, which goes on after the words and ends without a period.

    Raises:
        InputError: memory was refused in the block, or the system ended a process that reads images.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # a GPU's error is a RuntimeError too
        if "DataLoader worker" in str(error):
            raise InputError(
                "A process that reads images was ended by the system, mostly for lack of memory: lower train.workers."
            ) from error
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise InputError(f"Out of memory {advice}.") from error


def smaller(config: TrainConfig) -> str:
    """The advice for training: half the batch, or three quarters of the crop's sides."""
    crop = [max(32, side * 3 // 4 // 32 * 32) for side in config.crop]
    ways = [f"train.crop=[{crop[0]},{crop[1]}]"] if crop < list(config.crop) else []
    if config.batch > 3:  # a batch of one is too few for some networks
        ways.insert(0, f"train.batch={config.batch // 2}")
    ways.append("a smaller network.encoder")
    return f"with train.batch={config.batch} and train.crop={list(config.crop)}: try {' or '.join(ways[:2])}"

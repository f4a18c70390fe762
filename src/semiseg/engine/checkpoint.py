"""A stage's checkpoint and weights; the previous file stays until the new one is whole."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from semiseg.files import replacing

LAST = "last.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Replaces the folder's checkpoint."""
    with replacing(folder / LAST) as part, part.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch closes its file too, and fails again
                raise error.__context__ from None
            raise


def load(folder: Path) -> dict[str, Any] | None:
    """The folder's checkpoint on the CPU, or none."""
    path = folder / LAST
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def save_weights(path: Path, net: nn.Module) -> None:
    """Writes a network's tensors as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    with replacing(path) as part:
        save_file(tensors, part)


def load_weights(path: Path, net: nn.Module) -> None:
    """Reads what `save_weights` wrote into a network of the same shape."""
    net.load_state_dict(load_file(path))

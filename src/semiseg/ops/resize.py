"""To another size, with pixel centres aligned."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned. x (B, C, h, w) float -> (B, C, H, W); x itself if it has that size (H, W)."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbour. mask (B, h, w) of any dtype -> (B, H, W); mask itself if it has that size (H, W)."""
    if mask.shape[-2:] == size:
        return mask
    rows, columns = (_nearest(old, new, mask.device) for old, new in zip(mask.shape[-2:], size, strict=True))
    return mask[..., rows.unsqueeze(1), columns]


def _nearest(old: int, new: int, device: torch.device) -> Tensor:
    """(new,) index of the old pixel that holds the centre of each new one; in whole numbers, so the same everywhere."""
    return (2 * torch.arange(new, device=device) + 1) * old // (2 * new)

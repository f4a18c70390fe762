"""To another size, with pixel centres aligned."""

import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned. x (B, C, h, w) float -> (B, C, H, W); x itself if it has that size (H, W)."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)

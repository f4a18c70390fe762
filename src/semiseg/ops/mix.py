"""CutMix: a box of each image is replaced by the same box of its partner (Yun et al. 2019; French et al. 2020)."""

import torch
from torch import Tensor


def cutmix_box(u: dict[str, Tensor], size: tuple[int, int], area: tuple[float, float], probability: float) -> Tensor:
    """Boxes in closed form: any area in the range, any aspect for which the box fits.

    u: the columns mix, area, ratio, top, left of a strong view, each (B,) in [0, 1); size (H, W) in px; area: smallest
    and largest share of the image in 0..1; probability: share of the images that get a box.
    Returns (B, H, W) bool, True inside the box; no pixel of an image without one. Sides are rounded to whole px.
    """
    low, high = area
    assert 0 <= low <= high <= 1, area
    share = low + (high - low) * u["area"]
    # sides as powers of the area: each lies in [share, 1], their product is the area
    rows = _span(share ** u["ratio"], u["top"], size[0])
    columns = _span(share ** (1 - u["ratio"]), u["left"], size[1])
    return rows.unsqueeze(2) & columns.unsqueeze(1) & (u["mix"] < probability).view(-1, 1, 1)


def mix(box: Tensor, partner: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Replaces the box of each sample by its partner's, in all tensors alike: image, label, confidence, valid.

    box (B, H, W) bool; partner (B,) int64 indices into the batch; tensors (B, H, W) or (B, N, H, W), returned in order.
    """
    return tuple(torch.where(box if t.ndim == 3 else box.unsqueeze(1), t[partner], t) for t in tensors)


def _span(share: Tensor, position: Tensor, side: int) -> Tensor:
    """(B, side) bool: `share` of the side, rounded to px, at `position` in [0, 1) of the places where it fits."""
    length = (share * side).round()
    start = (position * (side - length + 1)).floor()
    pixel = torch.arange(side, device=share.device)
    return (pixel >= start.unsqueeze(1)) & (pixel < (start + length).unsqueeze(1))

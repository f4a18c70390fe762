"""A region of each image is replaced by the same region of its partner: a box, or the pixels of some classes.

CutMix: Yun et al. 2019, French et al. 2020. ClassMix: Olsson et al. 2021.
"""

import torch
from torch import Tensor

from semiseg.types import IGNORE


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


def half_box(u: dict[str, Tensor], size: tuple[int, int], probability: float) -> Tensor:
    """Boxes of half the image's area, as wide as may be drawn: U2PL's CutMix (Wang et al., CVPR 2022).

    Any width in px that is more than half and less than all of the image's has the same chance; the height follows.
    u, size, probability and what is returned are as in `cutmix_box`; sides of 3 px at least.
    """
    height, width = size
    widths = width - 1 - width // 2
    assert widths > 0, size
    wide = width // 2 + 1 + (u["ratio"] * widths).floor()
    high = (height * width / 2 / wide).round()
    rows = _span(high / height, u["top"], height)
    columns = _span(wide / width, u["left"], width)
    return rows.unsqueeze(2) & columns.unsqueeze(1) & (u["mix"] < probability).view(-1, 1, 1)


def class_region(u: dict[str, Tensor], label: Tensor, classes: int, probability: float) -> Tensor:
    """ClassMix: the pixels of half the classes of each label (Olsson et al., WACV 2021), to be pasted on another image.

    u as in `cutmix_box`; label (B, H, W) int64, class ids or IGNORE, of the images that are to be pasted; of an odd
    number of classes the larger half. Returns (B, H, W) bool.
    """
    there = label != IGNORE
    cells = label.masked_fill(~there, classes).flatten(1)
    present = torch.zeros(len(label), classes + 1, dtype=torch.bool, device=label.device).scatter_(1, cells, True)
    present[:, classes] = False
    # An order of the classes for each sample. Its table holds no number a class, so they are made from two it has.
    seed = (u["top"] * 2**24).long() * 2**24 + (u["left"] * 2**24).long()
    order = _scrambled(seed.unsqueeze(1) + torch.arange(classes + 1, device=label.device) * 0x9E3779B9)
    rank = order.masked_fill(~present, -1).argsort(1, descending=True).argsort(1)
    chosen = present & (rank < (present.sum(1, keepdim=True) + 1) // 2)
    region = chosen.gather(1, cells).view(label.shape)
    return region & (u["mix"] < probability).view(-1, 1, 1)


def _scrambled(number: Tensor) -> Tensor:
    """Whole numbers that look random, 0..2^31-1: the steps of MurmurHash3's last mixing, on 32 bits."""
    number = number ^ (number >> 32)
    for factor, shift in ((0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        number = (number ^ (number >> 16)) & 0xFFFFFFFF
        number = (number * factor) & 0xFFFFFFFF
        number = number ^ (number >> shift)
    return number & 0x7FFFFFFF

"""Geometry of a training sample: scale, crop and flip, image and mask alike, all from the sample's own generator.

Photometry is not here: it runs on the device (ops/colour), so that a strong view costs no worker time and no transfer.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from semiseg.types import IGNORE


def geometry(
    image: Tensor,
    mask: Tensor | None,
    crop: tuple[int, int],
    scale: tuple[float, float],
    flip: bool,
    rng: np.random.Generator,
    centre: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one training crop.

    Cuts the part of the image that fills the crop at the drawn scale, and resizes that part only. What the image does
    not fill (right and bottom) is zero in the image, IGNORE in the mask and False in `valid`.

    Args:
        image: (N, H, W) uint8 or uint16.
        mask: (H, W) or (M, H, W) uint8, or none.
        crop: (height, width) of the result in px.
        scale: range of the factor on the image, drawn uniformly.
        flip: mirror half of the samples.
        rng: the sample's own generator.
        centre: (y, x) in px of the image, a pixel that is to be in the crop.

    Returns:
        image (N, height, width) in the same depth, mask (height, width) uint8, or as many, valid (height, width) bool.
    """
    factor, at_y, at_x, mirrored = rng.uniform(*scale), rng.random(), rng.random(), flip and rng.random() < 0.5
    y, x = centre or (None, None)
    top, cut_h, out_h = _span(image.shape[1], crop[0], factor, at_y, y)
    left, cut_w, out_w = _span(image.shape[2], crop[1], factor, at_x, x)

    crop_image = image.new_zeros((len(image), *crop))
    crop_image[:, :out_h, :out_w] = _resize(image[:, top : top + cut_h, left : left + cut_w], (out_h, out_w))
    crop_mask = torch.full(crop if mask is None else (*mask.shape[:-2], *crop), IGNORE, dtype=torch.uint8)
    if mask is not None:
        part = mask[..., top : top + cut_h, left : left + cut_w].reshape(1, -1, cut_h, cut_w)
        resized = F.interpolate(part, (out_h, out_w), mode="nearest-exact")
        crop_mask[..., :out_h, :out_w] = resized.view(*mask.shape[:-2], out_h, out_w)
    valid = torch.zeros(crop, dtype=torch.bool)
    valid[:out_h, :out_w] = True
    if mirrored:
        crop_image, crop_mask, valid = crop_image.flip(2), crop_mask.flip(-1), valid.flip(1)
    return crop_image, crop_mask, valid


def _span(side: int, crop: int, factor: float, at: float, centre: int | None) -> tuple[int, int, int]:
    """Along one side, in px: where the cut starts, how long it is in the file, and how long it is in the crop."""
    cut = min(side, max(1, round(crop / factor)))
    out = crop if cut < side else min(crop, max(1, round(side * factor)))
    if centre is not None:  # anywhere in the cut, as far as the border allows
        return min(max(centre - cut + 1 + int(at * cut), 0), side - cut), cut, out
    return int(at * (side - cut + 1)), cut, out


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if image.shape[1:] == size:
        return image
    if not len(image):
        return image.new_zeros((0, *size))
    if image.dtype == torch.uint8:
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    smooth = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return smooth.round().clamp(0, 65535).to(image.dtype)

"""The strong view's colours: jitter, grey, blur; batched, each sample with its own numbers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from semiseg.types import white

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey (ITU-R BT.601)."""


def to_float(image: Tensor) -> Tensor:
    """uint8 and uint16 scaled to 0..1, floats as they are; float32, but float64 stays float64."""
    if image.is_floating_point():
        return image if image.dtype == torch.float64 else image.float()
    return image.float() / white(image)


def strong(
    image: Tensor,
    u: dict[str, Tensor],
    jitter: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.25),
    jitter_probability: float = 0.8,
    grey_probability: float = 0.2,
    blur_probability: float = 0.5,
    sigma: tuple[float, float] = (0.1, 2.0),
) -> Tensor:
    """Brightness, contrast, saturation and hue jitter, grey and Gaussian blur, in this order.

    image (B, N, H, W) float in 0..1; u: the columns of a strong view, each (B,) in [0, 1). `jitter` is the largest
    change of brightness, contrast and saturation (factors in 1 - j..1 + j, j <= 1) and of hue (share of the circle,
    <= 0.5); `sigma` the range of the blur in px (> 0). Returns (B, N, H, W). Images with N != 3 are only blurred: the
    other changes have no meaning there. A sample's result does not depend on the others of the batch.
    """
    if image.shape[1] == 3:
        on = u["jitter"] < jitter_probability
        by = [
            ((2 * u[name] - 1) * largest * on).to(image.dtype).view(-1, 1, 1, 1)
            for name, largest in zip(("brightness", "contrast", "saturation", "hue"), jitter, strict=True)
        ]
        image = adjust_brightness(image, 1 + by[0])
        image = adjust_contrast(image, 1 + by[1])
        image = adjust_saturation(image, 1 + by[2])
        image = adjust_hue(image, by[3])
        image = torch.where((u["grey"] < grey_probability).view(-1, 1, 1, 1), grey(image), image)
    return blur(image, sigma[0] + (sigma[1] - sigma[0]) * u["sigma"], u["blur"] < blur_probability, sigma[1])


def grey(image: Tensor) -> Tensor:
    """Luma. (B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = image.chunk(3, 1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def adjust_brightness(image: Tensor, factor: Tensor) -> Tensor:
    """image (B, 3, H, W) times factor (B, 1, 1, 1), clipped to 0..1."""
    return (image * factor).clamp_(0, 1)


def adjust_contrast(image: Tensor, factor: Tensor) -> Tensor:
    """The distance to the mean grey of each image (B, 3, H, W) times factor (B, 1, 1, 1), clipped to 0..1."""
    # float64: the order of a float32 sum depends on the size of the batch
    mean = grey(image).mean((1, 2, 3), keepdim=True, dtype=torch.float64).to(image.dtype)
    return torch.lerp(mean, image, factor).clamp_(0, 1)


def adjust_saturation(image: Tensor, factor: Tensor) -> Tensor:
    """The distance to the pixel's grey in image (B, 3, H, W) times factor (B, 1, 1, 1), clipped to 0..1."""
    return torch.lerp(grey(image), image, factor).clamp_(0, 1)


def adjust_hue(image: Tensor, shift: Tensor) -> Tensor:
    """The hue (HSV) of image (B, 3, H, W) in 0..1 turned by shift (B, 1, 1, 1), a share of the circle.

    Value and chroma stay, so only the hue is computed; the way back is the closed form of each channel
    (value - chroma * clip(min(k, 4 - k), 0, 1) with k = (n + 6 hue) mod 6 and n = 5, 3, 1 for red, green, blue).
    """
    red, green, blue = image.chunk(3, 1)
    value = image.amax(1, keepdim=True)
    chroma = value - image.amin(1, keepdim=True)
    safe = chroma.masked_fill(chroma == 0, 1)
    sextant = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    offset = torch.arange(5, 0, -2, device=image.device).view(1, 3, 1, 1)
    k = (sextant + 6 * shift + offset).remainder(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def blur(image: Tensor, sigma: Tensor, on: Tensor, largest: float) -> Tensor:
    """Gaussian blur by sigma (B,) px where on (B,) bool; the edge is repeated outwards.

    image (B, N, H, W); `largest` sigma in px fixes the kernel's reach (3 sigma) without a look at the tensor.
    """
    reach = math.ceil(3 * largest)
    distance = torch.arange(-reach, reach + 1, device=image.device)
    kernel = torch.exp(-0.5 * (distance / sigma.to(image.dtype).unsqueeze(1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).where(on.unsqueeze(1), (distance == 0).to(image.dtype))
    b, n, h, w = image.shape
    kernel = kernel.unsqueeze(1).expand(b, n, -1).reshape(b * n, 1, -1)
    padded = F.pad(image.reshape(1, b * n, h, w), (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel.unsqueeze(2), groups=b * n)
    return F.conv2d(across, kernel.unsqueeze(3), groups=b * n).view(b, n, h, w)

"""A segmentation network in three parts: encode, fuse, classify.

Shapes use the legend of `semiseg.types`. Sources: the parts are those of segmentation_models_pytorch (encoder, decoder,
segmentation head), here with one resize only and with any image size.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from semiseg.types import InputError, white

FrozenNorm = Literal["none", "encoder", "all"]
"""Whose batch norms keep their running statistics, and normalise by them, in training too."""


class Normalise(nn.Module):
    """Scales uint8 and uint16 images to 0..1 (floats are there already), then normalises them.

    `mean` and `std` have one number a channel, in the unit of an image in 0..1. They are buffers: stored weights bring
    what they were trained with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """(B, N, H, W) uint8, uint16 or floating -> (B, N, H, W) in the network's precision.

        Raises:
            InputError: N is not the network's.
        """
        channels = len(self.mean)
        if image.shape[1] != channels:
            raise InputError(
                f"data.channels is {channels}, but an image has {image.shape[1]}: set it to those of the images."
            )
        # One pass over the image instead of three.
        return torch.addcmul(-self.mean / self.std, image.to(self.mean.dtype), 1 / (white(image) * self.std))


def autocast(like: Tensor, precision: torch.dtype | None) -> AbstractContextManager[Any]:
    """A block in the precision, for a tensor like that one; float64 is left alone."""
    if precision is None or like.dtype == torch.float64:
        return nullcontext()
    return torch.autocast(like.device.type, precision)


def full(logits: Tensor) -> Tensor:
    """float32, or float64 as it was."""
    return logits if logits.dtype == torch.float64 else logits.float()


class SegNet(nn.Module):
    """Three parts that a method may call by name.

    Scales and normalises (uint8, uint16; floats are in 0..1), pads right and bottom by repeating the edge, runs
    autocast inside where `precision` is set (float64 weights are left alone), returns float32 logits, float64 if the
    weights are.

    stride     px of the image a side of one px of the fused map
    width      D, channels of the fused map
    widths     channels of the maps of `encode`, finest first; `strides` likewise
    multiple   px; sides are padded to a multiple of it
    precision  torch.bfloat16 for autocast, or None
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        precision: torch.dtype | None = None,
        checkpointing: bool = False,
        frozen_norm: FrozenNorm = "none",
        align_corners: bool = False,
    ) -> None:
        """`model` has the `encoder`, `decoder` and `segmentation_head` of segmentation_models_pytorch.

        With `align_corners` images are not padded, and logits are resized with their corners on those of the image: for
        weights that were trained so.
        """
        super().__init__()
        encoder, head = model.get_submodule("encoder"), model.get_submodule("segmentation_head")
        self.normalise = Normalise(mean, std)
        self.encoder = encoder
        self.decoder = model.get_submodule("decoder")
        # Behind the convolution a head of smp has an upsampling with another definition than ours.
        self.head = head.get_submodule("0")
        self.classes, self.channels, self.precision = classes, len(mean), precision
        self.align_corners = align_corners
        self.multiple = 1 if align_corners else int(encoder.output_stride)  # type: ignore[arg-type]
        _fix_same_padding(encoder)
        if checkpointing:
            _checkpoint_blocks(encoder)
        part = {"none": nn.Identity(), "encoder": encoder, "all": self}[frozen_norm]
        self._frozen = tuple(module for module in part.modules() if isinstance(module, _BatchNorm))
        self._measure()

    def _measure(self) -> None:
        """Learns from one small image which maps of the encoder are real, and the stride and width of the fused one."""
        multiple, training = int(self.encoder.output_stride), self.training  # type: ignore[arg-type]
        side = max(4, -(-128 // multiple)) * multiple  # so large that a border does not change the ratios
        self.eval()
        with torch.no_grad():
            image = torch.zeros(1, self.channels, side, side)
            maps = self.encoder(image)
            fused = self.decoder(maps)
            logits = self.head(fused)
        if logits.shape[1] != self.classes:
            raise InputError(f"network.name: the network gives {logits.shape[1]} classes, the data has {self.classes}.")
        self.train(training)
        # An encoder puts the image itself first, and a transformer an empty map at stride 2: neither is a feature.
        self._strides = tuple(round(side / m.shape[-1]) for m in maps)
        self._real = tuple(m is not image and m.shape[1] > 0 for m in maps)
        self.widths = tuple(m.shape[1] for m, real in zip(maps, self._real, strict=True) if real)
        self.strides = tuple(stride for stride, real in zip(self._strides, self._real, strict=True) if real)
        self.width, self.stride = fused.shape[1], round(side / fused.shape[-1])
        assert logits.shape[-2:] == fused.shape[-2:], "a head whose convolution changes the size"

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; frozen batch norms stay in the latter."""
        super().train(mode)
        for norm in self._frozen:
            norm.eval()
        return self

    def compile(self, *options: Any, **more: Any) -> None:
        """Through torch.compile, in place, the parts between padding and resizing; names of weights stay."""
        self.encoder.compile(*options, **more)
        self.decoder.compile(*options, **more)

    def encode(self, image: Tensor) -> list[Tensor]:
        """(B, N, H, W) -> feature maps (B, ., h, w), finest first, without the image itself."""
        image = self._pad(self.normalise(image))
        with autocast(image, self.precision):
            maps = self.encoder(image)
        return [m for m, real in zip(maps, self._real, strict=True) if real]

    def _pad(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        more = [(side + self.multiple - 1) // self.multiple * self.multiple - side for side in (height, width)]
        # Also where nothing is missing: a condition on the size would fix the size of an exported network.
        return F.pad(image, (0, more[1], 0, more[0]), mode="replicate")

    def fuse(self, features: list[Tensor]) -> Tensor:
        """The maps of `encode` -> (B, D, h, w) at `stride`.

        Raises:
            InputError: one image is too few for the decoder's batch norm, which follows a pooling to one px.
        """
        try:
            with autocast(features[0], self.precision):
                fused: Tensor = self.decoder(self._with_stand_ins(features))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                "train.batch: 1 is too few for the batch norm of this network: take 2 or more, or network.name=fpn."
            ) from error
        return fused

    def _with_stand_ins(self, features: list[Tensor]) -> list[Tensor]:
        """The list that a decoder of smp expects: empty maps, of the right size, where the encoder had no feature."""
        finest, given = features[0], iter(features)
        batch, _, height, width = finest.shape
        stride = self._strides[self._real.index(True)]
        return [
            next(given) if real else finest.new_empty(batch, 0, height * stride // s, width * stride // s)
            for s, real in zip(self._strides, self._real, strict=True)
        ]

    def classify(self, fused: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, D, h, w) -> logits (B, C, H, W) for an image of `size` (H, W): convolution, one bilinear resize, crop.

        Without `size` (B, C, h, w), the logits at `stride`.
        """
        with autocast(fused, self.precision):
            logits: Tensor = full(self.head(fused))
        return logits if size is None else self.enlarge(logits, size, self.stride)

    def enlarge(self, logits: Tensor, size: tuple[int, int], stride: int) -> Tensor:
        """A map (B, C, h, w) of the padded image at `stride` -> (B, C, H, W) for an image of `size` (H, W)."""
        if self.align_corners:
            return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
        if stride > 1:
            padded = (logits.shape[-2] * stride, logits.shape[-1] * stride)
            logits = F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)
        return logits[..., : size[0], : size[1]]

    def forward(self, image: Tensor) -> Tensor:
        """(B, N, H, W) uint8, uint16, or floating in 0..1 -> logits (B, C, H, W)."""
        height, width = image.shape[-2:]
        return self.classify(self.fuse(self.encode(image)), (height, width))


class Wrapped(nn.Module):
    """Any module with forward(image) -> logits as a network: normalises before it, resizes once after it where it must.

    It has no parts to call: a method that needs encode, fuse and classify says so.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.model = model
        self.classes, self.channels, self.precision = classes, len(mean), precision

    def compile(self, *options: Any, **more: Any) -> None:
        """The module through torch.compile, in place; names of weights stay."""
        self.model.compile(*options, **more)

    def forward(self, image: Tensor) -> Tensor:
        """(B, N, H, W) uint8, uint16, or floating in 0..1 -> logits (B, C, H, W).

        Raises:
            InputError: the module returns something else.
        """
        image = self.normalise(image)
        with autocast(image, self.precision):
            logits = self.model(image)
        if not isinstance(logits, Tensor) or logits.ndim != 4 or logits.shape[1] != self.classes:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            name = type(self.model).__name__
            raise InputError(
                f"network.name: forward of {name} must return logits (B, {self.classes}, h, w), not {got}."
            )
        logits = full(logits)
        if logits.shape[-2:] == image.shape[-2:]:
            return logits
        return F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)


class _SameConv2d(nn.Conv2d):
    """TensorFlow's padding where the stride divides the sides of a map, as it does behind an image that was padded.

    timm's module computes the padding from the size in every call, and an export with free sizes then takes minutes;
    this is the same convolution.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 1, groups=conv.groups, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.edges: list[int] = []
        for kernel, stride, dilation in zip(self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((kernel - 1) * dilation + 1 - stride, 0)
            self.edges = [total // 2, total - total // 2, *self.edges]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of torch
        return super().forward(F.pad(input, self.edges))


def _fix_same_padding(encoder: nn.Module) -> None:
    from timm.layers.conv2d_same import Conv2dSame

    for name, module in list(encoder.named_modules()):
        if isinstance(module, Conv2dSame):
            encoder.set_submodule(name, _SameConv2d(module))


@contextmanager
def _unchanged(block: nn.Module) -> Iterator[None]:
    """Puts the running statistics of batch norms back: the second forward of a batch must not count again."""
    before = [buffer.clone() for buffer in block.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(block.buffers(), before, strict=True):
                buffer.copy_(old)


def _recomputed(block: nn.Module, run: Any, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return run(*inputs)
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _unchanged(block)))


def _checkpoint_blocks(encoder: nn.Module) -> None:
    """Stores only the inputs of the encoder's blocks, and computes the rest again in backward.

    Not timm's own switch: it counts every batch twice in the running statistics, and refuses backward(inputs=...).
    """
    for stage in encoder.get_submodule("model").children():
        for block in stage if isinstance(stage, nn.Sequential) else [stage]:
            if any(isinstance(part, nn.Conv2d | nn.Linear) for child in block.children() for part in child.modules()):
                block.forward = partial(_recomputed, block, block.forward)

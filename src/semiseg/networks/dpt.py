"""DPT on plain vision transformers, such as DINOv2's, for images of any size.

Sources: Ranftl et al., "Vision Transformers for Dense Prediction", ICCV 2021; the widths and taps on DINOv2 are those
of UniMatch V2 (Yang et al., TPAMI 2025). The decoder is that of segmentation_models_pytorch, the transformer timm's.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from semiseg.types import InputError

_TAPS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
"""By the number of blocks, those whose tokens the decoder gets, from 0."""
_WIDTHS = {384: ((48, 96, 192, 384), 64), 768: ((96, 192, 384, 768), 128), 1536: ((1536,) * 4, 384)}
"""By the width of the tokens, the channels of the four maps, and of the fused ones."""
_LARGE = ((256, 512, 1024, 1024), 256)
_FINE = 8
"""px a token of the fused map."""


class Tokens(nn.Module):
    """The encoder: image (B, N, H, W) -> four maps (B, D, h, w) of one width, of tokens after their last norm."""

    def __init__(self, model: nn.Module, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.taps = model, taps
        self.patch = int(model.patch_embed.patch_size[0])  # type: ignore[index, union-attr]
        # The decoder halves the grid of tokens once.
        self.output_stride = 2 * self.patch

    def forward(self, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.model.forward_intermediates(  # type: ignore[operator]
            image, indices=list(self.taps), norm=True, intermediates_only=True, output_fmt="NCHW"
        )
        return maps


def _cuts_squares(proj: nn.Module) -> bool:
    """Whether tokens are patches of the image: of a hybrid they are places of a convolutional network's last map."""
    return (
        isinstance(proj, nn.Conv2d) and proj.kernel_size == proj.stride == (proj.stride[0],) * 2 and proj.stride[0] > 1
    )


class Fusion(nn.Module):
    """The decoder: four maps of tokens -> one at half the image's size."""

    def __init__(self, tokens: int, patch: int, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder

        # 16 px a token, whatever they stand for: the maps are to have 4, 2, 1 and 1/2 px a token.
        self.fuse = DPTDecoder([tokens] * 4, [16] * 4, False, "ignore", channels, width)
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.patch = patch

    def forward(self, features: list[Tensor]) -> Tensor:
        fused: Tensor = self.fuse(features, [None] * len(features))
        if self.patch != 2 * _FINE:
            sides = [side // _FINE * self.patch // 2 for side in fused.shape[-2:]]
            fused = F.interpolate(fused, sides, mode="bilinear", align_corners=False)
        smooth: Tensor = self.smooth(fused)
        return smooth


class DPT(nn.Module):
    """The three parts that a SegNet is made of, named as in segmentation_models_pytorch.

    taps      four blocks of the transformer, from 0, whose tokens are taken; none: spread over its depth
    channels  of the maps with 4, 2, 1 and 1/2 px a token; none: by the width of the tokens
    width     channels of the fused map; none: likewise
    """

    def __init__(
        self,
        encoder_name: str,
        in_channels: int = 3,
        classes: int = 1,
        taps: tuple[int, ...] | None = None,
        channels: tuple[int, ...] | None = None,
        width: int | None = None,
        encoder_weights: None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        import timm

        name = encoder_name.removeprefix("tu-")
        try:
            model: Any = timm.create_model(name, in_chans=in_channels, num_classes=0, dynamic_img_size=True, **kwargs)
            depth, tokens = len(model.blocks), int(model.embed_dim)
            plain = _cuts_squares(model.patch_embed.proj)
        except (TypeError, AttributeError) as error:
            if any(f"'{option}'" in str(error) for option in kwargs):
                raise  # there is no such option, whatever the encoder is
            plain = False
        if not plain:
            raise InputError(
                f"network.encoder: {name} is no plain vision transformer with square patches, which dpt is for: take "
                "one such as vit_small_patch14_dinov2, or another decoder."
            )
        found, fused = _WIDTHS[tokens] if tokens in _WIDTHS else _LARGE
        chosen = tuple(taps or (_TAPS[depth] if depth in _TAPS else (depth * i // 4 - 1 for i in range(1, 5))))
        if len(chosen) != 4 or sorted(chosen) != list(chosen) or not 0 <= chosen[0] <= chosen[-1] < depth:
            raise InputError(f"network.options.taps: name four of the blocks 0 to {depth - 1} in their order.")
        if len(channels or found) != 4:
            raise InputError("network.options.channels: give four numbers.")
        self.encoder = Tokens(model, chosen)
        self.decoder = Fusion(tokens, self.encoder.patch, tuple(channels or found), width or fused)
        self.segmentation_head = nn.Sequential(nn.Conv2d(width or fused, classes, 1))

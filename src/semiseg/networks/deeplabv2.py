"""DeepLab-v2: an encoder at stride 8 and four dilated convolutions whose answers are added up.

Sources: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully
Connected CRFs", TPAMI 2018; the dialect of its ResNet-101 in which the weights of AdvSemiSeg (Hung et al., BMVC 2018)
are published.
"""

import re
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from semiseg.types import InputError

RATES = (6, 12, 18, 24)
MEAN = (0.481_09, 0.457_53, 0.407_87)
"""Of the published weights: 122.679, 116.669, 104.007 in 0..255, red first (their code reads blue first, and turns)."""
STD = 1 / 255


class Branches(nn.Module):
    """Parallel 3x3 convolutions with different dilations, added: (B, D, h, w) -> logits (B, C, h, w)."""

    def __init__(self, width: int, classes: int, branches: int = len(RATES)) -> None:
        super().__init__()
        if branches not in range(1, len(RATES) + 1):
            raise InputError(f"network.options: branches is {branches}, but it should be 1 to {len(RATES)}.")
        self.branches = nn.ModuleList(nn.Conv2d(width, classes, 3, padding=r, dilation=r) for r in RATES[:branches])
        for branch in self.branches:
            nn.init.normal_(branch.weight, 0, 0.01)  # type: ignore[arg-type]

    def forward(self, fused: Tensor) -> Tensor:
        logits: Tensor = self.branches[0](fused)
        for branch in self.branches[1:]:
            logits = logits + branch(fused)
        return logits


class Coarsest(nn.Module):
    """A decoder that decodes nothing: the encoder's last map is the fused one."""

    def forward(self, features: list[Tensor]) -> Tensor:
        return features[-1]


class DeepLabV2(nn.Module):
    """The three parts that a SegNet is made of, named as in segmentation_models_pytorch.

    branches   of the head, four in the paper. Released code returns from inside its loop over them, and so uses two:
               published weights mean `branches: 2`.
    released   the dialect of the published weights, for a ResNet with bottlenecks: stride on the first 1x1
               convolution, dilation also in the first block of a stage, max-pooling that rounds up, and no learning of
               batch norm's scale and shift. The SegNet around it then neither pads nor aligns pixel centres.
    """

    def __init__(
        self,
        encoder_name: str,
        in_channels: int = 3,
        classes: int = 1,
        branches: int = len(RATES),
        released: bool = False,
        encoder_depth: int = 5,
        encoder_weights: None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        from segmentation_models_pytorch.encoders import get_encoder

        self.encoder = get_encoder(
            encoder_name,
            in_channels=in_channels,
            depth=encoder_depth,
            weights=encoder_weights,
            output_stride=8,
            **kwargs,
        )
        if released:
            _released(self.encoder)
        self.decoder = Coarsest()
        self.segmentation_head = nn.Sequential(Branches(self.encoder.out_channels[-1], classes, branches))


def _released(encoder: nn.Module) -> None:
    """Turns timm's ResNet into the dialect."""
    from timm.models.resnet import Bottleneck

    blocks = [module for module in encoder.modules() if isinstance(module, Bottleneck)]
    pools = [module for module in encoder.modules() if isinstance(module, nn.MaxPool2d)]
    stages = dict(encoder.get_submodule("model").named_children())
    if not blocks or len(pools) != 1 or "layer4" not in stages:
        raise InputError("network.options: released is for a whole ResNet with bottlenecks, such as resnet101.")
    pools[0].ceil_mode = True
    for block in blocks:
        first, middle = block.conv1, block.conv2
        first.stride, middle.stride = middle.stride, (1, 1)
    for stage, dilation in ((stages["layer3"], 2), (stages["layer4"], 4)):
        for block in (module for module in stage.modules() if isinstance(module, Bottleneck)):
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)
    for module in encoder.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)  # the statistics go on


def head_names(head: nn.Module) -> dict[str, Tensor]:
    """The head's tensors by the names that published files give them."""
    return {_published(name): tensor for name, tensor in head.state_dict().items()}


def _published(name: str) -> str:
    return re.sub(r"^branches\.", "layer5.conv2d_list.", name)

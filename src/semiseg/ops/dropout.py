"""Dropout of whole channels."""

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd


class ComplementaryDropout(_DropoutNd):
    """What one of two views of an image loses the other one keeps (Yang et al., UniMatch V2, TPAMI 2025).

    Of each image, channels are kept and doubled in the first view with a probability of one half, and in the second
    the others are. Half of the images, rounded down, keep all in both. Maps of one width share their channels; where
    widths differ, each map has its own. `p`, the share of the images' other half that takes part, is 1, or 0 for none.
    """

    def __init__(self) -> None:
        super().__init__(p=1.0)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps (2B, D, h, w), the first B of the first views, the others of the second -> the same, perturbed."""
        if not self.training or self.p == 0:
            return maps
        images, widths = len(maps[0]) // 2, [m.shape[1] for m in maps]
        whole = torch.rand(images, device=maps[0].device).argsort() < images // 2
        shared = len(set(widths)) == 1
        masks: list[Tensor] = []
        for m in maps:
            if not masks or not shared:
                first = 2.0 * torch.randint(0, 2, (images, m.shape[1]), device=m.device)
                first = torch.where(whole[:, None], 1.0, first)
                masks.append(torch.cat([first, 2 - first]).to(m.dtype)[:, :, None, None])
            else:
                masks.append(masks[0])
        return [m * mask for m, mask in zip(maps, masks, strict=True)]

"""The loss on labelled images, one group of options for all methods."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from semiseg.networks.factory import Build
from semiseg.ops.losses import class_weights, cross_entropy, dice, ohem, soft_cross_entropy
from semiseg.types import Options, Share


class LossConfig(Options):
    """How labelled pixels count."""

    kind: Literal["ce", "ohem", "ce+dice"] = "ce"
    """ce: cross-entropy. ohem: that of hard pixels. ce+dice: with a dice loss over the classes that the masks show."""
    class_weights: bool = False
    """Weigh classes by the inverse root of their pixels in the labelled masks (ce and ce+dice)."""
    ohem_threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Pixels whose class is predicted with less than this are hard."""
    ohem_kept: Annotated[int, Field(gt=0)] = 100_000
    """Fewest pixels a batch that OHEM keeps."""
    dice_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of ce+dice: what dice counts beside the cross-entropy."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "ohem" and self.class_weights:
            raise ValueError("method.loss.class_weights has no effect on kind: ohem; choose one of the two")
        return self


class LabelledLoss(nn.Module):
    """The chosen loss as weighted terms for `StepMethod.update`; the first term is the cross-entropy."""

    weight: Tensor | None

    def __init__(self, config: LossConfig, build: Build) -> None:
        super().__init__()
        self.config = config
        weight = None
        if config.class_weights:
            assert build.class_pixels is not None, "class weights need data"
            weight = class_weights(build.class_pixels())
        self.register_buffer("weight", weight)

    def forward(
        self,
        logits: Tensor,
        mask: Tensor,
        weight: float = 1.0,
        soft: Tensor | None = None,
        of_image: Tensor | None = None,
    ) -> list[tuple[float, Share]]:
        """Terms for logits (B, C, H, W) and mask (B, H, W), each times `weight`.

        soft: as in types.Labelled; of_image (B,): what each image's pixels count in the cross-entropy (ce and ce+dice).
        """
        c = self.config
        if c.kind == "ohem":
            assert of_image is None, "ohem has no weights of images"
            return [(weight, ohem(logits, mask, c.ohem_threshold, c.ohem_kept))]
        if soft is None:
            terms = [(weight, cross_entropy(logits, mask, self.weight, of_image))]
        else:
            terms = [(weight, soft_cross_entropy(logits, mask, soft, self.weight, of_image))]
        if c.kind == "ce+dice":
            terms.append((weight * c.dice_weight, dice(logits, mask)))
        return terms

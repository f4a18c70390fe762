"""ST: plain self-training, but the student sees pseudo-labelled images in a strong view, which their labels do not.

Yang, Zhuo, Qi, Shi and Gao, "ST++: Make Self-training Work Better for Semi-supervised Semantic Segmentation", CVPR 2022
(arXiv:2106.05095), whose first algorithm it is.

Deliberate differences from the released code:

- every stage has `train.steps` steps (released: 80 or 240 epochs each, so the student's stage is several times longer);
- the hole of Cutout has the mean colour (released: noise), and its sides are powers of its area (released: a uniform
  ratio of the sides, drawn until the box fits);
- the teacher's probabilities are averaged at each image's own size; no mask of an unlabelled image is opened;
- the student's batch norm is that of all processes (released: of each GPU);
- bilinear resizing with align_corners=False.
"""

from typing import Annotated

from pydantic import Field
from torch import nn

from semiseg.data.splits import Data
from semiseg.methods.base import Method, Session
from semiseg.methods.labelled import LossConfig
from semiseg.methods.retraining import Retraining, StrongConfig, tell_of_colours
from semiseg.methods.supervised import Supervised
from semiseg.networks.factory import Build
from semiseg.types import InputError, Options


class ST(Method):
    """A teacher from the masks labels all other images; a student learns from both, the latter in a strong view."""

    class Config(Options):
        """Options of `method: {name: st}`."""

        loss: LossConfig = LossConfig()
        strong: StrongConfig = StrongConfig()
        flip: bool = True
        """The teacher labels the mirrored image too, and the mean counts."""
        scales: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (0.5, 0.75, 1.0, 1.5, 2.0)
        """And the image resized by these factors."""

    paper = "Yang et al., CVPR 2022, without its selection"

    def __init__(self, config: Config, build: Build) -> None:
        self.config, self.build = config, build
        build.network()  # every stage makes its own later: what they start from is said, or refused, before the first
        tell_of_colours(build)

    def fit(self, session: Session, data: Data) -> nn.Module:
        c, stage = self.config, session.stage("student")
        if not len(data.unlabelled):
            raise InputError(
                "The method labels unlabelled images, and there is none: change data.unlabelled or method."
            )
        teacher = session.stage("teacher").train(Supervised.of(c.loss, self.build), data)
        several = session.inference.model_copy(update={"flip": c.flip, "scales": c.scales})
        pseudo = stage.pseudo_label(teacher, data.unlabelled, data, several)
        return stage.train(Retraining(c.loss, c.strong, self.build.again(1), data.labelled, pseudo), data)

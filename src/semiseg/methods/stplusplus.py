"""ST++: self-training in two rounds, first with the unlabelled images whose labels are the most reliable.

Yang, Zhuo, Qi, Shi and Gao, "ST++: Make Self-training Work Better for Semi-supervised Semantic Segmentation", CVPR 2022
(arXiv:2106.05095).

    reliability of image i = 1 / (K - 1)  sum over k < K of  mIoU(y_ik, y_iK)

y_ik is what snapshot k of K of the teacher's training sees in image i. An image on which the teacher has long made up
its mind has good labels: it is learned from first, and the better network labels the other half.

Deliberate differences from the released code, besides those of ST (st.py), which hold here too:

- of several images with the same reliability the first in the list are taken;
- an image that cannot be read counts as the least reliable, and gets no label.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from semiseg.data.rows import Rows
from semiseg.data.splits import Data
from semiseg.methods.base import Method, Session
from semiseg.methods.labelled import LossConfig
from semiseg.methods.retraining import Retraining, StrongConfig, tell_of_colours
from semiseg.methods.supervised import Supervised
from semiseg.networks.factory import Build
from semiseg.types import InputError, Options

Indices = NDArray[np.intp]


class STPlusPlus(Method):
    """A teacher from the masks; a student from the reliable half of its labels; one from that one's labels too."""

    class Config(Options):
        """Options of `method: {name: st++}`."""

        loss: LossConfig = LossConfig()
        strong: StrongConfig = StrongConfig()
        snapshots: Annotated[int, Field(ge=2, le=100)] = 3
        """K: how often the teacher is stored while it is trained, evenly and at the end."""
        flip: bool = True
        """An image is labelled mirrored too, and the mean counts; not for its reliability."""
        scales: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (0.5, 0.75, 1.0, 1.5, 2.0)
        """And resized by these factors."""

    paper = "Yang et al., CVPR 2022"

    def __init__(self, config: Config, build: Build) -> None:
        self.config, self.build = config, build
        build.network()  # every stage makes its own later: what they start from is said, or refused, before the first
        tell_of_colours(build)

    def fit(self, session: Session, data: Data) -> nn.Module:
        c, unlabelled = self.config, data.unlabelled
        if len(unlabelled) < 2:
            raise InputError(
                "The method learns from one half of the unlabelled images first, so it needs two, and there is "
                f"{len(unlabelled) or 'none'}: change data.unlabelled or method."
            )
        first, second, third = (session.stage(name) for name in ("teacher", "reliable", "all"))
        single = session.inference.model_copy(update={"flip": False, "scales": (1.0,)})
        several = session.inference.model_copy(update={"flip": c.flip, "scales": c.scales})

        shares = [k / c.snapshots for k in range(1, c.snapshots + 1)]
        teacher = first.train(Supervised.of(c.loss, self.build), data, keep=shares)
        reliability = first.reliability([first.kept(share, teacher) for share in shares], unlabelled, data, single)
        reliable, unreliable = halves(reliability)

        pseudo = second.pseudo_label(teacher, unlabelled[reliable], data, several)
        student = second.train(self._student(1, data, pseudo), data)

        pseudo = pseudo + third.pseudo_label(student, unlabelled[unreliable], data, several)
        return third.train(self._student(2, data, pseudo), data)

    def _student(self, number: int, data: Data, pseudo: Rows) -> Retraining:
        """From scratch, with random numbers of its own."""
        return Retraining(self.config.loss, self.config.strong, self.build.again(number), data.labelled, pseudo)


def halves(reliability: NDArray[np.float64]) -> tuple[Indices, Indices]:
    """The numbers of the more reliable half of n images, floor(n / 2), and of the others; NaN is the least of all."""
    order = np.argsort(-reliability, kind="stable")
    half = len(order) // 2
    return np.sort(order[:half]), np.sort(order[half:])

"""Self-training: a teacher learns from the masks and labels all other images; a student learns from both.

Zhu, Zhang, Wu, Zhang, He, Zhang, Manmatha, Li and Smola, "Improving Semantic Segmentation via Efficient Self-Training",
2020 (arXiv:2004.14960). No training code was published. The paper gives the stages, hard labels, the ratio of real to
pseudo images in an epoch, and that half of the crops are drawn around places of each class alike (its authors' earlier
code has the algorithm; data/centroids.py mends it). The rest is ours:
- the student starts from the encoder's weights like the teacher, with other random numbers;
- a pixel counts the same whether its label is real or not, unless `pseudo_weight` says otherwise;
- class weights and the delivered checkpoint are those of the masks and of val, never of pseudo-labels.

What stays per process where there are several: batch norm's statistics on CPUs; and dice, of which the mean is taken.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from torch import nn

from semiseg.data.centroids import class_centroids
from semiseg.data.rows import Rows
from semiseg.data.sampling import Mixture, Part, Phase, Stream
from semiseg.data.splits import Data
from semiseg.methods.base import Method, Session
from semiseg.methods.labelled import LossConfig
from semiseg.methods.supervised import Supervised
from semiseg.networks.factory import Build, NetworkConfig
from semiseg.types import InputError, Options, Portion, Side, TrainConfig


class SelfTraining(Method):
    """A teacher from the masks, its labels for all other images, a student from both; again, if wanted."""

    class Config(Options):
        """Options of `method: {name: selftraining}`."""

        loss: LossConfig = LossConfig()
        teacher: Path | None = None
        """A run, or its model, that is the first teacher: its classes are the data's. None: one is trained."""
        teacher_network: NetworkConfig | None = None
        """The first teacher's, by the options of `network`; none: the same as the students', which `network` has."""
        rounds: Annotated[int, Field(ge=1)] = 1
        """Students; each is the teacher of the next."""
        least: Portion = 0.0
        """Confidence of the teacher below which a pixel gets no label; the paper keeps all."""
        top: Annotated[int, Field(ge=1)] = 1
        """Classes of a pixel that its label keeps with their probabilities; 1: hard labels, as in the paper."""
        ratio: Annotated[float, Field(gt=0, le=1000)] | None = None
        """Pseudo-labelled samples for each real one in a student's epochs; none: as many as there are images."""
        per_batch: bool = False
        """Every batch has this ratio, as near as whole images come, instead of an epoch."""
        pseudo_weight: Annotated[float, Field(ge=0)] = 1.0
        """What a pixel with a pseudo-label counts in the cross-entropy beside a real one's 1."""
        centred: Portion = 0.5
        """Share of the crops that are drawn around a place of a class, every class alike."""
        tile: tuple[Side, Side] | None = None
        """(H, W) in px of the tiles that have a place for each of their classes; none: the crop's."""
        least_pixels: Side = 64
        """Pixels of a class in a tile that make a place."""
        flip: bool = False
        """The teacher labels the mirrored image too, and the mean counts."""
        scales: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0,)
        """And the image resized by these factors."""

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            if self.teacher is not None and self.teacher_network is not None:
                raise ValueError("teacher and teacher_network exclude each other: remove one")
            if self.top > 1 and self.loss.kind == "ohem":
                raise ValueError("top needs loss.kind: ce or ce+dice, for ohem has no form for soft labels")
            if self.pseudo_weight != 1 and self.loss.kind == "ohem":
                raise ValueError("pseudo_weight needs loss.kind: ce or ce+dice, for ohem counts every pixel alike")
            return self

    paper = "Zhu et al., 2020"

    def __init__(self, config: Config, build: Build) -> None:
        self.config, self.build = config, build
        build.network()  # every stage makes its own later: what they start from is said, or refused, before the first

    def fit(self, session: Session, data: Data) -> nn.Module:
        c = self.config
        if not len(data.unlabelled):
            raise InputError(
                "The method labels unlabelled images, and there is none: change data.unlabelled or method."
            )
        net = self._given(c.teacher, data) if c.teacher is not None else self._teacher(session, data)
        session.starts_from(self.build.report)
        for number in range(1, c.rounds + 1):
            stage = session.stage(f"round-{number}")
            inference = session.inference.model_copy(update={"flip": c.flip, "scales": c.scales})
            pseudo = stage.pseudo_label(net, data.unlabelled, data, inference, c.least, _top(c, data))
            if not len(pseudo):
                raise InputError(
                    "No unlabelled image can be read, and the method learns from them: repair or change them."
                )
            net = self._train(stage, self.build.again(number), data, data.labelled + pseudo, len(pseudo))
        return net

    def _teacher(self, session: Session, data: Data) -> nn.Module:
        network, stage = self.config.teacher_network, session.stage("teacher")
        if network is None:
            return self._train(stage, self.build, data, data.labelled, 0)
        try:
            return self._train(stage, replace(self.build, config=network), data, data.labelled, 0)
        except InputError as error:
            raise InputError(f"stage teacher, with method.teacher_network: {error}") from error

    def _given(self, path: Path, data: Data) -> nn.Module:
        """A teacher that was trained elsewhere."""
        net, classes = self.build.trained(path, "method.teacher")
        if classes != data.classes:
            raise InputError(
                f"method.teacher: {path} knows {', '.join(classes)}, but the data {', '.join(data.classes)}: "
                "name a run with the same classes in the same order, or take method: transfer."
            )
        return net

    def _train(self, session: Session, build: Build, data: Data, rows: Rows, pseudo: int) -> nn.Module:
        """A network from rows of which the last `pseudo` have pseudo-labels."""
        stream = stream_of(self.config, session.config, data, rows, pseudo)
        weight = self.config.pseudo_weight
        weighed = (len(rows) - pseudo, weight) if pseudo and weight != 1 else None
        method = Supervised.of(self.config.loss, build, weighed)
        session.starts_from(build.report)
        return session.train(method, data, {"labelled": stream})


def stream_of(config: SelfTraining.Config, train: TrainConfig, data: Data, rows: Rows, pseudo: int) -> Stream:
    """What a network learns from: rows of which the last `pseudo` have pseudo-labels; none for the first teacher."""
    real = len(rows) - pseudo

    def part(first: int, count: int, items: int) -> Part:
        if not config.centred:
            return Part(first, count, items)
        some, tile = rows[first : first + count], config.tile or train.crop
        places = class_centroids(some, data, tile, config.least_pixels, train.workers)
        return Part(first, count, items, places, config.centred)

    parts = [part(0, real, real)]
    if pseudo:
        parts.append(part(real, pseudo, pseudo if config.ratio is None else max(1, round(config.ratio * real))))
    mixture = Mixture(tuple(parts), config.per_batch)
    top = _top(config, data) if pseudo else 1
    return Stream(rows, (Phase(train.crop, train.batch),), mixture=mixture, top=top)


def _top(config: SelfTraining.Config, data: Data) -> int:
    return min(config.top, len(data.classes))

"""Self-training from one data set to another with other classes: two teachers label, and a student learns from all.

Zhu et al., "Improving Semantic Segmentation via Efficient Self-Training", 2020 (arXiv:2004.14960), go from Cityscapes
to Mapillary, which has more classes and few of whose masks are used; the way there is not published. Here:

1. `source`: a teacher of the source's classes learns from the source's masks.
2. `target`: it is fine-tuned on the target's few masks, and knows all of the target's classes then.
3. Both label the target's other images. A new class, one that no class of the source means, is the second's to see; the
   rest is the first's, which has seen far more masks (ops.pseudo.Merge).
4. `student`: a new network learns from the source's masks, the target's masks and the labels.

The file of classes says which class of the target each of the source's means. One that may hold a new class too means
none: its pixels are ignored, for as examples of anything else they would teach the student not to see the new class.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Self

import torch
import yaml
from pydantic import Field, model_validator
from torch import Tensor, nn

from semiseg.data.centroids import class_centroids
from semiseg.data.check import class_pixels, leaks
from semiseg.data.rows import Rows
from semiseg.data.sampling import Mixture, Part, Phase, Stream
from semiseg.data.splits import Data, DataConfig, load_data
from semiseg.methods.base import Method, Session
from semiseg.methods.labelled import LossConfig
from semiseg.methods.supervised import Supervised
from semiseg.networks.factory import Build
from semiseg.networks.weights import load_network
from semiseg.ops.pseudo import Merge, Pair
from semiseg.types import IGNORE, InputError, Options, Portion, Side, nearest, some

Weight = Annotated[float, Field(ge=0)]
NONE = ("", "~", "null", "Null", "NULL")
"""What stands for no class in a file of classes, as in YAML."""


class Transfer(Method):
    """A source with all its masks, a target with few: a teacher of each, and a student of both."""

    class Config(Options):
        """Options of `method: {name: transfer}`; `data` is the target."""

        source: DataConfig
        """The source, by the options of `data`; its labelled images count. Crops are drawn as `data` says."""
        classes: Path
        """A YAML file: for each class of the source the target's class that it means, or null for none."""
        teacher: Path | None = None
        """A run on the source, or its model, that is the first teacher; none: one is trained."""
        loss: LossConfig = LossConfig()
        least: Portion = 0.0
        """Confidence that the first teacher needs to label a pixel."""
        least_new: Portion = 0.0
        """Confidence that the second teacher needs to label a pixel as a new class."""
        doubt: Portion = 0.2
        """Probability of all new classes together, by the second teacher, above which the first may not decide."""
        shares: tuple[Weight, Weight, Weight] = (1.0, 1.0, 1.0)
        """The student's samples of the source, of the target's masks and of its labels: their relation."""
        centred: Portion = 0.5
        """Share of the crops that are drawn around a place of a class, every class alike."""
        tile: tuple[Side, Side] | None = None
        """(H, W) in px of the tiles that have a place for each of their classes; none: the crop's."""
        least_pixels: Side = 64
        """Pixels of a class in a tile that make a place."""
        flip: bool = False
        """The teachers label the mirrored image too, and the mean counts."""
        scales: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0,)
        """And the image resized by these factors."""

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            if not sum(self.shares):
                raise ValueError("shares are all 0: the student needs something to learn from")
            return self

    paper = "Zhu et al., 2020, to a domain with other classes"

    def __init__(self, config: Config, build: Build) -> None:
        self.config, self.build = config, build
        build.network()  # every stage makes its own later: what they start from is said, or refused, before the first

    def fit(self, session: Session, data: Data) -> nn.Module:
        c = self.config
        source, to = self.source(c, data)
        session.starts_from(meaning(source, to, data))
        unlabelled = data.unlabelled.without(data.labelled)
        if not len(unlabelled):
            raise InputError(
                "The method labels unlabelled images, and there is none: change data.unlabelled or method."
            )

        first = self._first(session, source, data, to)
        stage, method = session.stage("target"), Supervised.of(c.loss, self.build.again(1))
        stage.starts_from(self._load(method.student, first, source, data, to))
        second = stage.train(method, data)
        stage = session.stage("student")
        inference = session.inference.model_copy(update={"flip": c.flip, "scales": c.scales})
        pair = Pair(first, second, Merge(to, c.least, c.least_new, c.doubt))
        pseudo = stage.pseudo_label(pair, unlabelled, data, inference)
        if not len(pseudo):
            raise InputError("No unlabelled image can be read, and the method learns from them: repair or change them.")

        masks = source.labelled.read_by(source.code.mapped(to))
        build = replace(self.build.again(2), class_pixels=lambda: _known(data, masks))
        return self._train(stage, build, data, {"labelled": self._stream(stage, data, masks, data.labelled, pseudo)})

    def _first(self, session: Session, source: Data, data: Data, to: Sequence[int]) -> nn.Module:
        """The teacher of the source's classes."""
        if self.config.teacher is None:
            names = source.classes
            build = replace(self.build, classes=len(names), names=names, class_pixels=lambda: class_pixels(source))
            # What cannot go over to the target's classes is refused before it is trained.
            self._load(self.build.network(), build.network(), source, data, to)
            return self._train(session.stage("source"), build, source)
        net, classes = self.build.trained(self.config.teacher, "method.teacher")
        if classes != source.classes:
            raise InputError(
                f"method.teacher: {self.config.teacher} knows {', '.join(classes)}, but method.source has "
                f"{', '.join(source.classes)}: name a run on the source."
            )
        session.starts_from(self.build.report)
        return net

    def _load(self, net: nn.Module, first: nn.Module, source: Data, data: Data, to: Sequence[int]) -> list[str]:
        """Gives a network of the target the first teacher's weights; of classes that mean the same one the first's row.

        Returns what became of them, as lines for the user.
        """
        names = [f"source: {n}" if t == IGNORE else data.classes[t] for n, t in zip(source.classes, to, strict=True)]
        option = "method: transfer" if self.config.teacher is None else "method.teacher"
        return load_network(net, first.state_dict(), "the teacher of the source", names, data.classes, option)

    def _train(self, session: Session, build: Build, data: Data, streams: dict[str, Stream] | None = None) -> nn.Module:
        return session.train(Supervised.of(self.config.loss, build), data, streams)

    def _stream(self, session: Session, data: Data, *pools: Rows) -> Stream:
        """The source's masks, the target's masks and its labels, each with its share of an epoch and its places."""
        c, train = self.config, session.config
        total, weights = sum(map(len, pools)), sum(c.shares)
        parts, rows = [], pools[0][:0]
        for pool, weight in zip(pools, c.shares, strict=True):
            if items := round(total * weight / weights):
                tile = c.tile or train.crop
                places = class_centroids(pool, data, tile, c.least_pixels, train.workers) if c.centred else None
                parts.append(Part(len(rows), len(pool), items, places, c.centred))
                rows = rows + pool
        return Stream(rows, (Phase(train.crop, train.batch),), mixture=Mixture(tuple(parts)))

    @classmethod
    def look(cls, config: Options, data: Data) -> list[str]:
        assert isinstance(config, cls.Config)
        return meaning(*cls.source(config, data), data)

    @staticmethod
    def source(config: Config, data: Data) -> tuple[Data, tuple[int, ...]]:
        """The source, and the id in the target of each of its classes, or IGNORE.

        Raises:
            InputError: the source cannot be used, the file of classes is none or does not fit, the channels differ, or
                the source holds images of the target's val or test split.
        """
        try:
            source = load_data(config.source)
        except InputError as error:
            raise InputError(f"method.source: {error}") from error
        if source.config.channels != data.config.channels:
            raise InputError(
                f"method.source has images of {source.config.channels} channels, data of {data.config.channels}: "
                "set channels to the same number in both."
            )
        to = class_map(config.classes, source.classes, data.classes)
        masks = source.labelled.read_by(source.code.mapped(to))
        if problems := leaks(replace(data, labelled=masks)):
            raise InputError(f"method.source: {problems[0]}")
        return source, to


def class_map(path: Path, source: Sequence[str], target: Sequence[str]) -> tuple[int, ...]:
    """The id in the target of each class of the source by a YAML file, or IGNORE.

    Raises:
        InputError: it is no such file, or names or lacks a class.
    """
    try:
        # As text: a class may be called 1 or no.
        tree = yaml.compose(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}): correct it.") from error
    nodes = tree.value if isinstance(tree, yaml.MappingNode) else []
    if not nodes or not all(isinstance(node, yaml.ScalarNode) for pair in nodes for node in pair):
        raise InputError(f"{path} is no map of classes: write a line `class of the source: class of the target` each.")
    lines = [(key.value, None if value.style is None and value.value in NONE else value.value) for key, value in nodes]
    table = dict(lines)
    twice = [name for name in table if sum(name == key for key, _ in lines) > 1]
    if twice:
        raise InputError(f"{path} names {some(twice)} twice: give each of the source's classes one line.")
    lacking = [name for name in source if name not in table]
    wrong = [f"lacks {some(lacking)}: give each of the source's classes a line."] if lacking else []
    wrong += [f"names {n}, which is no class of the source; {nearest(n, source)}" for n in table if n not in source]
    strange = [name for name in table.values() if name is not None and name not in target]
    wrong += [f"names {n}, which is no class of the data; {nearest(n, target)}" for n in strange]
    if wrong:
        raise InputError(" ".join(f"{path} {sentence}" for sentence in wrong))
    if not any(name is not None for name in table.values()):
        raise InputError(
            f"{path} gives every class null, so that nothing of the source can be used: name one at least."
        )
    return tuple(IGNORE if (name := table[n]) is None else target.index(name) for n in source)


def meaning(source: Data, to: Sequence[int], data: Data) -> list[str]:
    """What is learned from the source, in lines for the user."""
    pairs = [(name, data.classes[t]) for name, t in zip(source.classes, to, strict=True) if t != IGNORE]
    new = [name for i, name in enumerate(data.classes) if i not in to]
    unused = [name for name, t in zip(source.classes, to, strict=True) if t == IGNORE]
    return [
        f"source {source.config.root}: {len(source.labelled)} labelled images",
        f"  {', '.join(f'{theirs} is {ours}' for theirs, ours in pairs)}",
        f"  new classes, which it does not show: {', '.join(new) or 'none'}",
        f"  not used of it: {', '.join(unused) or 'none'}",
    ]


def _known(data: Data, source: Rows) -> Tensor:
    """(C,) pixels of each class in the target's masks; of one that only the source shows, by its share there."""
    own = class_pixels(data)
    if own.all():
        return own
    theirs = class_pixels(replace(data, labelled=source))
    return torch.where(own == 0, theirs / theirs.sum().clamp(min=1) * own.sum(), own)

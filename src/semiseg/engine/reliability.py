"""How reliable a network's labels of each image are: how much they changed while it was trained.

Yang et al., CVPR 2022 (ST++): the mean IoU of what earlier snapshots saw in an image with what the last one sees.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from semiseg import parallel
from semiseg.data.formats import read_image
from semiseg.data.rows import Row, Rows
from semiseg.data.splits import Data
from semiseg.engine.evaluate import ahead
from semiseg.engine.predict import Predictor
from semiseg.engine.pseudo import differing, fingerprint, weights_hash
from semiseg.files import write_json
from semiseg.ops.metrics import agreement, confusion
from semiseg.progress import tracked
from semiseg.types import Changed, InferenceConfig, InputError

FILE = "reliability.json"
"""Written when all images have a score."""


@dataclass(frozen=True)
class Ranking:
    """The images in their order with their scores, 0..1, none where one could not be read, and the reason by its path.

    depends: what the scores depend on; seconds: of the call that found them.
    """

    depends: dict[str, Any]
    names: list[str]
    scores: list[float | None]
    failed: dict[str, str]
    seconds: float

    def array(self) -> NDArray[np.float64]:
        """The scores (n,), NaN where there is none."""
        return np.array(self.scores, dtype=np.float64)

    def remark(self) -> str:
        """A sentence for the user."""
        scores = self.array()
        scores = scores[~np.isnan(scores)]
        if not len(scores):
            return "no image has a reliability: none can be read"
        low, half, high = np.quantile(scores, (0.25, 0.5, 0.75))
        return (
            f"{len(scores)} unlabelled images ranked by reliability: "
            f"a quarter are below {low:.3f}, half below {half:.3f}, three quarters below {high:.3f}"
        )


def reliability(
    nets: Sequence[nn.Module], rows: Rows, data: Data, folder: Path, inference: InferenceConfig, device: torch.device
) -> Ranking:
    """Scores each row: the mean over `nets` but the last of their agreement (ops/metrics) with the last one.

    What is in the folder is taken; a call that was interrupted begins anew. Several processes take a part of the rows
    each.

    Args:
        nets: snapshots of one network in the order of training, two or more, in eval mode.
        rows: images, with or without masks; masks are not opened.
        data: classes, channels and size.
        folder: of the stage that trained the network.
        inference: window, mirror images and scales.
        device: where the networks are.

    Raises:
        InputError: the folder holds scores of other snapshots, of other images or by other options.
    """
    assert len(nets) > 1, "snapshots are compared with the last one"
    assert not any(net.training for net in nets), "snapshots are in eval mode"
    depends = {**fingerprint(nets[-1], rows, data, inference), "snapshots": [weights_hash(net) for net in nets]}
    path = folder / FILE
    if not parallel.first(path.exists()):
        began = time.perf_counter()
        sizes = data.config.channels, data.config.size
        predictors = [Predictor(net, data.classes, data.palette, *sizes, inference, device) for net in nets]
        scores, failed = _scores(predictors, rows)
        if parallel.rank() == 0:
            ranking = Ranking(depends, list(rows.names), scores, failed, time.perf_counter() - began)
            write_json(path, asdict(ranking))
        parallel.wait()
    ranking = Ranking(**json.loads(path.read_text(encoding="utf-8")))
    if other := differing(ranking.depends, depends):
        raise InputError(f"{path} ranks images by other {other}: remove it, and they are ranked anew.")
    return ranking


def _scores(predictors: Sequence[Predictor], rows: Rows) -> tuple[list[float | None], dict[str, str]]:
    """The score of each row, none where it cannot be read, and then the reason by its path; of all processes."""
    channels, classes = predictors[0].channels, len(predictors[0].classes)

    def read(row: Row) -> NDArray[np.generic] | InputError:
        try:
            return read_image(row.image, channels)
        except Changed:
            raise
        except InputError as error:
            return error

    mine = rows[parallel.rank() :: parallel.world()]
    shown = tracked(ahead(read, mine), "ranking", len(mine))
    scores: list[float | None] = []
    failed: dict[str, str] = {}
    for row, image in zip(mine, shown, strict=True):
        if isinstance(image, InputError):
            failed[str(row.image)] = str(image)
            scores.append(None)
        else:
            *before, last = (torch.from_numpy(predictor(image).mask) for predictor in predictors)
            pairs = torch.stack([confusion(label, last, classes) for label in before])
            scores.append(float(agreement(pairs).mean()))
    whole: list[float | None] = [None] * len(rows)
    for i, part in enumerate(parallel.gather(scores)):
        whole[i :: parallel.world()] = part
    return whole, {path: why for part in parallel.gather(failed) for path, why in part.items()}

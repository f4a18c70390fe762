"""Labels that a network gives to images without masks, on the disk, for another network to learn.

The same pipeline as `semiseg predict --confidence`, with files by number in folders of a thousand: large folders are
slow, and two images of one name do not meet.
"""

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from semiseg import parallel
from semiseg.data.rows import Rows
from semiseg.data.splits import Data
from semiseg.engine.evaluate import ahead
from semiseg.engine.predict import Job, Predictor, run_jobs
from semiseg.files import sweep, write_json
from semiseg.ops.pseudo import Pair
from semiseg.types import InferenceConfig, InputError, some

CARD, REPORT = "labels.json", "report.json"
"""What labels depend on, written first; and how it went, written when all are there."""
SHARD = 1000


def pseudo_label(
    net: nn.Module,
    rows: Rows,
    data: Data,
    folder: Path,
    inference: InferenceConfig,
    device: torch.device,
    least: float = 0.0,
    top: int = 1,
) -> tuple[Rows, "Report"]:
    """Writes a label and a confidence map for each row below `folder`, or goes on with what is there.

    Args:
        net: the teacher, or two as a Pair; it stays in the mode it is in.
        rows: images, with or without masks; masks are not opened.
        data: classes, channels and size.
        folder: of these labels alone.
        inference: window, mirror images and scales of the teacher.
        device: where the teacher is.
        least: confidence below which a pixel is IGNORE, 0..1.
        top: the most probable classes of each pixel that are kept, at most all of them.

    Returns:
        the rows with their labels as masks, without those whose image could not be read; and how it went.

    Raises:
        InputError: the folder holds labels of another teacher, of other images or by other options.
    """
    merge = repr(net.merge) if isinstance(net, Pair) else None
    _claim(folder, {**fingerprint(net, rows, data, inference), "least": least, "top": top, "merge": merge})
    jobs = _Jobs(rows, folder, top > 1)
    report = folder / REPORT
    if not report.exists():
        began = time.perf_counter()
        sizes = data.config.channels, data.config.size
        predictor = Predictor(net, data.classes, data.palette, *sizes, inference, device, top)
        modes = [(module, module.training) for module in net.modules()]
        net.eval()
        failed = run_jobs(predictor, jobs, least, "labelling")
        for module, training in modes:
            module.training = training
        parallel.wait()
        counts = _confidences(jobs, failed).tolist()
        # From here on the pool is fixed: an image that can be read again would change the student's draws.
        if parallel.rank() == 0:
            write_json(report, {"failed": failed, "confidences": counts, "seconds": time.perf_counter() - began})
        parallel.wait()
    return finished(rows, data, folder)


def finished(rows: Rows, data: Data, folder: Path) -> tuple[Rows, "Report"]:
    """What `pseudo_label` returned when it had labelled these rows in this folder."""
    told = Report(**json.loads((folder / REPORT).read_text(encoding="utf-8")))
    good = np.arange(len(rows))
    if told.failed:
        good = good[[str(row.image) not in told.failed for row in rows]]

    def files(kind: str) -> Iterator[str]:
        return (_name(kind, i) for i in good.tolist())

    return rows[good].with_masks(files("labels"), data.code.plain(), files("confidence"), folder.absolute()), told


@dataclass(frozen=True)
class Report:
    """How labelling went: images that could not be read, each with the reason; how many pixels have which confidence
    (256,), 0 to 255; and seconds, of the call that finished it."""

    failed: dict[str, str]
    confidences: list[int]
    seconds: float

    def remarks(self, least: float) -> list[str]:
        """Sentences for the user."""
        lines = [f"no pseudo-label for {some(self.failed)}: it cannot be read"] if self.failed else []
        counts = np.array(self.confidences)
        return [*lines, _told(counts, least)] if least > 0 and counts.any() else lines


@dataclass(frozen=True)
class _Jobs(Sequence[Job]):
    """One for each row, made when it is asked for: a list of them costs some 2 GB a million images."""

    rows: Rows
    folder: Path
    soft: bool

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, key: int) -> Job: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[Job]: ...
    def __getitem__(self, key: int | slice) -> Job | Sequence[Job]:
        if isinstance(key, slice):
            return [self[i] for i in range(len(self))[key]]
        labels, sure, soft = (_file(self.folder, kind, key) for kind in ("labels", "confidence", "soft"))
        return Job(self.rows[key].image, labels, sure, soft=soft.with_suffix(".npz") if self.soft else None)


def _file(folder: Path, kind: str, number: int) -> Path:
    return folder / _name(kind, number)


def _name(kind: str, number: int) -> str:
    return f"{kind}/{number // SHARD:04d}/{number:07d}.png"


def weights_hash(net: nn.Module) -> str:
    """What tells a network's weights and buffers from others."""
    weights = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return weights.hexdigest()[:16]


def fingerprint(net: nn.Module, rows: Rows, data: Data, inference: InferenceConfig) -> dict[str, Any]:
    """What a network's predictions of these images depend on."""
    images = hashlib.sha256()
    for start in range(0, len(rows), SHARD):  # one text of a million names would take gigabytes
        names = "\n".join(rows[start : start + SHARD].names)
        images.update((names if start == 0 else f"\n{names}").encode())
    return {
        "teacher": weights_hash(net),
        "images": f"{len(rows)}, {images.hexdigest()[:16]}",
        "classes": list(data.classes),
        "size": list(data.config.size) if isinstance(data.config.size, tuple) else data.config.size,
        "inference": json.loads(inference.model_dump_json()),
    }


def differing(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    """The names of what stands otherwise in a file than here, in a sentence; empty where all is equal."""
    return ", ".join(name for name, value in mine.items() if name not in theirs or theirs[name] != value)


def _claim(folder: Path, mine: dict[str, Any]) -> None:
    """Marks the folder as that of these labels.

    Raises:
        InputError: it is that of others.
    """
    card = folder / CARD
    if card.exists():
        theirs = json.loads(card.read_text(encoding="utf-8"))
        if other := differing(theirs, mine):
            raise InputError(
                f"{folder} holds pseudo-labels that differ in {other}: remove the folder to make them anew, "
                "or choose another run's folder to keep them."
            )
    parallel.wait()
    if parallel.rank() == 0:
        if card.exists():
            sweep(folder)
        else:
            write_json(card, mine)
    parallel.wait()


def _confidences(jobs: Sequence[Job], failed: Collection[str]) -> NDArray[np.int64]:
    """How many pixels of all maps have which confidence, 0..255: read from the files, for some were there before."""

    def count(i: int) -> NDArray[np.int64]:
        job = jobs[i]
        assert job.confidence is not None
        if str(job.source) in failed:
            return np.zeros(256, dtype=np.int64)
        with Image.open(job.confidence) as image:
            return np.bincount(np.asarray(image).ravel(), minlength=256)

    own = np.zeros(256, dtype=np.int64)
    for counts in ahead(count, range(parallel.rank(), len(jobs), parallel.world())):
        own += counts
    total: NDArray[np.int64] = np.stack(parallel.gather(own)).sum(0)
    return total


def _told(counts: NDArray[np.int64], least: float) -> str:
    """How much `least` leaves, and where other limits would lie."""
    upto = counts.cumsum() / counts.sum()
    kept = 1 - (upto[round(255 * least) - 1] if round(255 * least) else 0.0)
    tenth, half, most = (int(np.searchsorted(upto, share)) / 255 for share in (0.1, 0.5, 0.9))
    spread = f"a tenth of the pixels are below {tenth:.2f}, half below {half:.2f}, nine tenths below {most:.2f}"
    if kept == 0:
        return f"NO pixel has a pseudo-label, none reaches a confidence of {least:g}: {spread}; {half:.2f} keeps half"
    return f"{100 * kept:.1f} % of the pixels have a pseudo-label, of a confidence of at least {least:g} ({spread})"

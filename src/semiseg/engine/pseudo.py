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
from semiseg.types import IGNORE, InferenceConfig, InputError, some

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
    if parallel.first(report.exists()):
        _check_whole(jobs, finished(rows, data, folder)[1].failed, folder)
    else:
        began = time.perf_counter()
        sizes = data.config.channels, data.config.size
        predictor = Predictor(net, data.classes, data.palette, *sizes, inference, device, top)
        modes = [(module, module.training) for module in net.modules()]
        net.eval()
        failed = run_jobs(predictor, jobs, least, "labelling")
        for module, training in modes:
            module.training = training
        parallel.wait()
        partial = least > 0 or merge is not None
        counts, labelled = _counted(jobs, failed, partial)
        # From here on the pool is fixed: an image that can be read again would change the student's draws.
        if parallel.rank() == 0:
            seconds = time.perf_counter() - began
            told = {"failed": failed, "confidences": counts.tolist(), "labelled": labelled, "seconds": seconds}
            write_json(report, told)
        parallel.wait()
    return finished(rows, data, folder)


def finished(rows: Rows, data: Data, folder: Path) -> tuple[Rows, "Report"]:
    """What `pseudo_label` returned when it had labelled these rows in this folder."""
    try:
        told = Report(**_read(folder, REPORT))
    except TypeError as error:  # of an earlier version, with less in it
        raise _damaged(folder / REPORT, folder) from error
    good = np.arange(len(rows))
    if told.failed:
        good = good[[str(row.image) not in told.failed for row in rows]]

    def files(kind: str) -> Iterator[str]:
        return (_name(kind, i) for i in good.tolist())

    return rows[good].with_masks(files("labels"), data.code.plain(), files("confidence"), folder.absolute()), told


@dataclass(frozen=True)
class Report:
    """How labelling went: images that could not be read, each with the reason; how many pixels have which confidence
    (256,), 0 to 255; how many have a label; and seconds, of the call that finished it."""

    failed: dict[str, str]
    confidences: list[int]
    labelled: int
    seconds: float

    def remarks(self, least: float) -> list[str]:
        """Sentences for the user."""
        lines = [f"no pseudo-label for {some(self.failed)}: it cannot be read"] if self.failed else []
        counts = np.array(self.confidences)
        return [*lines, _told(counts, self.labelled, least)] if counts.any() else lines


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
    return {
        "teacher": weights_hash(net),
        "images": rows.digest(),
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
    if not card.exists() and (folder / "labels").exists():
        raise InputError(f"{folder} holds pseudo-labels, but {CARD} is missing: remove the folder to make them anew.")
    if card.exists():
        theirs = _read(folder, CARD)
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


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(folder / name, folder) from error
    return found


def _check_whole(jobs: Sequence[Job], failed: Collection[str], folder: Path) -> None:
    """Raises InputError where a file of finished labels is gone."""
    for job in jobs:
        if not job.done() and str(job.source) not in failed:
            raise InputError(f"{job.mask} or what belongs to it is missing: remove {folder} to make the labels anew.")


def _damaged(path: Path, folder: Path) -> InputError:
    return InputError(f"{path} is damaged: remove {folder} to make the labels anew.")


def _counted(jobs: _Jobs, failed: Collection[str], partial: bool) -> tuple[NDArray[np.int64], int]:
    """How many pixels of all maps have which confidence, 0..255, and how many a label, by default all.

    Read from the files, for some were there before.
    """

    def count(i: int) -> NDArray[np.int64]:
        job = jobs[i]
        assert job.confidence is not None
        if str(job.source) in failed:
            return np.zeros(257, dtype=np.int64)
        sure = np.bincount(_pixels(job.confidence, jobs.folder).ravel(), minlength=256)
        labels = np.count_nonzero(_pixels(job.mask, jobs.folder) != IGNORE) if partial else sure.sum()
        return np.append(sure, labels)

    own = np.zeros(257, dtype=np.int64)
    for counts in ahead(count, range(parallel.rank(), len(jobs), parallel.world())):
        own += counts
    total: NDArray[np.int64] = np.stack(parallel.gather(own)).sum(0)
    return total[:256], int(total[256])


def _pixels(path: Path, folder: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except (OSError, SyntaxError) as error:  # what PIL raises for files that are no images
        raise _damaged(path, folder) from error


def _told(counts: NDArray[np.int64], labelled: int, least: float) -> str:
    """How much has a label, and where limits of confidence would lie."""
    upto = counts.cumsum() / counts.sum()
    tenth, half, most = (int(np.searchsorted(upto, share)) for share in (0.1, 0.5, 0.9))
    spread = (
        f"a tenth of the pixels have a confidence below {tenth / 255:.2f}, half below {half / 255:.2f}, "
        f"nine tenths below {most / 255:.2f}"
    )
    if labelled == 0 and not least:
        return f"NO pixel has a pseudo-label, neither teacher may decide anywhere: {spread}"
    if labelled == 0:
        keeps = np.floor(100 * max(0.0, half - 0.5) / 255) / 100  # what is stored was rounded to steps of 1 / 255
        return f"NO pixel has a pseudo-label, none reaches a confidence of {least:g}: {spread}; {keeps:.2f} keeps half"
    if labelled == counts.sum() and not least:
        return f"every pixel has a pseudo-label ({spread})"
    which = f", of a confidence of at least {least:g}" if least else ""
    return f"{100 * labelled / counts.sum():.1f} % of the pixels have a pseudo-label{which} ({spread})"

"""Runs side by side: mean and spread over seeds and folds, paired differences with intervals."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semiseg.engine.evaluate import Scores, joined
from semiseg.engine.intervals import Interval, classes_over_images, over_images, over_training
from semiseg.files import finite
from semiseg.types import InputError, flat


@dataclass(frozen=True)
class Run:
    """A finished training: its options without seeds and fold, (seed, split seed, fold), `results.json`, its scores."""

    name: str
    options: Mapping[str, Any]
    seeds: tuple[int, int, int | None]
    results: Mapping[str, Any]
    scores: Scores
    parts: int = 1
    """Of how many trainings these are the scores: of several where they are all folds."""


@dataclass(frozen=True)
class ClassLine:
    """A class in one line of the table: IoU in per cent, the mean over the runs whose masks show it."""

    iou: float
    """NaN: no mask shows it."""
    difference: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Line:
    """One line of the table: the runs of one recipe. mIoU in per cent; differences are to the first line."""

    label: str
    split: str
    family: str
    runs: int
    labelled: tuple[int, int]
    """Fewest and most images with a mask that a run learned from."""
    miou: float
    spread: float | None
    """Standard deviation over the runs; none for one run."""
    difference: float | None
    pairs: int
    """Runs behind the difference: those of the first line with the same seeds, scored on the same masks."""
    interval: Interval | None
    """95 % interval of the difference."""
    covers: str | None
    """What the interval covers: `training` (paired over seeds), `folds` (paired over them), or `images` (one pair of
    runs, the split resampled)."""
    minutes: float
    peak_gb: float
    per_class: Mapping[str, ClassLine]


def compare(runs: Sequence[Run]) -> list[Line]:
    """Groups runs that differ in seeds and folds only; the first run's group is what the others are compared with.

    Where all folds of a draw are there, their images are scored together. A copy of a run counts once.

    Raises:
        InputError: two runs of one recipe and seed have different scores.
    """
    groups: list[list[Run]] = []
    for run in runs:
        group = next((g for g in groups if g[0].options == run.options), None)
        if group is None:
            groups.append([run])
        elif not _counted(run, group):
            group.append(run)
    labels = _labels([group[0] for group in groups])
    groups = [_whole(group) for group in groups]
    return [_line(label, group, groups[0]) for label, group in zip(labels, groups, strict=True)]


def _counted(run: Run, group: list[Run]) -> bool:
    """Whether the group has the same training already."""
    twin = next((one for one in group if one.seeds == run.seeds), None)
    if twin is None:
        return False
    if _same_images(run, twin) and np.array_equal(run.scores.confusions, twin.scores.confusions):
        return True
    raise InputError(
        f"{twin.name} and {run.name} are runs of one recipe with the same seeds and other scores: leave one out, for "
        "they are not two draws."
    )


def _whole(group: list[Run]) -> list[Run]:
    """The folds of each draw as one run, where all are there."""
    found: dict[tuple[int, int], list[Run]] = {}
    for run in group:
        found.setdefault(run.seeds[:2], []).append(run)
    count = group[0].options["data"].get("folds") if "data" in group[0].options else None
    if count is None or any({run.seeds[2] for run in folds} != set(range(count)) for folds in found.values()):
        return group
    joint = []
    for seeds, unordered in found.items():
        folds = sorted(unordered, key=lambda run: run.seeds[2] or 0)  # pairs have their images in one order
        each = [run.results for run in folds]
        results = dict(each[0]) | {
            "family": re.sub(r"fold \d+ of (\d+)", r"in \1 folds", each[0]["family"]),
            "seconds": sum(results["seconds"] for results in each),
            "peak_gb": max(results["peak_gb"] for results in each),
        }
        joint.append(
            replace(
                folds[0],
                seeds=(*seeds, None),
                results=results,
                scores=joined([run.scores for run in folds]),
                parts=count,
            )
        )
    return joint


def _line(label: str, group: list[Run], first: list[Run]) -> Line:
    values = np.array([100 * run.scores.miou for run in group])
    families = list(dict.fromkeys(run.results["family"] for run in group))
    masks = [run.results["labelled"] for run in group]
    difference = interval = covers = None
    pairs: list[tuple[Run, Run]] = []
    if group is not first:
        by_seed = {run.seeds: run for run in first}
        pairs = [(run, by_seed[run.seeds]) for run in group if run.seeds in by_seed]
        pairs = [(a, b) for a, b in pairs if _same_images(a, b)]
        changes = np.array([100 * (a.scores.miou - b.scores.miou) for a, b in pairs])
        if len(pairs) > 1:
            difference = float(changes.mean())
            covers = "folds" if len({run.seeds[2] for run, _ in pairs}) > 1 else "training"
            interval = over_training(changes)
        elif len(pairs) == 1:
            difference = float(changes[0])
            interval = over_images(pairs[0][0].scores, pairs[0][1].scores)
            covers = "images" if interval else None
    return Line(
        label=label,
        split=group[0].results["split"],
        family=families[0] + f", and {len(families) - 1} more" * (len(families) > 1),
        runs=sum(run.parts for run in group),
        labelled=(min(masks), max(masks)),
        miou=float(values.mean()),
        spread=float(values.std(ddof=1)) if len(values) > 1 else None,
        difference=difference,
        pairs=len(pairs),
        interval=interval,
        covers=covers,
        minutes=float(np.mean([run.results["seconds"] / 60 for run in group])),
        peak_gb=max(run.results["peak_gb"] for run in group),
        per_class=_classes(group, pairs),
    )


def _classes(group: list[Run], pairs: list[tuple[Run, Run]]) -> dict[str, ClassLine]:
    """Of pairs that scored the same images."""
    names = group[0].scores.classes
    ious = [100 * np.array([run.scores.per_class[name] for run in group]) for name in names]
    changes = [
        100 * np.array([a.scores.per_class[name] - b.scores.per_class[name] for a, b in pairs])
        if pairs
        else np.empty(0)
        for name in names
    ]
    if len(pairs) == 1:
        intervals = classes_over_images(pairs[0][0].scores, pairs[0][1].scores)
    else:
        intervals = [over_training(change[~np.isnan(change)]) for change in changes]
    found = {}
    for name, iou, change, interval in zip(names, ious, changes, intervals, strict=True):
        found[name] = ClassLine(_mean(iou), _mean(change) if np.isfinite(change).any() else None, interval)
    return found


def _mean(values: NDArray[np.float64]) -> float:
    """Without NaN; NaN where there is nothing else."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _same_images(a: Run, b: Run) -> bool:
    return a.results["split"] == b.results["split"] and a.scores.of_same_masks(b.scores)


def _labels(runs: list[Run]) -> list[str]:
    """The method's name, with its options in which runs of the same method differ, and others in which any do."""
    every = [flat(run.options) for run in runs]
    differing = {key for options in every for key in options if any(o.get(key) != options[key] for o in every)}
    labels = []
    for options in every:
        same = [o for o in every if o["method.name"] == options["method.name"]]
        shown = [
            k
            for k in sorted(differing)
            if k != "method.name"
            and any(o.get(k) != options.get(k) for o in (same if k.startswith("method.") else every))
        ]
        labels.append(" ".join([options["method.name"], *(f"{key}={options[key]}" for key in shown if key in options)]))
    return labels


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None or math.isnan(value) else f"{value:{sign}.2f}"


def as_markdown(lines: Sequence[Line], per_class: bool = False) -> str:
    """The table for a README or a terminal; per_class: and a second one, with a row a class and a column a line."""
    rows = [["runs of", "n", "masks", "split", "mIoU", "spread", "difference", "95 % interval", "minutes", "GB"]]
    for line in lines:
        interval = f"{line.interval[0]:+.2f} .. {line.interval[1]:+.2f} ({line.covers})" if line.interval else ""
        rows.append(
            [
                line.label,
                str(line.runs),
                "-".join(dict.fromkeys(map(str, line.labelled))),
                line.split,
                _number(line.miou),
                _number(line.spread),
                _number(line.difference, "+"),
                interval,
                f"{line.minutes:.1f}",
                f"{line.peak_gb:.2f}",
            ]
        )
    text = _table(rows)
    if per_class:
        text += ["", *_table(_class_rows(lines))]
    families = sorted({line.family for line in lines})
    text += [
        "",
        "Split: " + families[0] + "."
        if len(families) == 1
        else "These splits differ; a difference stands where the scored masks are the same: "
        + "; ".join(families)
        + ".",
    ]
    for line in lines[1:]:
        if not line.pairs:
            text.append(f"{line.label}: no run with the seeds of one of the first line, scored on the same masks.")
        elif line.covers == "training" and line.pairs < max(line.runs, lines[0].runs):
            text.append(f"{line.label}: the difference is that of the {line.pairs} seeds which the first line has too.")
    if any(line.covers == "images" for line in lines):
        text.append(
            "An interval over images covers the choice of images, not the noise of training: train more seeds for that."
        )
    if any(line.covers == "folds" for line in lines):
        text.append("Folds share most of their training images, so that an interval over folds is rather too narrow.")
    return "\n".join(text)


def _class_rows(lines: Sequence[Line]) -> list[list[str]]:
    """IoU of each class, and in brackets its difference; lines are numbered, as their labels may be long."""
    labels = [line.label for line in lines]
    if max(map(len, labels)) > 20:
        labels = [f"{number}. {label.split()[0]}" for number, label in enumerate(labels, 1)]
    rows = [["IoU", *labels]]
    for name in dict.fromkeys(name for line in lines for name in line.per_class):
        found = [line.per_class[name] if name in line.per_class else None for line in lines]
        cells = ["" if one is None else _number(one.iou) for one in found]
        changes = ["" if one is None or one.difference is None else f" ({one.difference:+.2f})" for one in found]
        rows.append([name, *(cell + change for cell, change in zip(cells, changes, strict=True))])
    return rows


def _table(rows: list[list[str]]) -> list[str]:
    """Lines of Markdown; the first row is the head."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]]


def as_plain(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The table as JSON, with null for NaN."""
    return [{key: finite(value) for key, value in asdict(line).items()} for line in lines]

"""Runs side by side: the classes. Lines and their pairs are in test_cli.py, intervals in test_verdict.py."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from semiseg.engine.compare import Run, as_markdown, as_plain, compare
from semiseg.engine.evaluate import Scores
from semiseg.engine.intervals import classes_over_images, over_training


def run(method: str, seed: int, a: Sequence[int], b: Sequence[int] = (0,)) -> Run:
    """Images with so many right pixels of each of two classes, of 100; no pixel of the second if all are 0."""
    rows = [[[right, 100 - right], [100 * any(b) - also, also]] for right, also in zip(a, [*b] * len(a), strict=False)]
    scores = Scores(np.array(rows), tuple(f"{letter}.png" for letter in "qwertzui"[: len(a)]), ("a", "b"))
    results = {"split": "test", "family": "f", "labelled": 4, "seconds": 60, "peak_gb": 1}
    return Run(method, {"method": {"name": method}}, (seed, 0, 0), results, scores)


def test_classes_over_seeds() -> None:
    """Means, and differences to the runs of the same seed in the first line; where one shows a class, of that one."""
    runs = [run("one", 0, [30], [50]), run("one", 1, [40]), run("two", 0, [50], [50]), run("two", 1, [80])]
    first, other = compare(runs)
    a = [100 * some.scores.per_class["a"] for some in runs]
    b = [100 * runs[i].scores.per_class["b"] for i in (0, 2)]
    assert first.per_class["a"].iou == pytest.approx(np.mean(a[:2]))
    assert (first.per_class["a"].difference, first.per_class["a"].interval) == (None, None)
    assert other.per_class["a"].difference == pytest.approx(np.mean(a[2:]) - np.mean(a[:2]))
    assert other.per_class["a"].interval == pytest.approx(over_training(np.array([a[2] - a[0], a[3] - a[1]])))
    assert (other.per_class["b"].iou, other.per_class["b"].difference) == pytest.approx((b[1], b[1] - b[0]))
    assert other.per_class["b"].interval is None, "of one pair"


def test_classes_over_images() -> None:
    right = [30, 40, 50, 60, 70, 80]
    one, two = run("one", 0, right, [50]), run("two", 0, [n + 9 for n in right], [60])
    line = compare([one, two])[1]
    assert line.covers == "images"
    assert [line.per_class[name].interval for name in "ab"] == classes_over_images(two.scores, one.scores)
    assert line.per_class["a"].interval is not None


def test_the_table_of_classes() -> None:
    lines = compare([run("one", 0, [30]), run("two", 0, [50])])
    short, long = as_markdown(lines), as_markdown(lines, per_class=True)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in long.splitlines() if line.startswith("|")][4:]
    values = [f"{line.per_class['a'].iou:.2f}" for line in lines]
    change = f"{lines[1].per_class['a'].difference:+.2f}"
    assert [table[0], *table[2:]] == [["IoU", "one", "two"], ["a", values[0], f"{values[1]} ({change})"], ["b", "", ""]]
    assert set(short.splitlines()) < set(long.splitlines())


def test_an_absent_class_is_null_in_json() -> None:
    plain = as_plain(compare([run("one", 0, [30])]))
    assert plain[0]["per_class"]["b"] == {"iou": None, "difference": None, "interval": None}
    json.dumps(plain, allow_nan=False)

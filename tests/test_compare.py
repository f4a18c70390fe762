"""Runs side by side: the classes. Lines and their pairs are in test_cli.py, intervals in test_verdict.py."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from semiseg.engine.compare import Run, as_markdown, as_plain, compare
from semiseg.engine.evaluate import Scores, joined
from semiseg.engine.intervals import classes_over_images, over_training
from semiseg.types import InputError


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


def test_a_copy_counts_once() -> None:
    """And never as another seed, which would narrow the interval; another run of the same seed is none either."""
    right = [30, 40, 50, 60, 70, 80]
    one, two = run("one", 0, right), run("two", 0, [n + 9 for n in right])
    plain, copied = compare([one, two]), compare([one, two, replace(two, name="copy"), replace(one, name="copy")])
    assert as_plain(copied) == as_plain(plain)
    with pytest.raises(InputError, match="two and two are runs of one recipe with the same seeds and other scores"):
        compare([one, two, run("two", 0, [n + 8 for n in right])])


def test_other_settings_are_named() -> None:
    """Of all methods what is not the method's own; of that what runs of one method do otherwise."""
    runs = [run(name, 0, [30]) for name in ("one", "two", "two")]
    own: list[dict[str, object]] = [{}, {"ema": 0.9}, {"ema": 0.8}]
    options = [
        {"method": {**r.options["method"], **o}, "train": {"steps": s}}
        for r, o, s in zip(runs, own, (1, 2, 2), strict=True)
    ]
    lines = compare([replace(r, options=o) for r, o in zip(runs, options, strict=True)])
    assert [line.label for line in lines] == [
        "one train.steps=1",
        "two method.ema=0.9 train.steps=2",
        "two method.ema=0.8 train.steps=2",
    ]


def test_other_masks_are_no_pair() -> None:
    """Their names are the same."""
    one, two = run("one", 0, [30, 40], [50]), run("two", 0, [50, 60], [50])
    other = replace(two, scores=replace(two.scores, confusions=2 * two.scores.confusions))
    assert compare([one, two])[1].pairs == 1
    line = compare([one, other])[1]
    assert (line.pairs, line.difference) == (0, None)
    assert "two: no run with the seeds of one of the first line, scored on the same masks" in as_markdown([line, line])


def test_seeds_without_a_partner_are_said() -> None:
    runs = [run("one", seed, [30 + seed]) for seed in range(2)] + [run("two", seed, [40 + seed]) for seed in range(4)]
    lines = compare(runs)
    assert (lines[1].runs, lines[1].pairs) == (4, 2)
    assert "two: the difference is that of the 2 seeds which the first line has too" in as_markdown(lines)
    assert "difference is that of" not in as_markdown(compare([*runs[:2], *runs[2:4]]))


def test_all_folds_are_scored_together() -> None:
    """As the verdict does, and not as a mean over folds; some of them alone are runs as any."""

    def fold(number: int, right: int, also: int) -> Run:
        plain = run("one", 0, [right], [also])
        scores = replace(plain.scores, names=(f"{number}.png",))
        options = {"method": {"name": "one"}, "data": {"folds": 2}}
        results = dict(plain.results) | {"family": f"f fold {number} of 2, all 4"}
        return replace(plain, options=options, seeds=(0, 0, number), results=results, scores=scores)

    folds = [fold(0, 30, 0), fold(1, 60, 90)]
    (line,) = compare(folds[::-1])
    assert as_plain([line]) == as_plain(compare(folds))
    whole = joined([one.scores for one in folds])
    assert (line.runs, line.spread, line.family) == (2, None, "f in 2 folds, all 4")
    assert line.miou == pytest.approx(100 * whole.miou)
    assert line.miou != pytest.approx(np.mean([100 * one.scores.miou for one in folds]))
    assert (line.minutes, compare(folds[:1])[0].minutes) == (2, 1)
    assert compare(folds[:1])[0].family == "f fold 0 of 2, all 4"
    three = [replace(one, options={"method": {"name": m}, "data": {"folds": 3}}) for m in ("a", "b") for one in folds]
    some = compare(three)[1]
    assert (some.runs, some.pairs, some.covers, some.spread) == (2, 2, "folds", pytest.approx(some.spread))


def test_cells_that_would_break_the_table() -> None:
    text = as_markdown(compare([run("a|b", 0, [30])]))
    assert "| a\\|b " in text
    empty = run("one", 0, [30])
    nothing = replace(empty, scores=replace(empty.scores, confusions=0 * empty.scores.confusions))
    assert "nan" not in as_markdown(compare([nothing, replace(nothing, options={"method": {"name": "two"}})]))


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

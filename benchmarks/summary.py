"""What results.csv says: mean and spread over seeds, paired differences, share of the gap closed."""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
from common import table
from ledger import Row
from scipy import stats

from semiseg.engine.intervals import over_training

Arm = dict[int, Row]
"""The rows of one recipe by seed."""


def lines(rows: list[Row], recipes: Collection[str]) -> list[dict[str, Any]]:
    """One line for each recipe (all, where none are named), by data, setting and labels; numbers in per cent."""
    arms = _arms(rows)
    found = [_line(arm, list(arms.values())) for name, arm in arms.items() if name in recipes or not recipes]
    return sorted(found, key=lambda x: (x["data"], x["setting"], x["labelled"], x["method"] != "supervised"))


def _arms(rows: list[Row]) -> dict[str, Arm]:
    """By recipe: rows of the experiment that its last row stands for; older ones are history."""
    last = {row["recipe"]: _experiment(row) for row in rows}
    arms: dict[str, Arm] = {}
    for row in rows:
        if _experiment(row) == last[row["recipe"]]:
            arms.setdefault(row["recipe"], {})[int(row["seed"])] = row
    return arms


def _experiment(row: Row) -> tuple[str, str]:
    return row["recipe_hash"], row["method_hash"]


def _line(arm: Arm, arms: list[Arm]) -> dict[str, Any]:
    first = next(iter(arm.values()))
    base = _labelled_only(arms, first, first["labelled"])
    top = _labelled_only(arms, first, first["masks"])
    subsets = [name for name in first if name.startswith("miou_") and any(row[name] for row in arm.values())]
    line: dict[str, Any] = {name: first[name] for name in ("recipe", "data", "setting", "split", "method")}
    line |= {
        "labelled": int(first["labelled"]),
        "masks": int(first["masks"]),
        "seeds": sorted(arm),
        **_mean("miou", arm),
        **_mean("val_best", arm),
    }
    line |= {"subsets": {name.removeprefix("miou_"): _mean(name, arm) for name in subsets}}
    line |= {"minutes": _values("minutes", arm).mean(), "gb": _values("gb", arm).max()}
    line |= {"difference": None, "interval": None, "gap_closed": None, "gap_interval": None}
    if base is not None and base is not arm:
        line |= compared(arm, base, top)
    return line


def _labelled_only(arms: list[Arm], like: Row, labelled: str) -> Arm | None:
    """The labelled-only arm with that many labels on the same data in the same setting."""
    for arm in arms:
        row = next(iter(arm.values()))
        same = all(row[name] == like[name] for name in ("data", "split", "setting"))
        if same and row["method"] == "supervised" and row["labelled"] == labelled:
            return arm
    return None


def compared(arm: Arm, base: Arm, top: Arm | None) -> dict[str, Any]:
    """Over the seeds that both have: the mean difference, its 95 % paired t-interval, the share of the gap closed."""
    seeds = sorted(arm.keys() & base.keys())
    change = _values("miou", arm, seeds) - _values("miou", base, seeds)
    if not seeds:
        return {}
    share = limits = None
    all_three = [seed for seed in seeds if top is not None and seed in top]
    if top is not None and all_three:
        low = _values("miou", base, all_three)
        gain, gap = _values("miou", arm, all_three) - low, _values("miou", top, all_three) - low
        share = float(gain.mean() / gap.mean()) if gap.mean() > 0 else None
        limits = ratio_interval(gain, gap)
    return {
        "difference": float(change.mean()),
        "interval": over_training(change),
        "pairs": len(seeds),
        "gap_closed": share,
        "gap_interval": limits,
        "gap_pairs": len(all_three),
    }


def ratio_interval(above: np.ndarray, below: np.ndarray) -> list[float] | None:
    """95 % interval of mean(above) / mean(below), paired (n,) (Fieller 1954); none where it has no end.

    It has none where zero lies in the interval of what is divided by: nothing is known of the share of a gap that may
    not be there.
    """
    n = len(above)
    if n < 2:
        return None
    spread = np.cov(above, below) * stats.t.ppf(0.975, n - 1) ** 2 / n
    a, b = above.mean(), below.mean()
    square, linear, constant = b * b - spread[1, 1], a * b - spread[0, 1], a * a - spread[0, 0]
    if square <= 0:
        return None
    root = math.sqrt(max(0.0, linear * linear - square * constant))
    return [float((linear - root) / square), float((linear + root) / square)]


def _values(column: str, arm: Arm, seeds: list[int] | None = None) -> np.ndarray:
    return np.array([float(arm[seed][column] or "nan") for seed in (sorted(arm) if seeds is None else seeds)])


def _mean(column: str, arm: Arm) -> dict[str, float | None]:
    values = _values(column, arm)
    return {column: float(values.mean()), f"{column}_spread": float(values.std(ddof=1)) if len(values) > 1 else None}


def as_text(found: list[dict[str, Any]]) -> str:
    """A Markdown table for each data set and setting."""
    texts = []
    for group in dict.fromkeys((x["data"], x["setting"]) for x in found):
        inside = [x for x in found if (x["data"], x["setting"]) == group]
        subsets = list(dict.fromkeys(name for x in inside for name in x["subsets"]))
        rows = [["recipe", "labels", "runs", "val mIoU", f"{inside[0]['split']} mIoU", *subsets, "to labelled-only",
                 "95 % interval", "gap closed", "min", "GB"]]  # fmt: skip
        for x in inside:
            parts = [_spread(x["subsets"][name], f"miou_{name}") if name in x["subsets"] else "" for name in subsets]
            scores = [_spread(x, "val_best"), _spread(x, "miou"), *parts]
            difference = "" if x["difference"] is None else f"{x['difference']:+.2f}"
            interval = "" if x["interval"] is None else f"{x['interval'][0]:+.2f} .. {x['interval'][1]:+.2f}"
            gap = "" if x["gap_closed"] is None else f"{100 * x['gap_closed']:.0f} %"
            cost = [f"{x['minutes']:.1f}", f"{x['gb']:.2f}"]
            rows.append(
                [x["recipe"], str(x["labelled"]), str(len(x["seeds"])), *scores, difference, interval, gap, *cost]
            )
        texts.append(f"{group[0]}: {group[1]}\n\n{table(rows)}")
    end = "Mean ± standard deviation over seeds; differences and intervals are paired over seeds and cover training."
    return "\n\n".join([*texts, end]) if texts else "results.csv has no such row."


def _spread(x: dict[str, Any], column: str) -> str:
    if math.isnan(x[column]):
        return ""
    return f"{x[column]:.2f}" + ("" if x[f"{column}_spread"] is None else f" ± {x[f'{column}_spread']:.2f}")

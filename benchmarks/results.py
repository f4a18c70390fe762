"""Writes docs/results.md and its curves from results.csv: nothing on that page is written by hand.

    python benchmarks/results.py [--check]

A table for each data set and setting, mIoU against the number of labels (a line a method, bands over seeds), and the
methods' ranks over the data sets that chose the default. --check writes nothing and
fails where the page is not what results.csv says.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, ROOT, parser, read_csv, run_script, table
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy import stats
from summary import lines

from semiseg.files import replacing, write_text
from semiseg.methods import DEFAULT
from semiseg.types import InputError

PAGE = ROOT / "docs/results.md"
PICTURES = ROOT / "docs/pictures"
RANKED = {"camvid": 46, "idd_lite": 88, "dsb2018": 29}
"""Data and labels over which the default is chosen."""
NAMES = {"camvid": "CamVid", "idd_lite": "IDD-lite", "dsb2018": "Nuclei (DSB2018)"}
HEAD = """# Results

This page is written by `benchmarks/results.py` from `benchmarks/results.csv`, where one row is one run, with its commit
and all its options. Scores are mIoU in per cent: test of the checkpoint that was best on val, or val of the last one,
where there is no test split and val chose nothing; ± is the standard deviation over seeds, which are those of the run
and of the draw of the labels. A difference is paired over the seeds that both have, and its 95 % interval covers
training and draw: with few seeds it is wide, with one there is none. The *share of the gap* is what a method gains over
labelled-only, of what all masks gain, over the seeds that all three have; its interval is Fieller's, and has no end
where the gap itself cannot be told from zero. **One seed says little**: the same seed on another machine is
another run. Labelled-only with 46 masks of CamVid, seed 0, has 47.1 below, and had 48.5 when it was repeated; UniMatch
V2 has 49.1, and had 47.9.

Networks and images are small and runs take minutes on two CPU cores. That tells methods apart on equal terms; it is
not what a data set can give, and does not compare with the numbers of papers. Minutes are those of runs that often
shared the machine with others, GB is the most memory that a run's process held, libraries and data included, with the
code of its day: how fast and how large methods are beside each other stands on the page about [speed](speed.md).
"""


CAPTION = """*Labelled-only is its mean over seeds, a method stands above or below it by the paired difference. Bars: a
standard deviation over seeds; hollow: one seed.*"""


def page(found: list[dict[str, Any]]) -> str:
    """The page's text; `found` are the lines of summary.lines."""
    parts = [HEAD]
    for data in dict.fromkeys(x["data"] for x in found):
        parts.append(f"## {NAMES[data] if data in NAMES else data}\n")
        inside = [x for x in found if x["data"] == data]
        for setting in dict.fromkeys(x["setting"] for x in inside):
            mine = [x for x in inside if x["setting"] == setting]
            parts.append(f"{setting[0].upper()}{setting[1:]}.\n\n{_table(mine)}\n")
            if curves(mine):
                parts.append(f"![mIoU against labels](pictures/{_picture(mine)})\n\n{CAPTION}\n")
    parts.append(_ranks(found))
    return "\n".join(parts).rstrip() + "\n"


def _table(mine: list[dict[str, Any]]) -> str:
    subsets = list(dict.fromkeys(name for x in mine for name in x["subsets"]))
    split = mine[0]["split"]
    head = ["method", "labels", "seeds", *(["val"] if split == "test" else []), split]
    rows = [[*head, *(name.replace("_", " ") for name in subsets), "to labelled-only", "share of the gap", "min", "GB"]]
    for x in mine:
        scores = [_spread(x, "val_best")] if split == "test" else []
        scores += [_spread(x, "miou")]
        scores += [_spread(x["subsets"][name], f"miou_{name}") if name in x["subsets"] else "" for name in subsets]
        cells = [
            x["method"],
            str(x["labelled"]),
            _seeds(x["seeds"]),
            *scores,
            _difference(x),
            _share(x),
            f"{x['minutes']:.0f}",
            f"{x['gb']:.1f}",
        ]
        rows.append(cells)
    return table(rows)


def _seeds(seeds: list[int]) -> str:
    row = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]}-{seeds[-1]}" if row else ", ".join(map(str, seeds))


def _spread(x: dict[str, Any], column: str) -> str:
    if np.isnan(x[column]):
        return ""
    spread = x[f"{column}_spread"]
    return f"{x[column]:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def _difference(x: dict[str, Any]) -> str:
    if x["difference"] is None:
        return ""
    interval = x["interval"]
    return f"{x['difference']:+.1f}" + ("" if interval is None else f" ({interval[0]:+.1f} .. {interval[1]:+.1f})")


def _share(x: dict[str, Any]) -> str:
    if x["gap_closed"] is None or x["labelled"] == x["masks"]:
        return ""
    limits, pairs = x["gap_interval"], x["gap_pairs"]
    words = "" if pairs < 2 else " (no end)" if limits is None else f" ({_percent(limits[0])} .. {_percent(limits[1])})"
    return _percent(x["gap_closed"]) + words


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def curves(mine: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines of each method that has several numbers of labels, if the labelled-only model has three or more."""
    methods = {x["method"]: [y for y in mine if y["method"] == x["method"]] for x in mine}
    counts = {name: len({y["labelled"] for y in ys}) for name, ys in methods.items()}
    enough = "supervised" in counts and counts["supervised"] > 2
    return {name: ys for name, ys in methods.items() if enough and counts[name] > 1}


def _picture(mine: list[dict[str, Any]]) -> str:
    return f"labels-{mine[0]['data']}.svg"


def heights(mine: list[dict[str, Any]]) -> dict[str, list[tuple[int, float, float | None]]]:
    """Each curve's labels, height in per cent, and standard deviation over seeds, if there are several.

    Labelled-only is its mean over its seeds. A method stands above it by the paired difference, so that a method with
    few seeds is not set against all of labelled-only's; a row without common seeds has no place.
    """
    found, low = curves(mine), {x["labelled"]: x["miou"] for x in mine if x["method"] == "supervised"}
    lines = {name: sorted(ys, key=lambda y: int(y["labelled"])) for name, ys in found.items()}
    return {
        name: [
            (
                y["labelled"],
                y["miou"] if name == "supervised" else low[y["labelled"]] + y["difference"],
                y["miou_spread"],
            )
            for y in ys
            if name == "supervised" or y["difference"] is not None
        ]
        for name, ys in lines.items()
    }


def draw(mine: list[dict[str, Any]], path: Path) -> None:
    """mIoU against the number of labels: a line a method, bands between points of several seeds, one seed hollow."""
    # Text as text, and names that do not change from one call to the next.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "semiseg"}):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name, points in heights(mine).items():
            labels = [labelled for labelled, _, _ in points]
            means = np.array([mean for _, mean, _ in points])
            spread = np.array([np.nan if deviation is None else deviation for _, _, deviation in points])
            (line,) = axes.plot(labels, means, label=name)
            colour, one = line.get_color(), np.isnan(spread)
            axes.fill_between(labels, means - spread, means + spread, alpha=0.15, color=colour)
            axes.errorbar(labels, means, spread, fmt="none", ecolor=colour, capsize=3)
            fills = ["white" if single else colour for single in one]
            axes.scatter(labels, means, color=fills, edgecolors=colour, zorder=3)
        counts = sorted({labelled for points in heights(mine).values() for labelled, _, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("labelled images")
        axes.set_ylabel(f"{mine[0]['split']} mIoU, %")
        axes.grid(alpha=0.3)
        axes.legend()
        with replacing(path) as part:
            figure.savefig(part, format="svg", metadata={"Date": None})


def _ranks(found: list[dict[str, Any]]) -> str:
    """Methods with a score on every ranked data set, the best mean rank first.

    What ranks is the difference to labelled-only over the seeds that both have: means would set a method's few seeds
    against all of another's, and seeds, with other masks each, differ as much as methods.
    """
    settings: dict[str, dict[str, dict[str, dict[str, Any]]]] = {data: {} for data in RANKED}
    for x in found:
        known = x["method"] == "supervised" or x["difference"] is not None
        if known and x["labelled"] == RANKED.get(x["data"]) and "random" not in x["setting"]:
            of_setting = settings[x["data"]].setdefault(x["setting"], {})
            assert x["method"] not in of_setting, f"two recipes of {x['method']} on {x['data']}: which one is ranked?"
            of_setting[x["method"]] = x
    # Scores of two settings do not compare: of several the one counts that most methods have.
    scores = {data: max(of_data.values(), key=len, default={}) for data, of_data in settings.items()}
    complete = [name for name in scores[next(iter(RANKED))] if all(name in scores[data] for data in RANKED)]
    text = "## The default\n\n"
    if len(complete) < 2:
        return text + f"`{DEFAULT}`; too few methods have a score on all of {', '.join(RANKED)} to rank them.\n"
    gains = np.array([[scores[data][name]["difference"] or 0.0 for data in RANKED] for name in complete])
    ranks = stats.rankdata(-gains, axis=0)
    rows = [["method", *(f"{NAMES[data]}, {count} labels" for data, count in RANKED.items()), "mean rank"]]
    order = np.argsort(ranks.mean(1), kind="stable")
    for i in order:
        of_method = [scores[data][complete[i]] for data in RANKED]
        runs = [x["pairs"] if x["difference"] is not None else len(x["seeds"]) for x in of_method]
        cells = [f"{gains[i, j]:+.2f} ({ranks[i, j]:g}; {_runs(runs[j])})" for j in range(len(RANKED))]
        rows.append([complete[i], *cells, f"{ranks[i].mean():.2f}"])
    text += (
        "What each method gains over labelled-only (paired over seeds), its rank on each data set and the runs behind\n"
        f"it, of the methods that have a score on all.\n\n{table(rows)}\n\nThe default is `{DEFAULT}`"
    )
    best = next(complete[i] for i in order if complete[i] != "supervised")
    if complete[order[0]] == DEFAULT:
        return f"{text}, which ranks first.\n"
    if complete[order[0]] == "supervised":
        text += (
            ". `supervised` ranks first: as it is trained beside every semi-supervised method, and delivered where\n"
            "it is better, it needs no default"
        )
    if best != DEFAULT:
        text += (
            f". Of the semi-supervised methods `{best}` ranks first. Runs as short as these, most of one\n"
            f"seed, do not tell it from `{DEFAULT}`, which has more seeds and one of the shortest [steps](speed.md)"
        )
    return f"{text}.\n"


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--check", action="store_true", help="fail where the page is another")
    options.add_argument("--results", type=Path, default=HERE / "results.csv")
    given = options.parse_args(arguments)
    found = lines(read_csv(given.results), [])
    text = page(found)
    if given.check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            raise InputError(f"{PAGE} is not what {given.results} says: run benchmarks/results.py.")
        return 0
    groups = dict.fromkeys((x["data"], x["setting"]) for x in found)
    drawn = [mine for key in groups if curves(mine := [x for x in found if (x["data"], x["setting"]) == key])]
    assert len({_picture(mine) for mine in drawn}) == len(drawn), "a picture for each data set: name the settings too"
    for mine in drawn:
        draw(mine, PICTURES / _picture(mine))
    write_text(PAGE, text)
    print(f"{PAGE.relative_to(ROOT)} written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)

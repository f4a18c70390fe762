"""One question, several arms: trains each on the same seeds and compares them with the first, paired.

    python benchmarks/arms.py --arm NAME RECIPE [SECTION.KEY=VALUE...] --arm ... [--seeds 0-2]
                              [--group new=pole,fence ...] [--runs FOLDER] [--json]

An arm is a recipe with other options; {seed} in an option is the seed's number, so that an arm can start from what
another one made: `method.teacher=benchmarks/runs/x-s{seed}`. Rows of the ledger that stand are taken; the others are
trained and kept in the folder of the runs, where the same call goes on. --group adds the mean IoU of some classes.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import seeds_of, work
from common import HERE, finish, parser, read_csv, run_script, table
from ledger import Job, Row
from summary import Arm, compared

from semiseg.data.splits import load_data
from semiseg.types import InputError

LEDGER = HERE / "results.csv"
Arms = Mapping[str, tuple[Path, Sequence[str]]]
"""Each arm's recipe and other options, by its name."""


def jobs_of(arms: Arms, seeds: Sequence[int], runs: Path) -> dict[str, list[Job]]:
    """Each arm's jobs, one a seed."""
    return {
        name: [Job.of(path, seed, runs, [text.replace("{seed}", str(seed)) for text in texts]) for seed in seeds]
        for name, (path, texts) in arms.items()
    }


def check_groups(groups: Mapping[str, Sequence[str]], job: Job) -> None:
    """Raises InputError where a group names a class that the data does not have."""
    classes = load_data(job.recipe.data, job.path.parent).classes
    for name, some in groups.items():
        if unknown := [c for c in some if c not in classes]:
            raise InputError(
                f"--group {name}: no class is called {', '.join(unknown)}; there are {', '.join(classes)}."
            )


def trained(jobs: Mapping[str, Sequence[Job]], runs: Path, ledger: Sequence[Row] = ()) -> dict[str, Arm]:
    """The rows of each arm by seed, of the ledger or of the runs; what there is not yet is trained, seed by seed.

    Raises:
        InputError: a run failed.
    """
    results = runs / "results.csv"
    every = sorted((job for some in jobs.values() for job in some), key=lambda job: job.seed)
    left, failed = work([job for job in every if not any(map(job.stands, ledger))], results, {}, None)
    if failed or left:
        raise InputError(f"runs are missing: {' '.join(failed)}")
    rows = [*ledger, *read_csv(results)]
    return {name: {job.seed: next(filter(job.stands, rows)) for job in some} for name, some in jobs.items()}


def lines(arms: Mapping[str, Arm], groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """One line for each arm, in per cent, and what it differs by from the first."""
    first, found = next(iter(arms.values())), []
    for name, arm in arms.items():
        per_class = {seed: json.loads(row["per_class"]) for seed, row in arm.items()}
        found.append({
            "arm": name, "split": arm[min(arm)]["split"],
            "miou": {seed: float(row["miou"]) for seed, row in arm.items()},
            "val": {seed: float(row["val_best"]) for seed, row in arm.items() if row["val_best"]},
            "minutes": float(np.mean([float(row["minutes"]) for row in arm.values()])),
            "groups": {group: {seed: _mean(values, classes) for seed, values in per_class.items()}
                       for group, classes in groups.items()},
            "per_class": {c: float(np.mean([v[c] for v in per_class.values() if v[c] is not None] or [np.nan]))
                          for c in per_class[min(arm)]},
            **({} if arm is first else compared(arm, first, None)),
        })  # fmt: skip
    return found


def _mean(values: Mapping[str, float | None], classes: Sequence[str]) -> float:
    return float(np.mean([v for c in classes if (v := values[c]) is not None] or [np.nan]))


def as_text(found: Sequence[dict[str, Any]]) -> str:
    groups, classes = found[0]["groups"], found[0]["per_class"]
    split = found[0]["split"]
    val = [] if split == "val" else ["val mIoU"]
    rows = [["arm", "runs", *val, f"{split} mIoU", *groups, "to the first", "95 % interval", "min"]]
    for line in found:
        interval = "{:+.2f} .. {:+.2f}".format(*line["interval"]) if line.get("interval") else ""
        rows.append([
            line["arm"], str(len(line["miou"])), *(_spread(line["val"]) for _ in val), _spread(line["miou"]),
            *(_spread(values) for values in line["groups"].values()),
            f"{line['difference']:+.2f}" if "difference" in line else "", interval, f"{line['minutes']:.1f}",
        ])  # fmt: skip
    each = [["class", *(line["arm"] for line in found)]]
    each += [[c, *(f"{line['per_class'][c]:.1f}" for line in found)] for c in classes]
    return f"{table(rows)}\n\n{table(each)}"


def _spread(values: Mapping[int, float]) -> str:
    some = list(values.values())
    spread = f" ± {np.std(some, ddof=1):.2f}" if len(some) > 1 else ""
    return f"{np.mean(some):.2f}{spread}" if some else ""


def _group(text: str) -> tuple[str, list[str]]:
    name, equals, classes = text.partition("=")
    if not equals or not name or not classes:
        raise argparse.ArgumentTypeError(f"{text} is not of the form NAME=CLASS,CLASS")
    return name, classes.split(",")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--arm", nargs="+", action="append", required=True, metavar=("NAME", "RECIPE"))
    options.add_argument("--seeds", type=seeds_of, default=seeds_of("0-2"), help="0-4, or 0,2,5")
    options.add_argument("--group", type=_group, action="append", default=[], metavar="NAME=CLASS,CLASS")
    options.add_argument("--runs", type=Path, default=HERE / "runs/arms")
    given = options.parse_args(arguments)
    short = [arm[0] for arm in given.arm if len(arm) < 2]
    if short:
        options.error(f"--arm {short[0]} lacks its recipe")
    arms = {name: (Path(path), texts) for name, path, *texts in given.arm}
    if len(arms) < len(given.arm):
        options.error("two arms have the same name")
    jobs, groups = jobs_of(arms, given.seeds, given.runs), dict(given.group)
    check_groups(groups, next(iter(jobs.values()))[0])
    found = lines(trained(jobs, given.runs, read_csv(LEDGER)), groups)
    finish({"arms": found}, as_text(found), given.json)


if __name__ == "__main__":
    run_script(main)

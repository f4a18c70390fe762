"""The ledger: trains recipes over seeds, one run at a time, and appends a row for each to results.csv.

    python benchmarks/accuracy.py RECIPE... [--seeds 0-4] [--minutes M] [--subset new_drive=Seq05VD] [--json]
    python benchmarks/accuracy.py --table [RECIPE...]

The seed is that of the run and of the draw of the labels, so that two recipes with one seed are a pair. Every recipe
runs with the first seed, then with the next, so that comparisons begin early. The queue goes on where it was stopped:
runs are in benchmarks/runs/, and a row whose recipe, method (the text of its golden losses) and seed stand is never run
again. After --minutes the run in progress writes a checkpoint, and what is left stands in todo.txt. --subset
NAME=PREFIX adds the mIoU over the images of the split whose file names begin with PREFIX as the column miou_NAME, also
to rows that stand while their run folder is there.
"""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import HERE, finish, parser, read_csv, run_script, train, write_csv
from ledger import Job, add_subsets, name_of
from summary import as_text, lines

from semiseg.files import write_text
from semiseg.types import InputError


def work(jobs: list[Job], results: Path, subsets: dict[str, str], minutes: float | None) -> tuple[list[Job], list[str]]:
    """Runs what does not stand yet. Returns what is left, and what failed."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    left, failed = [], []
    for job in jobs:
        if not any(map(job.stands, read_csv(results))):
            seconds = None if end is None else end - time.monotonic()
            try:
                if (seconds is not None and seconds <= 0) or not _run(job, results, seconds):
                    left.append(job)
                    continue
            except InputError as error:
                failed.append(str(error))
                left.append(job)
                continue
        _fill(job, results, subsets)
    return left, failed


def _run(job: Job, results: Path, seconds: float | None) -> bool:
    """Trains and appends the row; False where the time did not suffice."""
    folder = job.folder(read_csv(results))
    if not train(job.path, folder, job.options, seconds):
        return False
    rows = read_csv(results)  # anew: another queue may have added its own
    row = job.row(rows)
    write_csv(results, [*rows, row])
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of no use after the end, and large
    print(f"{row['recipe']} seed {job.seed}: mIoU {row['miou']}, {row['minutes']} min", file=sys.stderr, flush=True)
    return True


def _fill(job: Job, results: Path, subsets: dict[str, str]) -> None:
    rows = read_csv(results)
    row = next(row for row in rows if job.stands(row))
    before = dict(row)
    add_subsets(row, job.folder(rows), subsets)
    if row != before:
        write_csv(results, rows)


def note(todo: Path, jobs: list[Job], left: list[Job]) -> None:
    """Replaces this queue's lines in todo.txt by what is left of it."""
    old = todo.read_text(encoding="utf-8").splitlines() if todo.exists() else []
    mine = {job.todo for job in jobs}
    text = [line for line in old if line not in mine] + [job.todo for job in left]
    if text:
        write_text(todo, "\n".join(text) + "\n")
    else:
        todo.unlink(missing_ok=True)


def seeds_of(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"{text} is not of the form 0-4 or 0,2,5")
    parts = [part.partition("-") for part in text.split(",")]
    return [seed for first, _, last in parts for seed in range(int(first), int(last or first) + 1)]


def _subset(text: str) -> tuple[str, str]:
    name, equals, prefix = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text} is not of the form NAME=PREFIX")
    return name, prefix


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE")
    options.add_argument("--seeds", type=seeds_of, default=seeds_of("0-4"), help="0-4, or 0,2,5")
    options.add_argument("--minutes", type=float, help="stop after these")
    options.add_argument("--subset", type=_subset, action="append", default=[], metavar="NAME=PREFIX")
    options.add_argument("--table", action="store_true", help="only print the table")
    options.add_argument("--results", type=Path, default=HERE / "results.csv")
    options.add_argument("--runs", type=Path, default=HERE / "runs")
    given = options.parse_args(arguments)
    left: list[Job] = []
    failed: list[str] = []
    if given.recipes and not given.table:
        jobs = [Job.of(path, seed, given.runs) for seed in given.seeds for path in given.recipes]
        todo, rows = given.results.with_name("todo.txt"), read_csv(given.results)
        note(
            todo, jobs, [job for job in jobs if not any(map(job.stands, rows))]
        )  # so that a killed queue leaves it too
        left, failed = work(jobs, given.results, dict(given.subset), given.minutes)
        note(todo, jobs, left)
    found = lines(read_csv(given.results), {name_of(path) for path in given.recipes})
    text = [as_text(found), *(f"failed: {error}" for error in failed), *(f"left: {job.todo}" for job in left)]
    finish({"table": found, "failed": failed, "left": [job.todo for job in left]}, "\n".join(text), given.json)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)

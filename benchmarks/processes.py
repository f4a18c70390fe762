"""What a second process brings: images/s of several processes over one, each with one CPU thread, or with one GPU.

    python benchmarks/processes.py [RECIPE] [--processes 2] [--steps 30] [--json]

Both are whole runs of `semiseg train`, the second by torchrun; the speed is the median of metrics.csv's images/s over
intervals of 5 steps, the first two left out. The processes divide the batch of the recipe. A third row has as many runs
at the same time that know nothing of each other, each with its share of the batch: more than they make together the
machine does not give.
"""

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from common import DEFAULT, finish, parser, run_script, table

from semiseg.config import load_recipe
from semiseg.types import InputError

LEAST = 0.9
"""Least speed a process, as a share of that of one alone."""
EVERY = 5


def speed(recipe: Path, processes: int, steps: int, folder: Path, *more: str) -> float:
    """Images/s of a run.

    Raises:
        InputError: the run failed.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    options = [f"train.steps={steps}", "train.threads=1", f"train.log_every={EVERY}", "train.evaluations=1"]
    options += ["baseline=false", *more]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "semiseg", "train", str(recipe)]
    done = subprocess.run([*command, "--out", str(folder), *options], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        reason = next((line for line in said if line.startswith("error: ")), said[-1] if said else "no reason given")
        raise InputError(
            f"the run of {processes} processes failed: {re.sub(r'^error: (in process [0-9]+: )?', '', reason)}"
        )
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        speeds = [float(row["images_per_second"]) for row in csv.DictReader(file)]
    return median(speeds[2:])


def apart(recipe: Path, runs: int, steps: int, place: Path) -> float:
    """Images/s of several runs of one process together, each with its share of the batch."""
    batch = load_recipe(recipe).train.batch // runs
    with ThreadPoolExecutor(runs) as pool:
        each = [pool.submit(speed, recipe, 1, steps, place / str(i), f"train.batch={batch}") for i in range(runs)]
        return sum(one.result() for one in each)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("recipe", nargs="?", type=Path, default=DEFAULT, metavar="RECIPE")
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--steps", type=int, default=30, help=f"of each run, at least {3 * EVERY}")
    given = options.parse_args(arguments)
    if given.steps < 3 * EVERY:
        raise InputError(f"--steps {given.steps} leaves nothing to measure: take {3 * EVERY} or more.")
    with tempfile.TemporaryDirectory() as place:
        speeds = {str(n): speed(given.recipe, n, given.steps, Path(place, str(n))) for n in (1, given.processes)}
        limit = apart(given.recipe, given.processes, given.steps, Path(place, "apart"))
    ratio = speeds[str(given.processes)] / speeds["1"]
    speeds[f"{given.processes} runs apart"] = limit
    result: dict[str, Any] = {"recipe": given.recipe.stem, "images_per_second": speeds, "ratio": ratio}
    head = ["recipe", "processes", "images/s", f"ratio (>= {LEAST * given.processes:g})"]
    rows = [[given.recipe.stem, n, f"{value:.1f}", f"{value / speeds['1']:.2f}"] for n, value in speeds.items()]
    finish(result, table([head, *rows]), given.json)


if __name__ == "__main__":
    run_script(main)

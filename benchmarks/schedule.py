"""What a schedule of crop sizes saves: samples/s over those of whole crops, in passes and with reading.

    python benchmarks/schedule.py [RECIPE] [--crop 128 192] [--small-share 2/3] [--rounds 7] [--steps 0] [--json]
                                  [--train --seeds 0-4 --schedule coarse2fine+ [--train-steps N] [--runs FOLDER]]

Passes: the recipe's own `step` (forward, losses, backward, optimiser) on random batches in memory, once for each crop
size and batch that a schedule has, all taking turns in one process; a schedule's seconds a sample are the medians of
its phases, weighted by their shares of the samples. `predicted` is 1 / sum(share * px / px of a whole crop), what the
ratio would be if a step cost nothing but its pixels. `alternate` changes with every step here, as an epoch is one.
Sides of the small crops are rounded down to multiples of 32 px, so --crop should have halves that are; the prediction
is of the rounded ones.

With reading (--steps above 0): the steps that a run of so many baseline steps has, from the recipe's data through the
loader with its worker, timed from the first batch on; no evaluation, no checkpoint, no log.

--train trains baseline and schedule on the same seeds as the ledger does, with a results.csv in the folder of the runs,
and compares them: the paired difference in mIoU with its 95 % t-interval, and minutes until val is as good as the
baseline's last one. These are a share of the run's minutes by steps, as if all took the same time; with + they nearly
do.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from accuracy import seeds_of
from arms import jobs_of, trained
from common import HERE, ROOT, build_method, finish, parser, read_csv, run_script, table
from ledger import Job
from passes import Bench, batches_of, random_data
from step import take_turns
from summary import compared

from semiseg import parallel
from semiseg.config import Recipe, load_recipe
from semiseg.data.loader import Steps, steps
from semiseg.data.sampling import Phase, Timetable
from semiseg.data.splits import Data, load_data
from semiseg.engine.schedule import power_of, scheduled
from semiseg.methods import StepMethod
from semiseg.types import InputError, Schedule

RECIPE = ROOT / "recipes/camvid/supervised-mobilenetv2-46.yaml"
LEAST = 1.7
"""Samples/s of coarse2fine+ over those of the baseline, in passes."""
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def with_schedule(recipe: Recipe, schedule: Schedule) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"schedule": schedule})})


def phases(recipe: Recipe, method: StepMethod, data: Data) -> list[tuple[float, Phase]]:
    """A run's phases with their shares of the samples; a method's streams have the same ones."""
    c = recipe.train
    stream = next(
        iter(scheduled(method.streams(data, c.batch, c.crop), c, power_of(method.optimizers.values())).values())
    )
    ends = [phase.until for phase in stream.phases]
    return list(zip(np.diff([0.0, *ends]).tolist(), stream.phases, strict=True))


def in_passes(recipe: Recipe, base: Path, rounds: int) -> dict[Schedule, dict[str, float]]:
    """Each schedule's milliseconds a sample, its ratio to the baseline's, and what the pixels predict."""
    device, data = parallel.device(recipe.train.device), random_data(recipe)
    method = build_method(recipe, data, device, base)
    streams = method.streams(data, recipe.train.batch, recipe.train.crop)
    divided = {name: phases(with_schedule(recipe, name), method, data) for name in SCHEDULES}
    kinds = {(phase.crop, phase.batch): phase for parts in divided.values() for _, phase in parts}

    def bench(phase: Phase) -> Bench:
        own = {name: replace(stream, phases=(phase,)) for name, stream in streams.items()}
        return Bench(recipe, method, batches_of(own, recipe, len(data.classes), device), device)

    benches = {str(kind): bench(phase) for kind, phase in kinds.items()}
    wait = next(iter(benches.values())).wait
    times = take_turns({kind: one.whole for kind, one in benches.items()}, wait, rounds)
    whole, found = recipe.train.crop[0] * recipe.train.crop[1], {}
    for name, parts in divided.items():
        ms = [1e3 * float(np.median(times[str((phase.crop, phase.batch))])) / phase.batch for _, phase in parts]
        px = sum(share * phase.crop[0] * phase.crop[1] / whole for share, phase in parts)
        found[name] = {"ms": sum(share * t for (share, _), t in zip(parts, ms, strict=True)), "predicted": 1 / px}
    return {name: line | {"ratio": found["baseline"]["ms"] / line["ms"]} for name, line in found.items()}


def with_reading(recipe: Recipe, base: Path, count: int) -> dict[Schedule, dict[str, float]]:
    """Each schedule's milliseconds a sample in a run of `count` baseline steps, from the disk to the weights."""
    device = parallel.device(recipe.train.device)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": count})})
    data = load_data(recipe.data, base)
    method = build_method(recipe, data, device, base)
    c, found = recipe.train, {}
    for name in SCHEDULES:
        power = power_of(method.optimizers.values())
        streams = scheduled(method.streams(data, c.batch, c.crop), with_schedule(recipe, name).train, power)
        timetable = Timetable(next(iter(streams.values())).phases, count * c.batch)
        dataset = Steps(streams, timetable, data, c.seed)
        begun, first = 0.0, 0
        for number, item in enumerate(steps(dataset, 0, c.workers, device.type == "cuda")):
            if number == 1:  # the worker's start and the first step's allocations are paid once a run
                begun, first = time.perf_counter(), timetable.at(number)[1]
            Bench(recipe, method, item.batches, device).whole()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found[name] = {"ms": 1e3 * (time.perf_counter() - begun) / (timetable.samples - first)}
    return {name: line | {"ratio": found["baseline"]["ms"] / line["ms"]} for name, line in found.items()}


def compared_by_training(
    path: Path, texts: Sequence[str], schedule: Schedule, seeds: Sequence[int], runs: Path
) -> dict[str, Any]:
    """Trains what the results in `runs` lack, and compares the schedule with the baseline, paired over the seeds."""
    jobs = jobs_of(
        {which: (path, [*texts, f"train.schedule={which}"]) for which in ("baseline", schedule)}, seeds, runs
    )
    arms, rows = trained(jobs, runs), read_csv(runs / "results.csv")
    minutes = {which: [(job, float(arms[which][job.seed]["minutes"])) for job in some] for which, some in jobs.items()}
    goals = [val_of(job, rows)[-1][1] for job, _ in minutes["baseline"]]
    reached = {which: [_minutes(job, total, goal, rows) for (job, total), goal in zip(some, goals, strict=True)]
               for which, some in minutes.items()}  # fmt: skip
    return {
        "schedule": schedule, "seeds": list(seeds), **compared(arms[schedule], arms["baseline"], None),
        "miou": {which: float(np.mean([float(row["miou"]) for row in arm.values()])) for which, arm in arms.items()},
        "minutes": {which: float(np.mean([total for _, total in some])) for which, some in minutes.items()},
        "minutes_to_goal": reached, "goals": goals,
    }  # fmt: skip


def val_of(job: Job, rows: Sequence[dict[str, str]]) -> list[tuple[int, float]]:
    """Steps done and mIoU of a run's evaluations on val."""
    told = read_csv(job.folder(rows) / "metrics.csv")
    found = [(int(row["step"]) + 1, float(row["val_miou"])) for row in told if row.get("val_miou")]
    if not found:
        raise InputError(f"{job.path}: the data has no val split, so a run has no goal.")
    return found


def _minutes(job: Job, total: float, goal: float, rows: Sequence[dict[str, str]]) -> float | None:
    """Until val was at least as good as the goal; none: never."""
    found = val_of(job, rows)
    at = next((step for step, value in found if value >= goal), None)
    return None if at is None else total * at / found[-1][0]


def as_text(result: dict[str, Any]) -> str:
    c = result["train"]
    rows = [["schedule", "ms a sample", f"ratio in passes (coarse2fine+ >= {LEAST})", "predicted", "ms with reading",
             "ratio with reading"]]  # fmt: skip
    for name, line in result["passes"].items():
        read = result["reading"][name] if result["reading"] else None
        cells = [f"{read['ms']:.1f}", f"{read['ratio']:.2f}"] if read else ["", ""]
        rows.append([name, f"{line['ms']:.1f}", f"{line['ratio']:.2f}", f"{line['predicted']:.2f}", *cells])
    size = "x".join(map(str, c["crop"]))
    text = f"{result['recipe']}: crop {size} px, batch {c['batch']}, {c['small_share']:.2f} of the samples small"
    text += f"\n\n{table(rows)}"
    if t := result["trained"]:
        interval = "" if t["interval"] is None else " ({:+.2f} .. {:+.2f})".format(*t["interval"])
        text += f"\n\n{t['schedule']} against baseline, {t['pairs']} seeds: mIoU {t['difference']:+.2f}{interval}; "
        text += ", ".join(f"{which} {m:.1f} min" for which, m in t["minutes"].items())
        text += "; minutes to the baseline's last val:"
        for which, found in t["minutes_to_goal"].items():
            text += " ".join([f" {which}", *("never" if m is None else f"{m:.1f}" for m in found)])
    return text


def _share(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not of the form 2/3 or 0.6") from error


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("recipe", nargs="?", type=Path, default=RECIPE, metavar="RECIPE")
    options.add_argument("--crop", type=int, nargs=2, default=(128, 192), metavar=("H", "W"), help="px")
    options.add_argument("--small-share", type=_share, default=2 / 3, help="of the samples: 2/3 or 0.6")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--steps", type=int, default=0, help="baseline steps that are run with reading; 0: none")
    options.add_argument("--train", action="store_true", help="trains baseline and schedule, and compares")
    options.add_argument("--seeds", type=seeds_of, default=seeds_of("0-4"), help="with --train: 0-4, or 0,2,5")
    options.add_argument("--schedule", choices=SCHEDULES[1:], default="coarse2fine+", help="with --train")
    options.add_argument("--train-steps", type=int, help="with --train: else the recipe's")
    options.add_argument("--runs", type=Path, default=HERE / "runs/schedule")
    given = options.parse_args(arguments)
    length = [] if given.train_steps is None else [f"train.steps={given.train_steps}"]
    texts = [f"train.crop={list(given.crop)}", f"train.small_share={given.small_share}", *length]
    recipe, base = load_recipe(given.recipe, texts), given.recipe.parent
    torch.set_num_threads(recipe.train.threads or torch.get_num_threads())
    result = {
        "recipe": given.recipe.stem,
        "train": recipe.train.model_dump(mode="json"),
        "passes": in_passes(recipe, base, given.rounds),
        "reading": with_reading(recipe, base, given.steps) if given.steps else None,
        "trained": compared_by_training(given.recipe, texts, given.schedule, given.seeds, given.runs)
        if given.train
        else None,
        "least": LEAST,
    }
    finish(result, as_text(result), given.json)


if __name__ == "__main__":
    run_script(main)

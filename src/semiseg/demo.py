"""The demo: labelled-only against semi-supervised training on synthetic scenes, five pairs of runs, minutes on a CPU.

Both runs of a pair have the same network, initial weights, labelled scenes and crops of them, steps and learning rate;
the pair's seed draws all of these. The test scenes are for the reported scores alone: no checkpoint is chosen, and the
options below were found on scenes of another seed of the generator (the learning rate by the labelled-only runs).
"""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from semiseg import api
from semiseg.config import Recipe, parse
from semiseg.data import synthetic
from semiseg.engine.compare import as_markdown
from semiseg.files import replacing
from semiseg.types import IGNORE, InputError, Interrupted

SEEDS = range(5)
SCENES: dict[str, Any] = {"train": 300, "val": 0, "test": 100, "size": (64, 96)}

SHARED = """
data:    {format: splits, labelled: 8, scale: [0.75, 1.5]}
network: {name: fpn, encoder: test_resnet, weights: random, encoder_options: {norm_layer: groupnorm1},
          options: {decoder_pyramid_channels: 64, decoder_segmentation_channels: 32}}
optim:   {lr: 0.003, head_lr: 1}
train:   {steps: 350, batch: 4, crop: [64, 96], device: cpu, threads: 1, workers: 0,
          log_every: 25, save_every: 100}
"""
"""The recipe of all runs, but for method and seed. Group norm, because a batch of 4 is small for batch norm."""

LOSS = {"kind": "ce+dice", "class_weights": True}
"""Of both arms. It lifts the small classes, which pseudo-labels would lose to sky and ground."""

ARMS: dict[str, dict[str, Any]] = {
    "labelled-only": {"name": "supervised", "loss": LOSS},
    "semi-supervised": {
        "name": "fixmatch",
        "loss": LOSS,
        "ema": 0.97,
        "jitter": [0.4, 0.4, 0.4, 0.05],
        "sigma": [0.1, 0.8],
    },
}
"""The method of each run of a pair, the baseline first."""

PROCESSES = 4
"""At most; a run has one thread and needs up to 1 GB."""

SHOWN = 6
"""Test scenes in the picture: the first ones, whatever they show."""


def demo(out: Path) -> None:
    """Draws scenes, trains on them, prints each pair's scores and a table, and draws the masks of the first pair.

    A second call goes on where the first was stopped, and trains nothing again that is finished.

    Args:
        out: folder for the scenes, the runs and the picture.

    Raises:
        InputError: `out` cannot be written or holds other runs, or memory is short.
    """
    began = time.monotonic()
    scenes, picture = out / "scenes", out / "scenes.png"
    if not (scenes / "classes.json").exists():
        try:
            synthetic.write(scenes, **SCENES)
        except OSError as error:
            raise InputError(f"{out} cannot be written ({error.strerror}): choose another --out.") from error
    jobs = {out / "runs" / f"{arm}-{seed}": recipe(arm, seed, scenes) for seed in SEEDS for arm in ARMS}
    pairs = [tuple(out / "runs" / f"{arm}-{seed}" for arm in ARMS) for seed in SEEDS]
    shared = next(iter(jobs.values()))
    print(
        f"{SCENES['train']} scenes to train on, {shared.data.labelled} of them labelled, {SCENES['test']} to test on: "
        f"{scenes}\n{len(jobs)} runs of {shared.train.steps} steps on a CPU; test mIoU of each pair:"
    )

    told: set[int] = set()

    def report(folder: Path) -> None:
        for seed, pair in zip(SEEDS, pairs, strict=True):
            if folder in pair and all(map(_finished, pair)) and seed not in told:
                told.add(seed)
                scores = [_score(run) for run in pair]
                both = "  ".join(f"{arm} {score:.2f}" for arm, score in zip(ARMS, scores, strict=True))
                print(f"  seed {seed}  {both}  difference {scores[1] - scores[0]:+.2f}", flush=True)

    train(jobs, report)
    print("\n" + as_markdown(api.compare([run for arm in zip(*pairs, strict=True) for run in arm])))
    ahead = sum(_score(run) > _score(baseline) for baseline, run in pairs)
    print(f"\n{list(ARMS)[1]} is ahead in {ahead} of {len(pairs)} seeds.")
    draw(dict(zip(ARMS, pairs[0], strict=True)), scenes, picture)
    print(f"the first {SHOWN} test scenes, with the masks of the first pair: {picture}")
    print(f"to try other options: semiseg train {pairs[0][1] / 'recipe.yaml'} --out RUN method.threshold=0.8")
    print(f"this took {time.monotonic() - began:.0f} s")


def recipe(arm: str, seed: int, scenes: Path) -> Recipe:
    """The recipe of one run."""
    plain = yaml.safe_load(SHARED)
    plain["data"] |= {"root": str(scenes.resolve()), "split_seed": seed}
    plain["train"]["seed"] = seed
    return parse(plain | {"method": ARMS[arm], "baseline": False}, "demo")


def train(jobs: Mapping[Path, Recipe], report: Callable[[Path], None]) -> None:
    """Trains what is not finished, several runs at a time; `report` is told each folder as soon as its run is there.

    One run does not fill two cores: its network is so small that threads mostly wait for one another.

    Raises:
        InputError: a folder holds another run, memory is short, or the disk is full.
    """
    for folder in filter(_finished, jobs):
        report(folder)
    left = {folder: job for folder, job in jobs.items() if not _finished(folder)}
    if not left:
        return
    processes = min(PROCESSES, os.cpu_count() or 1, len(left))
    # Spawned, as a fork would copy locks of torch's threads. Ctrl-C is answered here; a run ends by SIGTERM.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            futures = {pool.submit(_run, job, folder): folder for folder, job in left.items()}
            for future in as_completed(futures):
                future.result()
                report(futures[future])
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise InputError(
                    "A run was ended by the system, mostly for lack of memory: close other programs, and the same "
                    "command goes on."
                ) from error
            raise


def _run(job: Recipe, folder: Path) -> None:
    """One run in a process of its own; what it prints goes to a file beside its folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            api.run(job, folder)
        except Interrupted as stop:
            raise SystemExit(stop.code) from None


def _finished(folder: Path) -> bool:
    return (folder / "results.json").exists()


def _score(folder: Path) -> float:
    """mIoU on the test scenes in per cent."""
    return 100 * float(json.loads((folder / "results.json").read_text(encoding="utf-8"))["miou"])


def draw(runs: Mapping[str, Path], scenes: Path, path: Path, shown: int = SHOWN) -> None:
    """Draws the first test scenes into a PNG: image, reference and the mask of each run, side by side, with a legend.

    Args:
        runs: title -> folder of a finished run.
        scenes: the data folder.
        path: the file.
        shown: how many scenes.
    """
    from matplotlib.figure import Figure  # slow to import; used without pyplot, which would look for a window system
    from matplotlib.patches import Patch

    models = {f"{title}\n{_score(folder):.1f} mIoU": api.load(folder, "cpu") for title, folder in runs.items()}
    images = sorted((scenes / "images" / "test").iterdir())[:shown]
    colours = np.full((IGNORE + 1, 3), 255, np.uint8)
    colours[: len(synthetic.PALETTE)] = synthetic.PALETTE
    figure = Figure(figsize=(2.6 * (2 + len(models)), 1.75 * len(images) + 0.9), layout="constrained")
    grid = figure.subplots(len(images), 2 + len(models), squeeze=False)
    for line, image in zip(grid, images, strict=True):
        reference = np.asarray(Image.open(scenes / "masks" / "test" / image.name))
        masks = {"reference": reference} | {title: model.predict(image).mask for title, model in models.items()}
        pictures = {"scene": np.asarray(Image.open(image))} | {title: colours[mask] for title, mask in masks.items()}
        for axes, (title, pixels) in zip(line, pictures.items(), strict=True):
            axes.imshow(pixels, interpolation="nearest")
            axes.set_axis_off()
            if image is images[0]:
                axes.set_title(title, fontsize="medium")
    named = dict(zip(synthetic.CLASSES, synthetic.PALETTE, strict=True)) | {"no label": (255, 255, 255)}
    patches = [
        Patch(facecolor=(c[0] / 255, c[1] / 255, c[2] / 255), edgecolor="grey", label=name) for name, c in named.items()
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize="small")
    with replacing(path) as part:
        figure.savefig(part, dpi=110)

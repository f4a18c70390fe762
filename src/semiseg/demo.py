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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from semiseg import api
from semiseg.config import Recipe, parse
from semiseg.data import synthetic
from semiseg.data.splits import Data
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
train:   {steps: 400, batch: 4, crop: [64, 96], device: cpu, channels_last: true, threads: 1, workers: 0,
          log_every: 25, save_every: 50}
"""
"""The recipe of all runs, but for method and seed. Group norm, because a batch of 4 is small for batch norm."""

ARMS: dict[str, dict[str, Any]] = {
    "labelled-only": {"name": "supervised", "loss": {"kind": "ce+dice"}},
    "semi-supervised": {"name": "fixmatch", "loss": {"kind": "ce+dice"}, "threshold": 0.9, "ema": 0.97},
}
"""The method of each run of a pair, the baseline first."""

PROCESSES = 4
"""At most; a run has one thread and needs up to 1 GB."""
SHOWN = 6
"""Test scenes in the picture: the first ones, whatever they show."""


def demo(out: Path) -> None:
    """Draws scenes, trains on them, prints each pair's scores and a table, and draws the masks of the first pair.

    A second call goes on where the first was stopped, and does nothing again that is finished.

    Args:
        out: folder for the scenes, the runs and the picture.

    Raises:
        InputError: `out` holds something else or cannot be written, or memory is short.
    """
    began = time.monotonic()
    scenes, runs = out / "scenes", out / "runs"
    if not (scenes / "classes.json").exists():
        _draw_scenes(scenes)
    folders = {(arm, seed): runs / f"{arm}-{seed}" for seed in SEEDS for arm in ARMS}
    print(f"{SCENES['train']} scenes to train on, 8 of them labelled, and {SCENES['test']} to test: {scenes}")

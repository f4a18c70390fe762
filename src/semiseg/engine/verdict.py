"""Whether the unlabelled images helped: a semi-supervised model beside the labelled-only one, in numbers and words.

What is delivered is chosen on val where there is one beside the split that is reported, and the interval is that of the
reported split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from semiseg.engine.evaluate import Scores, joined
from semiseg.engine.intervals import Interval, block_length, over_images, over_training


@dataclass(frozen=True)
class Trained:
    """A training's scores on the split that is reported, and its mIoU on val, 0..1, where val is another split."""

    scores: Scores
    val: float | None


@dataclass(frozen=True)
class Verdict:
    """mIoU in per cent, NaN where no mask has a class; differences are the method's less the labelled-only one."""

    words: str
    why: str
    """What is delivered, and why."""
    outcome: Literal["gain", "no gain", "not distinguishable", "not known"]
    """What the words say: whether the interval is above zero, below it, or holds it; or there is no score."""
    wins: bool
    """Whether the method is delivered; val may say so where the reported split does not."""
    method: float
    labelled_only: float
    difference: float
    interval: Interval | None
    """95 % interval of the difference; none: there are too few images."""
    covers: str
    """What the interval covers: `training` (paired over seeds) or `images` (the split resampled)."""


def judge(
    pairs: Sequence[tuple[Trained, Trained]], name: str, split: str, how: Literal["one", "seeds", "folds"] = "one"
) -> Verdict | None:
    """Compares trainings of a method, each with the labelled-only one of the same seed or fold.

    Args:
        pairs: method and labelled-only; several are seeds, or folds whose images are scored together.
        name: of the method, for the words.
        split: likewise, of the images.
        how: what several pairs are.

    Returns:
        None where no mask has a class, and there is no val to choose on.
    """
    methods, baselines = ([pair[i] for pair in pairs] for i in (0, 1))
    if how == "folds":
        methods, baselines = ([Trained(joined([one.scores for one in arm]), None)] for arm in (methods, baselines))
    changes = np.array([100 * (a.scores.miou - b.scores.miou) for a, b in zip(methods, baselines, strict=True)])
    on_val = [[one.val for one in arm if one.val is not None] for arm in (methods, baselines)]
    scored = bool(np.isfinite(changes).all())
    if not scored and not all(on_val):
        return None
    first = methods[0].scores
    method, baseline = (100 * float(np.mean([one.scores.miou for one in arm])) for arm in (methods, baselines))
    difference = float(changes.mean())
    interval = None
    if scored:
        interval = over_training(changes) if how == "seeds" else over_images(first, baselines[0].scores)
    covers = "training" if how == "seeds" else "images"

    many = f", means of {len(pairs)} seeds" if how == "seeds" else ", each out of fold" if how == "folds" else ""
    images = f"{len(first.names)} image{'s' * (len(first.names) != 1)}"
    numbers = f"({baseline:.2f} -> {method:.2f} on {split}, {images}{many})"
    outcome: Literal["gain", "no gain", "not distinguishable", "not known"]
    if not scored:
        outcome = "not known"
        words = f"No verdict: no mask of {split} has a class."
    elif interval is None or interval[0] <= 0 <= interval[1]:
        outcome = "not distinguishable"
        words = f"Not distinguishable from labelled-only: {difference:+.2f} mIoU {numbers}."
    elif difference > 0:
        outcome = "gain"
        words = f"{difference:+.2f} mIoU over labelled-only {numbers}."
    else:
        outcome = "no gain"
        words = f"No gain over labelled-only: {difference:+.2f} mIoU {numbers}."
    if scored:
        words += f" {_limits(interval, how, split, first.names)}"

    if all(on_val):
        ours, theirs = (100 * float(np.mean(values)) for values in on_val)
        wins, reason = ours > theirs, f"val has {theirs:.2f} -> {ours:.2f}"
    else:
        wins, reason = difference > 0, "chosen on the same images, so that its score is a little optimistic"
    why = f"Delivered: the {name if wins else 'labelled-only'} model; {reason}."
    return Verdict(words, why, outcome, wins, method, baseline, difference, interval, covers)


def _limits(interval: Interval | None, how: str, split: str, names: Sequence[str]) -> str:
    if interval is None:
        return f"Too few images on {split} for an interval."
    numbers = f"{interval[0]:+.2f} .. {interval[1]:+.2f}"
    if how == "seeds":
        return f"95 % interval over training {numbers}; it does not cover the choice of images."
    length = block_length(names)
    blocks = f", {length} neighbours of a sequence at a time" if length > 1 else ""
    covers = (
        "the noise of training is in it in part, as each fold is trained once"
        if how == "folds"
        else "it does not cover the noise of training (use --seeds 3)"
    )
    return f"95 % interval over {split} images{blocks}: {numbers}; {covers}."

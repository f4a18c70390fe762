"""Level 6: the losses of 20 steps in float64, to a relative 1e-7.

A change that may alter results says so in its commit and writes the files anew: `python tests/test_golden.py METHOD`.
"""

import sys
import tempfile
from pathlib import Path

import pytest
from needs import needed

from semiseg import testing
from semiseg.methods import METHODS

FOLDER = Path(__file__).with_name("golden")


def record(method: str, folder: Path) -> str:
    """One line a step: `name=value` of everything that the step returns."""
    steps = testing.losses(testing.Case(method, folder, needed(method, folder)))
    return "".join(" ".join(f"{name}={value:.12g}" for name, value in step.items()) + "\n" for step in steps)


def parse(text: str) -> list[dict[str, float]]:
    pairs = [[part.split("=") for part in line.split()] for line in text.splitlines()]
    return [{name: float(value) for name, value in line} for line in pairs]


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_what_they_were(method: str, tmp_path: Path) -> None:
    expected = parse((FOLDER / f"{method}.txt").read_text(encoding="utf-8"))
    losses = parse(record(method, tmp_path))
    assert len(losses) == len(expected)
    for step, (now, before) in enumerate(zip(losses, expected, strict=True)):
        assert now == pytest.approx(before, rel=1e-7, abs=1e-12, nan_ok=True), f"step {step}"


def test_every_file_belongs_to_a_method() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(METHODS)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place:
            (FOLDER / f"{name}.txt").write_text(record(name, Path(place)), encoding="utf-8", newline="\n")

"""The demo in small: two pairs of two steps, its table and picture, and a second call that trains nothing again."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semiseg import demo


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "SEEDS", range(2))
    monkeypatch.setattr(demo, "SCENES", {"train": 12, "val": 0, "test": 6, "size": (32, 48)})
    small = demo.SHARED.replace("steps: 350", "steps: 2").replace("crop: [64, 96]", "crop: [32, 48]")
    assert small != demo.SHARED
    monkeypatch.setattr(demo, "SHARED", small)

    demo.demo(tmp_path / "demo")
    printed = capsys.readouterr().out
    for seed in (0, 1):
        assert f"seed {seed}  labelled-only " in printed
    assert "of 2 seeds" in printed
    assert len(np.unique(np.array(Image.open(tmp_path / "demo/scenes.png").convert("L")))) > 10

    runs = sorted((tmp_path / "demo/runs").glob("*/results.json"))
    assert len(runs) == 4
    before = [path.stat().st_mtime_ns for path in runs]
    demo.demo(tmp_path / "demo")
    assert [path.stat().st_mtime_ns for path in runs] == before
    again = capsys.readouterr().out
    pairs = [line for line in printed.splitlines() if line.startswith("  seed ")]
    assert len(pairs) == 2
    assert [line for line in again.splitlines() if line.startswith("  seed ")] == sorted(pairs)

"""The code on the docs pages runs as it stands there."""

import re
from pathlib import Path

import pytest

from semiseg import testing

PAGE = (Path(__file__).parents[1] / "docs" / "own.md").read_text(encoding="utf-8")
METHOD, CHECK, LOOP = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))


def test_the_method_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(METHOD.splitlines()) < 60
    (tmp_path / "confident.py").write_text(METHOD)
    (tmp_path / "empty_folder").mkdir()
    monkeypatch.chdir(tmp_path)
    exec(compile(CHECK, "own.md", "exec"))


def test_the_method_differs_from_labelled_only(tmp_path: Path) -> None:
    (tmp_path / "confident.py").write_text(METHOD)
    case = testing.Case("confident.py:Confident", tmp_path, {"threshold": 0.4}, base=tmp_path)
    assert any(row["loss_unlabelled"] > 0 for row in testing.losses(case, 3))


def test_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    code = LOOP.splitlines()
    assert len(code) <= 25
    place: dict[str, object] = {}
    exec(compile(LOOP, "own.md", "exec"), place)
    assert capsys.readouterr().out.count("loss_contrastive") == 3
    assert "teacher" in place

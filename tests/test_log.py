import json
import math
from pathlib import Path

import pytest
from PIL import Image

from semiseg import progress
from semiseg.engine.log import Log, peak_memory
from semiseg.files import write_json, write_text
from semiseg.progress import tracked


def record(folder: Path, first: int, last: int) -> None:
    with Log(folder, total=100, start=first) as log:
        for step in range(first, last):
            log.row(step, {"loss": 1 / (step + 1), "rate": 0.1})
            if step % 3 == 2:
                log.row(step, {"val_miou": step / 100})


def test_columns_appear_with_the_first_row_that_has_them(tmp_path: Path) -> None:
    with Log(tmp_path, total=10) as log:
        log.row(0, {"loss": 0.5})
        log.row(1, {"loss": 0.25, "val_miou": 1 / 3})
        log.row(2, {"loss": math.nan})
    assert (tmp_path / "metrics.csv").read_bytes() == b"step,loss,val_miou\r\n0,0.5,\r\n1,0.25,0.333333\r\n2,nan,\r\n"


def test_a_resumed_run_leaves_the_same_file(tmp_path: Path) -> None:
    record(tmp_path / "whole", 0, 20)
    record(tmp_path / "killed", 0, 13)
    with (tmp_path / "killed" / "metrics.csv").open("a") as file:
        file.write("1")  # half of a line "13,..."
    record(tmp_path / "killed", 10, 20)
    assert (tmp_path / "killed" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_a_fresh_run_keeps_nothing_of_the_old_one(tmp_path: Path) -> None:
    record(tmp_path, 0, 5)
    with Log(tmp_path, total=10) as log:
        log.row(0, {"critic": 1.0})
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,critic", "0,1"]


def test_curves_are_a_readable_picture(tmp_path: Path) -> None:
    with Log(tmp_path, total=200) as log:
        log.curves()
        assert not (tmp_path / "curves.png").exists()
        for step in range(200):
            log.row(step, {"loss": math.exp(-step / 50), "rate_net": 1 - step / 200, "selected": math.nan})
        log.row(199, {"val_miou": 0.5})
        log.curves()
    with Image.open(tmp_path / "curves.png") as picture:
        width, height = picture.size
    assert width > 1000
    assert height > 600
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.csv", "curves.png"}


def test_curves_of_more_classes_than_a_legend_has_room_for(tmp_path: Path) -> None:
    """As with Mapillary's: the curves were squeezed to nothing, with a warning, which is an error here."""
    with Log(tmp_path, total=10) as log:
        log.row(9, {"val_miou": 0.5, **{f"val_class {i}": i / 124 for i in range(124)}})
        log.curves()
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (704, 396)


def test_plain_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path, total=10) as log:
        log.progress(4, {"loss": 0.123456, "loss_unlabelled": 1e-5}, rate=31.44)
        log.line("[bold] names in brackets stay, and a line longer than the width of a page is not broken " + "x" * 80)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("5/10  0:00:00 left  31.4 images/s  ")
    assert first.endswith(" GB  loss 0.1235  loss_unlabelled 1e-05")
    assert second.startswith("[bold] names")
    assert second.endswith("xxx")


def test_a_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Log(tmp_path, total=10) as log:
        log.progress(4, {"loss": 0.5}, rate=30.0)
    assert "5/10  0:00:00 left  30.0 images/s  " in capsys.readouterr().out


def test_other_processes_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path / "run", total=10, active=False) as log:
        log.row(0, {"loss": 1.0})
        log.progress(0, {"loss": 1.0}, rate=1.0)
        log.line("nothing")
        log.curves()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_json_is_replaced_at_once_and_has_no_nan(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_json(file, {"miou": 0.5, "per_class": {"sky": math.nan, "Straße": 1.0}, "values": (1, math.inf, None, True)})
    text = file.read_text(encoding="utf-8")
    assert json.loads(text) == {
        "miou": 0.5,
        "per_class": {"sky": None, "Straße": 1.0},
        "values": [1, None, None, True],
    }
    with pytest.raises(TypeError):
        write_json(file, {"not": object()})
    assert file.read_text(encoding="utf-8") == text
    write_text(file, "new")
    assert [f.name for f in tmp_path.iterdir()] == ["results.json"]
    assert file.read_text() == "new"


def test_memory_is_plausible() -> None:
    assert 0.05 < peak_memory() < 1000


def test_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no terminal, a line a minute and none of what is done sooner; never between results."""
    assert list(tracked(iter("abc"), "predicting", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "PAUSE", -1.0)
    assert list(tracked(iter("abc"), "predicting", 3)) == ["a", "b", "c"]
    told = capsys.readouterr()
    assert (told.out, told.err.splitlines()) == ("", [f"predicting: {number} of 3" for number in range(3)])
    monkeypatch.setattr("semiseg.parallel.rank", lambda: 1)
    assert list(tracked(iter("abc"), "predicting", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""

"""What the tests of the command line share: a tiny data set, its recipe, and the command line in this process."""

import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from semiseg import cli
from semiseg.data import synthetic
from semiseg.engine import log
from semiseg.files import replacing

RECIPE = """
data: {{root: {root}, format: splits, scale: [0.75, 1.5]}}
network: {{name: fpn, encoder: test_resnet, weights: random}}
train: {{steps: 12, batch: 4, crop: [32, 32], save_every: 4, log_every: 4, evaluations: 2, threads: 1, workers: 0}}
baseline: false
"""

JARGON = {"Traceback", "pydantic", "Input", "NoneType", "None", "dict", "tuple", "str", "int", "validation", "Errno"}


@dataclass(frozen=True)
class Done:
    """What a command left behind: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one sentence of a refusal, its form checked."""
        assert self.code == 1, (self.code, self.err)
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        text = self.err.removeprefix("error: ").removesuffix("\n")
        assert text[-1] in ".?", text
        assert text[-2] not in ".?!:;,", text
        assert not JARGON & set(re.findall(r"\w+", text)), text
        return text


Command = Callable[..., Done]


@pytest.fixture(autouse=True)
def _quick_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes half of the time of a tiny run: the file is there, and test_log.py looks at what is drawn."""
    if request.path.name != "test_log.py":
        monkeypatch.setattr(log, "_draw", undrawn)


def undrawn(path: Path, *_: object) -> None:
    with replacing(path) as part:
        part.touch()


@pytest.fixture
def semiseg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs the command line in this process, in `tmp_path`."""
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / ".cache"))
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["semiseg", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        code = stopped.value.code
        return Done(code if isinstance(code, int) else 0, out, err)

    yield run
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 tiny scenes, not to be changed: 14 for training, of which 8 have masks, 4 val, 6 test."""
    folder = tmp_path_factory.mktemp("drawn") / "scenes"
    synthetic.write(folder, train=14, labelled=8, val=4, test=6, size=(48, 64))
    return folder


@pytest.fixture
def scenes(drawn: Path, tmp_path: Path) -> Path:
    """The tiny scenes, to be spoilt."""
    return Path(shutil.copytree(drawn, tmp_path / "scenes"))


@pytest.fixture
def recipe(scenes: Path, tmp_path: Path) -> Path:
    """A recipe of 12 steps on the tiny scenes."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(root=scenes))
    return path


@pytest.fixture
def flat(drawn: Path, tmp_path: Path) -> Path:
    """images/ and masks/ without splits and without a class file."""
    folder = tmp_path / "leaves"
    for kind in ("images", "masks"):
        shutil.copytree(drawn / kind / "train", folder / kind)
    return folder

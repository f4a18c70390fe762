"""The code on the docs pages runs as it stands there."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from together import Together

from semiseg import testing

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "own.md").read_text(encoding="utf-8")
METHOD, CHECK, LOOP = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
DISTRIBUTION = (DOCS / "distribution.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", DISTRIBUTION, re.DOTALL)
SLURM = re.findall(r"```bash\n(.*?)```", DISTRIBUTION, re.DOTALL)


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


def execute(program: str) -> None:
    exec(compile(program, "distribution.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("program", "printed"), PROGRAMS)
def test_where_wrappers_fail(program: str, printed: str, tmp_path: Path) -> None:
    said, nothing = Together(tmp_path, 2, execute, program).good()
    assert printed
    assert [line for line in said.splitlines() if "reducer.cpp" not in line] == printed.splitlines()
    assert not [line for line in nothing.splitlines() if "reducer.cpp" not in line]


def test_every_program_is_run() -> None:
    assert len(PROGRAMS) == DISTRIBUTION.count("```python") == 5


SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
echo $SRUN_CPUS_PER_TASK cores
for task in 0 1 2 3; do SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@"; done
"""


def test_slurm_scripts(tmp_path: Path) -> None:
    """Two machines of two tasks each: stand-ins of their commands, and of semiseg, which tells what it is given."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    commands = {
        "srun": SRUN,
        "scontrol": "#!/bin/bash\necho node7\necho node8\n",
        "torchrun": "#!/bin/bash\necho torchrun $*\n",
        "semiseg": f"#!/bin/bash\necho {' '.join('$' + name for name in names)} $1\n",
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}
    given |= {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    by_torchrun, alone = (
        subprocess.run(["bash", "-c", script], env=given | path, capture_output=True, text=True, check=True).stdout
        for script in SLURM
    )
    agent = "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-id 7 --rdzv-backend c10d --rdzv-endpoint node7:29500 "
    assert all(line.startswith(agent) for line in by_torchrun.splitlines()[1:])
    assert "-m semiseg train recipe.yaml --out /shared/runs/a" in by_torchrun
    tasks = [f"{task} 4 {task % 2} 2 node7 29500 train" for task in range(4)]
    assert alone.splitlines() == ["8 cores", *tasks]
    assert by_torchrun.startswith("8 cores\n")

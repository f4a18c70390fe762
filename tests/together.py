"""Functions run by several processes that meet, for tests: forked from one that has imported the package already."""

import atexit
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from semiseg import testing

_CONTEXT = multiprocessing.get_context("forkserver")
# The last two are what runs import late: torch's optimisers and the curves.
_CONTEXT.set_forkserver_preload(["semiseg.testing", "semiseg.cli", "torch._dynamo", "matplotlib.backends.backend_agg"])


class Together:
    """`function(*arguments)` in processes of their own, each with one thread, its rank, and a file for what it says."""

    def __init__(
        self,
        folder: Path,
        world: int,
        function: Callable[..., object],
        *arguments: Any,
        ranks: Collection[int] | None = None,
        patience: float = 20,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        launched = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "SEMISEG_PATIENCE": str(patience)}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(testing._free_port())}
        launched |= {"SEMISEG_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        self.said: dict[int, Path] = {}
        self.processes: dict[int, BaseProcess] = {}
        for rank in range(world) if ranks is None else ranks:
            self.said[rank] = folder / f"said-{rank}.txt"
            own = launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes[rank] = _CONTEXT.Process(target=_child, args=(own, self.said[rank], function, arguments))
        for process in self.processes.values():
            process.start()

    def wait(self, seconds: float = 60) -> tuple[list[int | None], list[str]]:
        """The exit codes and what was said; who does not end in time is killed, and has None."""
        ends = time.monotonic() + seconds
        codes = []
        for process in self.processes.values():
            process.join(max(0.0, ends - time.monotonic()))
            codes.append(process.exitcode)
            if process.exitcode is None:
                process.kill()
                process.join()
        return codes, [path.read_text(encoding="utf-8") for path in self.said.values()]

    def good(self, seconds: float = 120) -> list[str]:
        """What was said by processes that all end well."""
        codes, said = self.wait(seconds)
        assert codes == [0] * len(codes), "\n".join(said)
        return said


class Forked:
    """What `testing.check_processes` launches, forked too: a Python of its own would take seconds to import torch."""

    def __init__(self, case: testing.Case, rank: int, port: int) -> None:
        launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        launched |= {name: os.environ[name] for name in ("SEMISEG_CACHE",) if name in os.environ}
        self.said = case.folder / f"said-{rank}.txt"
        work = (launched, self.said, testing._three_steps, (case, "two processes"))
        self.process = _CONTEXT.Process(target=_child, args=work)
        self.process.start()

    def communicate(self, timeout: float) -> tuple[bytes, None]:
        self.process.join(timeout)
        return self.said.read_bytes(), None

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


def die() -> None:
    """Like a process that the system kills."""
    os.kill(os.getpid(), signal.SIGKILL)


def _child(launched: dict[str, str], said: Path, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ.update(launched)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    multiprocessing.set_start_method("fork", force=True)  # as outside of tests: of processes that read images
    try:
        function(*arguments)
    finally:  # multiprocessing leaves this out
        sys.stdout.flush()
        atexit._run_exitfuncs()

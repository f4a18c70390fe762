"""Whether the other processes of a run are there: one that is lost ends the run within a minute, with a sentence.

A collective cannot tell a process that is busy for hours from one that is gone, and its own time limit has to allow for
the hours. So a thread of each process keeps a connection to process 0, on which both sides say every few seconds that
they are alive, whatever their main threads are at. The system closes the connection of a process that was killed; the
one to a machine that is down, or to a process that was stopped, falls silent. Process 0 tells the others.
"""

import multiprocessing
import os
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import Protocol

from semiseg.types import InputError

PATIENCE = 45.0
"""Seconds of silence that mean a loss, and that processes wait for each other at the beginning."""
GRACE = 5.0
"""Seconds that this process has to end by itself after another one has failed: mostly it fails of the same cause."""
READ = 0.3
"""Seconds after a message to the others: unread, it is lost where the connection ends with what they were sending."""
BYE = b"bye"


class Store(Protocol):
    """Of torch.distributed's stores, what a meeting needs."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


def patience() -> float:
    """PATIENCE, or what the environment says.

    Raises:
        InputError: it says something that is not a number of seconds.
    """
    text = os.environ.get("SEMISEG_PATIENCE", str(PATIENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"SEMISEG_PATIENCE={text} is no number of seconds: give one above 0, such as {PATIENCE:g}.")
    return seconds


class Watch:
    """Connections to the other processes: of process 0 to all, of the others to process 0.

    Silence is counted in own beats, not by the clock: a run that is suspended as a whole goes on when it wakes.
    """

    def __init__(self, rank: int, world: int, links: dict[int, socket.socket], names: dict[int, str]) -> None:
        self.rank, self.world, self.links, self.names = rank, world, links, names
        self.patience = patience()
        self.beat = self.patience / 20
        self.lock = threading.Lock()
        self.verdict = threading.Event()
        self.sentence = ""
        """About a process that failed; about one that is lost the watch itself says it, and ends this process."""
        self.ending = False
        self.leaving = threading.Event()
        for link in links.values():
            link.setblocking(False)
        if hasattr(os, "register_at_fork"):
            # Processes that read images would hold the connection for seconds after a SIGKILL of this one.
            os.register_at_fork(after_in_child=self._close)
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    @classmethod
    def meet(cls, store: Store, host: str, rank: int, world: int) -> "Watch":
        """Waits for all processes, and begins to watch them.

        Args:
            store: where process 0 leaves the port that it listens at.
            host: the address of process 0.
            rank: of this process.
            world: their number.

        Raises:
            InputError: one did not come.
        """
        ends = time.monotonic() + patience()
        return cls._receive(store, world, ends) if rank == 0 else cls._join(store, host, rank, world, ends)

    @classmethod
    def _receive(cls, store: Store, world: int, ends: float) -> "Watch":
        token = secrets.token_hex(8)
        links: dict[int, socket.socket] = {}
        names: dict[int, str] = {}
        with _server() as server:
            store.set("watch", f"{server.getsockname()[1]} {token} {_name()}")
            while len(links) < world - 1:
                server.settimeout(max(0.01, ends - time.monotonic()))
                try:
                    link, _ = server.accept()
                    link.settimeout(1)
                    with link.makefile("r", encoding="utf-8") as lines:
                        given, number, name = lines.readline().rstrip("\n").split(" ", 2)
                except (OSError, ValueError):  # nobody, or not one of us
                    if time.monotonic() < ends:
                        continue
                    missing = [str(number) for number in range(1, world) if number not in links]
                    sentence = _did_not_come(f"process{'es' * (len(missing) > 1)} {', '.join(missing)}", world)
                    for other in links.values():
                        other.sendall(_message("lost", sentence))
                    time.sleep(READ)
                    raise InputError(sentence) from None
                if given == token:
                    links[int(number)], names[int(number)] = link, name
                else:
                    link.close()
        return cls(0, world, links, names)

    @classmethod
    def _join(cls, store: Store, host: str, rank: int, world: int, ends: float) -> "Watch":
        while not store.check(["watch"]):
            if time.monotonic() > ends:
                raise InputError(_did_not_come("process 0", world))
            time.sleep(0.05)
        port, token, name = store.get("watch").decode().split(" ", 2)
        try:
            link = socket.create_connection((host, int(port)), timeout=max(1.0, ends - time.monotonic()))
            link.sendall(f"{token} {rank} {_name()}\n".encode())
        except OSError as error:
            raise InputError(
                f"process 0 cannot be reached at {host}, port {port} ({error.strerror or error}): the machines of a "
                "run must be able to connect to each other at all ports."
            ) from error
        return cls(rank, world, {0: link}, {0: name})

    def fail(self, wait: float) -> str:
        """Tells the others that this process ends before its time.

        Returns:
            the sentence about another process that had failed before, if it comes within `wait` seconds, or "". Where
            another one was lost this does not return: the process ends.
        """
        if self.verdict.wait(wait) and self.ending:
            time.sleep(self.patience)
        self.leaving.set()
        self._tell(_message("failed", f"process {self.rank} of {self.world} ended: see what it said."))
        return self.sentence

    def leave(self) -> None:
        """Says goodbye: this process has done its part. After `fail` it is none."""
        if not self.leaving.is_set():
            self.leaving.set()
            self._tell(BYE + b"\n")

    def _listen(self) -> None:
        silence, parts = dict.fromkeys(self.links, 0), dict.fromkeys(self.links, b"")
        with selectors.DefaultSelector() as selector:
            for number, link in self.links.items():
                selector.register(link, selectors.EVENT_READ, number)
            while silence:
                self._tell(b"\n")
                heard, ends = set[int](), time.monotonic() + self.beat
                while silence and (left := ends - time.monotonic()) > 0:
                    for key, _ in selector.select(left):
                        number = key.data
                        heard.add(number)
                        received = self._received(number)
                        if not received:
                            self._lost(number, "broke off its connection: it was killed, or its machine is down")
                            return
                        *lines, parts[number] = (parts[number] + received).split(b"\n")
                        for line in filter(None, lines):
                            if line != BYE:
                                self._end(*line.decode().split(" ", 1))
                                return
                            selector.unregister(self.links[number])
                            del silence[number]
                for number in silence:
                    silence[number] = 0 if number in heard else silence[number] + 1
                    if silence[number] * self.beat >= self.patience:
                        how = "it was stopped, or its machine is down or cut off"
                        self._lost(number, f"has been silent for {self.patience:g} s: {how}")
                        return

    def _received(self, number: int) -> bytes:
        """What has come from a process; b"" where its connection is broken."""
        try:
            return self.links[number].recv(4096)
        except BlockingIOError:
            return b"\n"
        except OSError:
            return b""

    def _lost(self, number: int, how: str) -> None:
        self._end(
            "lost",
            f"process {number} of {self.world} ({self.names[number]}) {how}; when the cause is gone (often too little "
            "memory: see the system's log), give the same command again, and a run goes on from its last checkpoint.",
        )

    def _end(self, kind: str, sentence: str) -> None:
        """Ends this process, and before that, from process 0, the others; returns where it is ending by itself."""
        if self.leaving.is_set():
            return
        if self.rank == 0:
            self._tell(_message(kind, sentence))
        self.sentence, self.ending = sentence, kind == "lost"
        self.verdict.set()
        if kind == "failed":
            time.sleep(GRACE)
            if self.leaving.is_set():
                return
        # Past Python, whose main thread may wait in a collective for ever: like a kill, which a run is made for.
        with suppress(OSError):
            os.write(2, f"error: {f'in process {self.rank}: ' * (self.rank > 0)}{sentence}\n".encode())
        for child in multiprocessing.active_children():
            child.kill()  # what reads images would be left behind
        time.sleep(READ if self.rank == 0 else 0)
        os._exit(1)

    def _tell(self, message: bytes) -> None:
        with self.lock:
            for link in self.links.values():
                with suppress(OSError):  # what is wrong with it is found where it is read
                    link.send(message)

    def _close(self) -> None:
        for link in self.links.values():
            link.close()


def _message(kind: str, sentence: str) -> bytes:
    return f"{kind} {sentence}\n".encode()


def _did_not_come(who: str, world: int) -> str:
    return (
        f"{who} of {world} did not come within {patience():g} s: see what the missing said and launch all anew, with "
        "SEMISEG_PATIENCE=300 in the environment where machines take so long to start."
    )


def _name() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _server() -> socket.socket:
    """Listens at a free port, by IPv6 too where there is that."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # it may be switched off all the same
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))

"""What is told of work that may take minutes before there is anything else to tell."""

import sys
import time
from collections.abc import Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from semiseg import parallel

T = TypeVar("T")

PAUSE = 60.0
"""Seconds between lines where there is no bar."""


def tracked(items: Iterator[T], title: str, count: int) -> Iterator[T]:
    """The `count` items; meanwhile a terminal shows a bar, and a file gets a line a minute: of process 0, on stderr."""
    if parallel.rank() > 0:
        yield from items
        return
    if sys.stderr.isatty():
        yield from track(items, title, count, transient=True, console=Console(stderr=True))
        return
    told = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - told > PAUSE:
            print(f"{title}: {number} of {count}", file=sys.stderr, flush=True)
            told = time.monotonic()
        yield item

"""Images that lie inside a large file of many: a tar archive or a Parquet file, a shard for short."""

import os
import sys
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from semiseg.types import Changed, InputError

HANDLES = 64
"""Archives that a process holds open."""
GROUPS = 4
"""Row groups of Parquet files that a process keeps: images that are read in their order come from memory."""


@dataclass(frozen=True)
class Shard:
    """A tar archive, or a Parquet file with images in the column `column`; its size in bytes and time of change in ns.

    Of another size or time it is another file, whose images lie elsewhere.
    """

    path: str
    size: int
    changed: int
    column: str = ""

    @classmethod
    def of(cls, path: str, column: str = "") -> "Shard":
        """The file as it is now. Raises InputError where it cannot be looked at."""
        try:
            found = Path(path).stat()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): restore it.") from error
        return cls(path, found.st_size, found.st_mtime_ns, column)

    def check(self, now: os.stat_result) -> None:
        """Raises Changed where the file is not what it was."""
        if (now.st_size, now.st_mtime_ns) != (self.size, self.changed):
            raise Changed(f"{self.path} has changed since the run looked at it: restore it, or start again.")

    def gone(self, error: OSError) -> Changed:
        """What to raise where the file cannot be opened any more."""
        return Changed(f"{self.path} cannot be read any more ({error.strerror or error}): restore it.")

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class Packed:
    """An image inside a shard; it can be read like a Path, and its text names shard and image.

    at: offset and size in bytes in a tar archive; number of the row group, and row in it, in a Parquet file.
    """

    shard: Shard
    name: str
    at: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.shard.path}/{self.name}"

    @property
    def suffix(self) -> str:
        """Of the image's own name."""
        return PurePosixPath(self.name).suffix

    def read_bytes(self) -> bytes:
        """The image file. Raises InputError where it cannot be read, Changed where that is so of the whole shard."""
        try:
            data = self._from_parquet() if self.shard.column else self._from_tar()
        except OSError as error:
            raise InputError(f"{self} cannot be read ({error.strerror or error}): restore the file.") from error
        return data

    def _from_tar(self) -> bytes:
        offset, size = self.at
        handle = _handle(self.shard)
        self.shard.check(os.fstat(handle.number))  # each time: it may be written over while it is open
        data = handle.read(size, offset)
        if len(data) < size:
            raise InputError(f"{self} ends too early: fetch {self.shard} anew.")
        return data

    def _from_parquet(self) -> bytes:
        group, row = self.at
        try:
            self.shard.check(Path(self.shard.path).stat())
        except OSError as error:
            raise self.shard.gone(error) from error
        cell = _row_group(self.shard, group)[row].as_py()
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if data is None:
            raise InputError(f"{self} has no bytes in the column {self.shard.column}: remove the row.")
        return bytes(data)


File = Path | Packed
"""Where the bytes of an image are."""


class Handle:
    """A file to read parts of. It is closed when nobody holds it, so that no thread loses it while it reads.

    Processes that were forked may share one: a read moves nothing.
    """

    def __init__(self, path: str) -> None:
        flags = os.O_RDONLY
        if sys.platform == "win32":
            flags |= os.O_BINARY
        self.number = os.open(path, flags)
        self.alone = threading.Lock()

    def read(self, size: int, offset: int) -> bytes:
        if sys.platform == "win32":  # which has no pread
            with self.alone:
                os.lseek(self.number, offset, os.SEEK_SET)
                return os.read(self.number, size)
        return os.pread(self.number, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "number"):  # it could be opened
            os.close(self.number)


@lru_cache(maxsize=HANDLES)
def _handle(shard: Shard) -> Handle:
    try:
        return Handle(shard.path)
    except OSError as error:
        raise shard.gone(error) from error


def pyarrow_parquet() -> Any:
    """The module pyarrow.parquet. Raises InputError where it is not installed."""
    try:
        from pyarrow import parquet  # an optional extra
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'semiseg[parquet]'.") from error
    return parquet


@lru_cache(maxsize=GROUPS)
def _row_group(shard: Shard, number: int) -> Any:
    """The column of images of a row group, which is stored as one piece: a single image costs as much as all of it."""
    with pyarrow_parquet().ParquetFile(shard.path, metadata=_footer(shard)) as file:
        return file.read_row_group(number, columns=[shard.column], use_threads=False).column(0)


@lru_cache(maxsize=256)
def _footer(shard: Shard) -> Any:
    return pyarrow_parquet().read_metadata(shard.path)

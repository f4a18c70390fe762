"""Files that are whole or not there: written under another name beside their place, synced, then moved into it."""

import errno
import json
import math
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from semiseg.types import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write that takes the place of `path` when the block ends, and vanishes where it fails.

    Raises:
        InputError: the folder cannot be written or the disk is full; what stood at `path` is still there and good.
    """
    part = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")  # the suffix stays: some writers go by it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except InputError:
        raise
    except Exception as error:
        # torch and safetensors report a full disk in errors of their own.
        if not isinstance(error, OSError) and not any(word in str(error) for word in ("writ", "No space", "I/O")):
            raise
        kept = "the previous file is still good; " if path.is_file() else ""
        raise _unwritable(path, error, kept) from error
    finally:
        with suppress(OSError):  # it may never have come to be
            part.unlink()


def sweep(folder: Path) -> None:
    """Removes what `replacing` was writing below the folder when its process was killed."""
    for part in folder.rglob(".*"):
        if re.match(r"\.[0-9a-f]{12}\.", part.name):
            part.unlink(missing_ok=True)


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """A text file open at its end; the lines end as they are written.

    Raises:
        InputError: it cannot be written or the disk is full; a part of a line may be there.
    """
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        raise _unwritable(path, error, "") from error


def _unwritable(path: Path, error: Exception, kept: str) -> InputError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0].rstrip(".")
    if isinstance(error, FileExistsError | NotADirectoryError):
        reason = "a part of its path is a file"
    full = not isinstance(error, OSError) or error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "free some space or choose another folder" if full else "choose another folder"
    return InputError(f"{path} could not be written ({reason}): {kept}{advice}.")


def write_text(path: Path, text: str) -> None:
    """Replaces a text file at once: a reader finds the old text or the new one."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, value: object) -> None:
    """Writes JSON; see `finite`."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: object) -> object:
    """Plain values with null where a number is NaN or infinite: JSON has neither, and strict readers refuse them."""
    match value:
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value

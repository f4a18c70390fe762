"""Files that are whole or not there: written under another name beside their place, synced, then moved into it.

And the lock of a folder in which one process writes at a time, and files of the user's that are read with one sentence
about what is wrong with them.
"""

import errno
import json
import math
import os
import re
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO, TypeVar

from pydantic import BaseModel, ValidationError

from semiseg.types import InputError

if sys.platform != "win32":
    import fcntl

LOCK = "lock"
"""The file in a folder that `alone` locks; it goes when the block ends, and stays without a meaning after a crash."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write that takes the place of `path` when the block ends, and vanishes where it fails.

    Raises:
        InputError: the folder cannot be written or the disk is full; what stood at `path` is still there and good.
    """
    part = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")  # the suffix stays: some writers go by it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # as other new files: some writers leave theirs to the owner alone
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
def alone(folder: Path) -> Iterator[None]:
    """A block in which no other process enters a block of the same folder, which is made where it is not there.

    The system lets go of the lock when the process ends, however it ends. Where there are no locks there is none.

    Raises:
        InputError: another process is in such a block, or the folder cannot be written.
    """
    if sys.platform == "win32":
        yield
        return
    made, path = not folder.exists(), folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise _unwritable(path, error, "") from error
    with file:
        try:
            # Not flock: the processes that read images would inherit it, and hold it for seconds after a SIGKILL.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:
                raise BlockingIOError  # it went while we waited, and another process may have made a new one
        except BlockingIOError as error:
            raise InputError(f"{folder} is in use by another process: wait for it, or choose another --out.") from error
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)
                if made:
                    folder.rmdir()  # where nothing was written


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


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}): name another file or save it anew.") from None


_File = TypeVar("_File", bound=BaseModel)


def read_json(path: Path, kind: type[_File]) -> _File:
    """The content of a JSON file, checked.

    Raises:
        InputError: it cannot be read, or is not what `kind` says.
    """
    text = read_text(path)
    try:
        # Not model_validate_json, which takes twice the memory: a file of COCO's annotations has 450 MB.
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): correct it.") from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {where}{': ' * bool(where)}{first['msg']}; correct it.") from None

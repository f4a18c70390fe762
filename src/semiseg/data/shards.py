"""What lies in tar archives and Parquet files, as columns: a million images are a few hundred files and 60 MB.

A tar archive has no list of its members. It is gone through once, from header to header, and the list is kept in the
cache folder, known by the archive's path, size and time of change. A Parquet file has such a list at its end.

Sources: POSIX.1-2008, pax interchange format; GNU tar 1.35, basic tar format; the dtypes that the Hugging Face library
`datasets` writes for a column of images (a struct of `bytes` and `path`).
"""

import os
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.dtypes import StringDType
from numpy.typing import NDArray

from semiseg.data.cache import cache_dir
from semiseg.data.formats import IMAGE_SUFFIXES
from semiseg.data.packed import Handle, Shard, pyarrow_parquet
from semiseg.data.rows import Rows, Strings
from semiseg.files import replacing
from semiseg.progress import tracked
from semiseg.types import InputError, some

TAR, PARQUET = ".tar", ".parquet"
SHARDS = (TAR, PARQUET)
"""How the names of files with many images end, in lower case."""
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
LARGE_GROUP = 32 * 2**20
"""Bytes of images in a row group above which the user is told what drawing one of them costs."""

VERSION = 1
"""Of the kept lists."""
_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
"""What columns of images are called; img2dataset and webdataset take the file's suffix."""
_BLOCK = 512


@dataclass(frozen=True, eq=False)
class Index:
    """The images of a shard: names (n,) StringDType, at (n, 2) int64 as in `Packed`; a remark for the user, or ""."""

    shard: Shard
    names: Strings
    at: NDArray[np.int64]
    note: str


def packed_images(paths: Iterable[str], notes: list[str]) -> Rows:
    """The images of tar archives and Parquet files, in the order of the files and inside them.

    Raises:
        InputError: a file is none of the two, or is compressed, or Parquet's library is missing.
    """
    paths = list(paths)
    # In one thread: eight wait for each other at every header, and took twice as long on a local disk.
    listed = (_tar(path) if path.lower().endswith(TAR) else _parquet(path) for path in paths)
    found = list(tracked(listed, "listing archives", len(paths))) if paths else []
    notes += [index.note for index in found if index.note]
    lengths = [len(index.names) for index in found]
    names = np.concatenate([np.zeros(0, StringDType()), *(index.names for index in found)])
    at = np.concatenate([np.zeros((0, 2), np.int64), *(index.at for index in found)])
    place = np.repeat(np.arange(len(found), dtype=np.uint32), lengths)
    return Rows(names, np.zeros(len(names), StringDType()), tuple(index.shard for index in found), place, at)


# ----------------------------------------------------------------------------------------------------------------- tar


def _tar(path: str) -> Index:
    """The images of an archive, from the kept list if there is one."""
    shard = Shard.of(path)
    kept = _place(shard)
    if (found := _load(kept, shard)) is not None:
        return found
    found = _listed(shard)
    file = BytesIO()
    names = np.frombuffer("\0".join(found.names).encode(), np.uint8)  # no name has a NUL in it
    np.savez(file, names=names, at=found.at, note=np.array(found.note))
    with suppress(InputError), replacing(kept) as part:  # a full or read-only disk costs time, not the run
        part.write_bytes(file.getvalue())
    return found


def _place(shard: Shard) -> Path:
    key = repr((VERSION, str(Path(shard.path).absolute()), shard.size, shard.changed, sorted(IMAGE_SUFFIXES)))
    return cache_dir() / "shards" / f"{blake2b(key.encode(), digest_size=16).hexdigest()}.npz"


def _load(kept: Path, shard: Shard) -> Index | None:
    try:
        with np.load(BytesIO(kept.read_bytes()), allow_pickle=False) as file:
            at, note = file["at"], str(file["note"])
            names = file["names"].tobytes().decode().split("\0") if len(at) else []
            return Index(shard, np.array(names, StringDType()).reshape(len(at)), at, note)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None  # not there yet, or damaged: gone through anew


def _listed(shard: Shard) -> Index:
    names, at, note = list[str](), array("q"), ""
    try:
        for name, offset, size in _members(shard):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.rpartition("/")[2].startswith("."):
                names.append(name)
                at.extend((offset, size))
    except _Damaged as damage:
        note = f"{shard} is damaged or cut short {damage}: its {len(names)} images before are used; fetch it anew."
    except OSError as error:
        raise InputError(f"{shard} cannot be read ({error.strerror}): restore it.") from error
    return Index(shard, np.array(names, StringDType()), np.array(at).reshape(-1, 2), note)


class _Damaged(Exception):
    """Where, in words."""


def _members(shard: Shard) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size in bytes of each file in a tar archive.

    Written out, as `tarfile` takes 41 µs a file where each has two headers, as those of webdataset have, and this 7.

    Raises:
        InputError: it is no tar archive.
        _Damaged: from there on it cannot be read.
    """
    handle, at, name, size = Handle(shard.path), 0, "", -1
    buffer, start = b"", 0
    while at < shard.size:
        if not start <= at <= start + len(buffer) - _BLOCK:
            # A header, the short text that may follow it, and the header after that.
            buffer, start = handle.read(3 * _BLOCK, at), at
        head = buffer[at - start : at - start + _BLOCK]
        if not head.strip(b"\0"):  # the end, or that of one of several archives behind one another
            at += _BLOCK
            continue
        if not _is_header(head):
            if at == 0:
                raise InputError(f"{shard} is no tar archive, or is compressed: unpack it into a plain .tar.")
            raise _Damaged(f"at byte {at}")
        kind, own = head[156:157], _number(head[124:136])
        data = at + _BLOCK
        if kind in b"xXgLK":  # about the file that follows: pax records, records of all files, a long name or target
            if data + own > shard.size:
                raise _Damaged(f"at byte {at}")
            text = handle.read(own, data)
            if kind == b"L":
                name = _text(text)
            elif kind in b"xX":
                name, size = _records(shard, text, name, size)
            at = data + _padded(own)
            continue
        if kind == b"S":
            raise _sparse(shard)
        plain = kind in b"0\0" + b"7"
        if plain:
            name, own = name or _name(head), own if size < 0 else size
            if data + own > shard.size:
                raise _Damaged(f"in {name}")
            yield name.removeprefix("./"), data, own
        at = data + (_padded(own) if plain or kind not in b"123456" else 0)
        name, size = "", -1


def _is_header(head: bytes) -> bool:
    """Whether a block's checksum is right: the sum of its bytes, with spaces in the checksum's own place."""
    try:
        expected = int(head[148:156].strip(b"\0 "), 8)
    except ValueError:
        return False
    # Adler-32's lower half is the bytes' sum + 1 modulo 65521, and takes a fiftieth of the time of Python's sum.
    found = zlib.adler32(head[:148] + b" " * 8 + head[156:]) & 0xFFFF
    return len(head) == _BLOCK and found == (expected + 1) % 65521


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary form for what is too large for them."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise _Damaged("in a header, which gives no size") from None


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _text(field: bytes) -> str:
    # A name in another encoding is only shown: the file is found by its offset.
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _name(head: bytes) -> str:
    before = _text(head[345:500]) if head[257:263] == b"ustar\0" else ""  # GNU has other things in that place
    return f"{before}/{_text(head[:100])}" if before else _text(head[:100])


def _records(shard: Shard, text: bytes, name: str, size: int) -> tuple[str, int]:
    """The name and size that pax records give the next file: `LENGTH KEY=VALUE\\n`, LENGTH of the whole record."""
    if b"path=" not in text and b"size=" not in text:
        return name, size
    if b"GNU.sparse" in text:
        raise _sparse(shard)
    text = text.rstrip(b"\0")
    while text:
        length, _, _ = text.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(text):
            raise _Damaged("in a pax header")
        key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size" and value.isdigit():
            size = int(value)
        text = text[int(length) :]
    return name, size


def _sparse(shard: Shard) -> InputError:
    return InputError(f"{shard} holds sparse files, which are not read: make it anew without them.")


# ------------------------------------------------------------------------------------------------------------- Parquet


def _parquet(path: str) -> Index:
    parquet = pyarrow_parquet()
    shard = Shard.of(path)
    try:
        footer = parquet.read_metadata(path)
        column = _column(path, footer.schema.to_arrow_schema())
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): restore it.") from error
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    lengths = [group.num_rows for group in groups]
    number = [footer.schema.column(i).path for i in range(len(footer.schema))].index(column)  # of a struct, its parts'
    sizes = [group.column(number).total_uncompressed_size for group in groups]
    note = ""
    if groups and sum(sizes) / len(groups) > LARGE_GROUP:
        note = (
            f"{path} has row groups of {max(lengths)} images, {max(sizes) / 2**20:.0f} MiB, and one is read for each "
            "image that is drawn: write it with row groups of 100 rows or less."
        )
    at = np.stack([np.repeat(np.arange(len(groups)), lengths), _counted(lengths)], 1)
    names = np.fromiter((str(row) for row in range(len(at))), StringDType())
    return Index(Shard(shard.path, shard.size, shard.changed, column), names, at.astype(np.int64), note)


def _counted(lengths: list[int]) -> NDArray[np.int64]:
    """0 to n - 1 for each length n."""
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(length) for length in lengths)])


def _column(path: str, schema: Any) -> str:
    """The column of images: bytes, or a struct of `bytes` and their `path`; of several the one of a usual name."""
    import pyarrow.types as kinds

    def holds_bytes(kind: Any) -> bool:
        return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind))

    found = dict[str, str]()
    for field in schema:
        if holds_bytes(field.type):
            found[field.name] = field.name
        elif kinds.is_struct(field.type) and any(f.name == "bytes" and holds_bytes(f.type) for f in field.type):
            found[field.name] = f"{field.name}.bytes"
    if not found:
        raise InputError(f"{path} has no column of image files among {some(schema.names)}: name another file.")
    usual = next((name for name in _COLUMNS if name in found), None)
    if len(found) > 1 and usual is None:
        raise InputError(f"{path} has several columns of files ({some(found)}): call that of the images image.")
    return found[usual or next(iter(found))]

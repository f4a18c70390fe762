"""Pools in tar archives and Parquet files: every member where it is, and runs that end like those on plain files."""

import io
import json
import pickle
import sys
import tarfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from semiseg import testing
from semiseg.data import packed, shards
from semiseg.data.cache import cache_dir, open_image
from semiseg.data.check import check
from semiseg.data.formats import image_size, read_image
from semiseg.data.loader import Item, Steps, steps
from semiseg.data.packed import Packed
from semiseg.data.sampling import Phase, Stream, Timetable
from semiseg.data.shards import packed_images
from semiseg.data.splits import Data, DataConfig, load_data
from semiseg.engine.pseudo import pseudo_label
from semiseg.types import InferenceConfig, InputError

Members = Mapping[str, bytes]
Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))


def picture(number: int, suffix: str = ".png", size: tuple[int, int] = (6, 8)) -> bytes:
    """A small image that its number tells from others."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, {".png": "PNG", ".jpg": "JPEG"}[suffix])
    return file.getvalue()


def tar(path: Path, members: Members, kind: int = tarfile.PAX_FORMAT, changed: float = 0) -> Path:
    """Writes an archive as `tarfile` does; a time that is no whole number makes a pax header, as webdataset's are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), changed
            archive.addfile(info, io.BytesIO(data))
    return path


def images_of(*paths: Path) -> dict[str, bytes]:
    """Name and bytes of each image of shards, none with a remark."""
    notes: list[str] = []
    rows = packed_images(map(str, paths), notes)
    assert notes == []
    return {row.name if len(paths) == 1 else str(row.image): row.image.read_bytes() for row in rows}


def fails(match: str, function: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(InputError, match=match) as failed:
        function(*arguments)
    assert str(failed.value)[-1] == "."


# ----------------------------------------------------------------------------------------------------------------- tar


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("changed", [0, 1.5], ids=["one header", "two"])
def test_names_of_every_kind(tmp_path: Path, kind: int, changed: float) -> None:
    """Long names are written in a way of its own by each format; ustar has a hundred characters behind a folder."""
    if kind != tarfile.PAX_FORMAT:
        changed = int(changed)
    names = ["a.png", "sub/deeper/b.PNG", "with space and = sign.png", "x" * 96 + ".png", f"{'d' * 120}/{'e' * 90}.png"]
    if kind != tarfile.USTAR_FORMAT:
        names += [f"{'long/' * 60}{'f' * 150}.png", "grüße/ж日.png", "line\nbreak.png", f"{'ü' * 200}.png"]
    members = {name: picture(i) for i, name in enumerate(names)}
    path = tar(tmp_path / "a.tar", members, kind, changed)
    assert images_of(path) == members
    assert images_of(path) == members, "from the kept list"
    assert len(list((cache_dir() / "shards").iterdir())) == 1


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    path, loose = tmp_path / "a.tar", tmp_path / "b.jpg"
    loose.write_bytes(picture(0, ".jpg"))
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in ("folder", "000.txt", "000.json", "./000.jpg", "._000.jpg", ".hidden.png", "k/", "001.png"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name in ("folder", "k/") else tarfile.REGTYPE
            data = picture(1, ".jpg") if name.endswith("g") else b"{}" * 300
            info.size = 0 if info.isdir() else len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("p.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "t/" * 90 + "001.png"
            archive.addfile(info)
        archive.add(loose, "last.jpg")
    first = picture(1, ".jpg")
    assert images_of(path) == {"000.jpg": first, "001.png": first, "last.jpg": picture(0, ".jpg")}


def test_archives_behind_one_another(tmp_path: Path) -> None:
    parts = [tar(tmp_path / f"{i}.tar", {f"{i}.png": picture(i)}).read_bytes() for i in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    assert images_of(tmp_path / "all.tar") == {f"{i}.png": picture(i) for i in range(3)}


def test_sizes_that_octal_digits_do_not_hold(tmp_path: Path) -> None:
    """GNU's binary form, and the pax record that stands for it."""
    gnu = tar(tmp_path / "gnu.tar", {"a.png": picture(0), "b.png": picture(1)}, tarfile.GNU_FORMAT)
    block = bytearray(gnu.read_bytes())
    block[124:136] = b"\x80" + len(picture(0)).to_bytes(11, "big")
    gnu.write_bytes(with_checksum(block))
    assert list(images_of(gnu)) == ["a.png", "b.png"]
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = len(picture(0)), {"size": str(len(picture(0))), "comment": "c" * 2000}
        archive.addfile(info, io.BytesIO(picture(0)))
    assert images_of(tmp_path / "pax.tar") == {"a.png": picture(0)}


def with_checksum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


@pytest.mark.parametrize("cut", [-200, -512, 30], ids=["in a member", "whole members", "in a header"])
def test_an_archive_that_is_cut_short(tmp_path: Path, cut: int) -> None:
    """What came before is used, and the user is told."""
    path = tar(tmp_path / "a.tar", {f"{i}.png": picture(i, size=(20, 20)) for i in range(4)})
    with tarfile.open(path) as archive:
        last = archive.getmember("3.png")
    whole = path.read_bytes()
    path.write_bytes(whole[: last.offset_data + last.size + cut] if cut < 0 else whole[: last.offset + cut])
    for _ in ("gone through", "kept"):
        notes: list[str] = []
        rows = packed_images([str(path)], notes)
        assert rows.names.tolist() == ["0.png", "1.png", "2.png"]
        assert len(notes) == 1
        assert "a.tar is damaged or cut short" in notes[0]
        assert "3 images before are used" in notes[0]


def test_damage_inside_an_archive(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {f"{i}.png": picture(i) for i in range(3)})
    with tarfile.open(path) as archive:
        at = archive.getmember("1.png").offset
    data = bytearray(path.read_bytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    notes: list[str] = []
    assert packed_images([str(path)], notes).names.tolist() == ["0.png"]
    assert f"at byte {at}" in notes[0]
    data[at : at + 512] = with_checksum(data[at : at + 124] + b"99999999999\0" + data[at + 136 : at + 512])
    path.write_bytes(data)
    assert packed_images([str(path)], notes).names.tolist() == ["0.png"]
    assert "gives no size" in notes[1]
    head = data[at : at + 124] + b"\xff" * 12 + data[at + 136 : at + 512]
    head[156:157] = b"L"  # of a long name, larger than all disks
    data[at : at + 512] = with_checksum(head)
    path.write_bytes(data)
    assert packed_images([str(path)], notes).names.tolist() == ["0.png"]
    assert f"at byte {at}" in notes[2]


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    fails("a.tar is no tar archive, or is compressed", packed_images, [str(tmp_path / "a.tar")], [])
    fails("b.tar cannot be read", packed_images, [str(tmp_path / "b.tar")], [])
    (tmp_path / "c.tar").write_bytes(b"")
    assert len(packed_images([str(tmp_path / "c.tar")], [])) == 0
    path = tar(tmp_path / "d.tar", {"a.png": picture(0)})
    block = bytearray(path.read_bytes())
    block[156:157] = b"S"
    path.write_bytes(with_checksum(block))
    fails("d.tar holds sparse files", packed_images, [str(path)], [])


def test_the_list_is_made_once_and_anew_when_the_archive_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tar(tmp_path / "a.tar", {"a.png": picture(0)})
    old = packed_images([str(path)], [])
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_members", lambda shard: pytest.fail("it is kept"))
        assert packed_images([str(path)], []).names.tolist() == ["a.png"]
    tar(path, {"b.png": picture(1), "c.png": picture(2)})
    assert packed_images([str(path)], []).names.tolist() == ["b.png", "c.png"]
    fails("a.tar has changed since the run looked at it", old[0].image.read_bytes)
    packed._handle.cache_clear()
    fails("a.tar has changed since the run looked at it", old[0].image.read_bytes)
    for kept in (cache_dir() / "shards").iterdir():
        kept.write_bytes(kept.read_bytes()[:-30])
    assert packed_images([str(path)], []).names.tolist() == ["b.png", "c.png"], "a damaged list is made anew"


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    path = tar(tmp_path / "a.tar", {"a.png": picture(0)})
    assert images_of(path) == images_of(path) == {"a.png": picture(0)}


def test_lists_that_several_make_at_once(tmp_path: Path) -> None:
    paths = [tar(tmp_path / f"{i}.tar", {f"{i}-{j}.png": picture(j) for j in range(20)}) for i in range(3)]
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append(packed_images(map(str, paths), []).names.tolist()))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(names == found[0] for names in found)
    assert len(list((cache_dir() / "shards").iterdir())) == 3, "and nothing half written stays"


def test_few_handles_are_open(tmp_path: Path) -> None:
    packed._handle.cache_clear()
    paths = [tar(tmp_path / f"{i}.tar", {"a.png": picture(i)}) for i in range(packed.HANDLES + 5)]
    rows = packed_images(map(str, paths), [])
    before = open_files(tmp_path)
    for _ in range(2):
        assert [row.image.read_bytes() for row in rows] == [picture(i) for i in range(len(paths))]
    assert (before, open_files(tmp_path)) == (0, packed.HANDLES)
    packed._handle.cache_clear()
    assert open_files(tmp_path) == 0


def open_files(folder: Path) -> int:
    numbers = Path("/proc/self/fd")
    if not numbers.exists():
        pytest.skip("open files are counted as Linux lists them")
    links = [str(link.readlink()) for link in numbers.iterdir() if link.exists()]
    return sum(link.startswith(f"{folder}/") and link.endswith(".tar") for link in links)


# ------------------------------------------------------------------------------------------------------------- Parquet


@pytest.fixture
def parquet(tmp_path: Path) -> Save:
    """Writes columns into a Parquet file with row groups of `rows`."""
    arrow = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    from pyarrow import parquet as writer

    def save(columns: Mapping[str, list[Any]], rows: int = 3, name: str = "pool.parquet", **types: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {key: arrow.array(cells, types[key]() if key in types else None) for key, cells in columns.items()}
        writer.write_table(arrow.table(arrays), path, row_group_size=rows)
        return path

    return save


def as_datasets_does(count: int) -> list[dict[str, Any]]:
    return [{"bytes": picture(i), "path": f"{i}.png" if i % 2 else None} for i in range(count)]


def test_columns_of_images(parquet: Save) -> None:
    import pyarrow as pa  # it is there: the fixture skips otherwise

    files = [picture(i) for i in range(8)]
    expected = {str(i): file for i, file in enumerate(files)}
    structs = parquet({"label": [0] * 8, "image": as_datasets_does(8), "mask": as_datasets_does(8)})
    assert images_of(structs) == expected
    assert images_of(parquet({"jpg": files, "text": ["t"] * 8}, rows=8)) == expected
    assert images_of(parquet({"md5": [b"m"] * 8, "jpg": files}, rows=8)) == expected
    assert images_of(parquet({"a.b": files}, rows=1, **{"a.b": pa.large_binary})) == expected
    assert images_of(parquet({"jpg": files[:0]}, jpg=pa.binary)) == {}


def test_parquet_files_without_images(parquet: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet({"text": ["a"], "size": [1]})
    fails("has no column of image files among text, size", packed_images, [str(path)], [])
    path = parquet({"a": [b"1"], "b": [b"2"]})
    fails("has several columns of files .a, b.: call that of the images image", packed_images, [str(path)], [])
    path.write_bytes(path.read_bytes()[:-9])
    fails("pool.parquet cannot be read as Parquet", packed_images, [str(path)], [])
    path = parquet({"image": [{"bytes": None, "path": "a.png"}, {"bytes": picture(0), "path": None}]})
    rows = packed_images([str(path)], [])
    fails("parquet/0 has no bytes in the column image.bytes", rows[0].image.read_bytes)
    assert rows[1].image.read_bytes() == picture(0)
    parquet({"image": as_datasets_does(9)})
    fails("has changed since the run looked at it", rows[0].image.read_bytes)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(r"pip install 'semiseg\[parquet\]'", packed_images, [str(path)], [])


def test_large_row_groups_are_named(parquet: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path, notes = parquet({"image": as_datasets_does(8)}, rows=4), list[str]()
    monkeypatch.setattr(shards, "LARGE_GROUP", 500)
    packed_images([str(path)], notes)
    assert len(notes) == 1
    assert "row groups of 4 images" in notes[0]


def test_a_row_group_is_read_once_for_images_in_their_order(parquet: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = packed_images([str(parquet({"image": as_datasets_does(12)}, rows=4))], [])
    packed._row_group.cache_clear()
    assert [row.image.read_bytes() for row in rows] == [picture(i) for i in range(12)]
    assert packed._row_group.cache_info().misses == 3


# ---------------------------------------------------------------------------------------------------------- as a pool


@pytest.fixture
def case(tmp_path: Path) -> testing.Case:
    return testing.Case("fixmatch", tmp_path / "case")


def pool(case: testing.Case, extra: object, **options: object) -> Data:
    """The data of the case with further images."""
    config = case.data().config
    return load_data(DataConfig.model_validate({**config.model_dump(), "extra": extra, **options}))


@pytest.fixture
def kinds(case: testing.Case, parquet: Save, tmp_path: Path) -> dict[str, Data]:
    """The same ten further images as files, in archives, and in Parquet files; the fourth is damaged."""
    members = {f"{i:02}.png": picture(i, size=(40, 48)) for i in range(10)}
    members["03.png"] = members["03.png"][:100]
    (tmp_path / "loose").mkdir()
    for name, data in members.items():
        (tmp_path / "loose" / name).write_bytes(data)
    halves = [dict(list(members.items())[i : i + 5]) for i in (0, 5)]
    for i, half in enumerate(halves):
        tar(tmp_path / f"tars/deep/{i}.tar", {**half, f"{i}.json": b"{}"}, changed=0.5)
        cells = [{"bytes": data, "path": name} for name, data in half.items()]
        parquet({"image": cells}, rows=2, name=f"tables/{i}.parquet")
    return {kind: pool(case, str(tmp_path / kind)) for kind in ("loose", "tars", "tables")}


def batches(data: Data, workers: int = 0) -> list[Item]:
    stream = Stream(data.unlabelled, (Phase((32, 32), 4),), strong=1)
    dataset = Steps({"unlabelled": stream}, Timetable(stream.phases, 40), data, 0)
    return list(steps(dataset, 0, workers, False))


def test_a_run_draws_the_same_batches_from_files_archives_and_tables(kinds: dict[str, Data]) -> None:
    """Also with workers; a damaged image is replaced by the next row and named."""
    own = len(kinds["loose"].unlabelled) - 10
    found = {kind: batches(data) for kind, data in kinds.items()}
    worked = [("tars", batches(kinds["tars"], 2)), ("tables", batches(kinds["tables"], 1))]
    for kind, items in (*found.items(), *worked):
        for item, other in zip(items, found["loose"], strict=True):
            mine, theirs = (vars(i.batches["unlabelled"]) for i in (item, other))
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs), kind
        skipped = {path: why for item in items for path, why in item.skipped.items()}
        assert len(skipped) == 1
        assert next(iter(skipped)).endswith({"tables": "0.parquet/3"}.get(kind, "03.png"))
    drawn = {int(row) for item in found["loose"] for row in item.batches["unlabelled"].row}
    assert drawn == set(range(own + 10)) - {own + 3}


def test_rows_of_several_places(kinds: dict[str, Data], tmp_path: Path) -> None:
    data = kinds["tars"]
    rows, loose = data.unlabelled, kinds["loose"].unlabelled
    own = len(rows) - 10
    assert len({str(place) for place in rows.places}) == 3
    assert rows.names[own] == rows[own].name == str(rows[own].image) == f"{tmp_path}/tars/deep/0.tar/00.png"
    assert rows.names[:own].tolist() == loose.names[:own].tolist() == [str(row.image) for row in rows[:own]]
    assert [row.image.read_bytes() for row in rows] == [row.image.read_bytes() for row in loose]
    turned = rows[::-1]
    assert turned[9].image == rows[own].image
    both = data.labelled + rows[[own + 1]] + kinds["tables"].unlabelled[-2:] + rows[:1]
    assert [row.image.suffix for row in both[-4:]] == [".png", "", "", ".png"]
    assert both[len(data.labelled)].image == rows[own + 1].image
    assert both[-1].image == rows[0].image
    assert both.masked.tolist() == [True] * len(data.labelled) + [False] * 4
    copy = pickle.loads(pickle.dumps(both))
    assert list(copy) == list(both)


def test_images_in_shards_are_read_like_files(kinds: dict[str, Data]) -> None:
    files, members = (list(kinds[kind].unlabelled[-6:]) for kind in ("loose", "tars"))
    for file, member in zip(files, members, strict=True):
        assert isinstance(member.image, Packed)
        assert image_size(member.image) == image_size(file.image) == (40, 48)
        assert np.array_equal(read_image(member.image, 3), read_image(file.image, 3))
        resized: list[NDArray[Any]] = [open_image(row, 3, (20, 24), cache=True) for row in (file, member, member)]
        assert all(np.array_equal(pixels, resized[0]) for pixels in resized)
    assert len(list((cache_dir() / "resized").rglob("*.npy"))) == 12
    fails(r"0.tar/03.png: cannot be decoded", read_image, kinds["tars"].unlabelled[-7].image, 3)


def test_check_looks_into_shards(kinds: dict[str, Data]) -> None:
    reports = {kind: check(data) for kind, data in kinds.items()}
    assert all(report.images == reports["loose"].images for report in reports.values())
    assert all(report.sizes == reports["loose"].sizes for report in reports.values())
    assert any("cannot be read are passed over" in w and "0.tar/03.png" in w for w in reports["tars"].warnings)


@pytest.mark.parametrize(("kind", "file"), [("tars", "deep/1.tar"), ("tables", "1.parquet")])
@pytest.mark.parametrize("gone", [False, True])
def test_a_shard_that_changes_ends_the_run(
    kinds: dict[str, Data], tmp_path: Path, kind: str, file: str, gone: bool
) -> None:
    """Its images are not passed over as damaged ones are: others may be in their places."""
    data, path = kinds[kind], tmp_path / kind / file
    batches(data)
    if gone:
        path.unlink()
        packed._handle.cache_clear()
    else:
        with path.open("ab") as end:
            end.write(bytes(512))
    sentence = f"{path.name} cannot be read any more" if gone else f"{path.name} has changed since the run looked at it"
    fails(sentence, batches, data)
    net, labels = Seen(nn.Conv2d(3, 3, 1).double()), tmp_path / "labels"
    fails(
        sentence, pseudo_label, net, data.unlabelled, data, labels, InferenceConfig(), torch.device("cpu")
    )  # fmt: skip


def test_pseudo_labels_of_shards(kinds: dict[str, Data], tmp_path: Path) -> None:
    """They are those of the same files, and a student draws them like those."""
    torch.manual_seed(0)
    net, found = nn.Conv2d(3, 3, 1).double(), {}
    for kind, data in kinds.items():
        teach = partial(pseudo_label, Seen(net), data.unlabelled, data, tmp_path / kind / "labels", InferenceConfig())
        rows, report = teach(torch.device("cpu"))
        assert len(report.failed) == 1
        assert len(rows) == len(data.unlabelled) - 1
        assert list(teach(torch.device("cpu"))[0]) == list(rows)
        assert all(row.mask and row.mask.is_relative_to(tmp_path / kind) for row in rows)
        both = data.labelled + rows
        assert [row.code is None for row in both] == [True] * len(data.labelled) + [False] * len(rows)
        stream = Stream(both, (Phase((32, 32), len(both)),))
        item = Steps({"labelled": stream}, Timetable(stream.phases, len(both)), data, 0)[0]
        assert isinstance(item, Item)
        found[kind] = item.batches["labelled"]
    for kind in ("tars", "tables"):
        assert torch.equal(found[kind].image, found["loose"].image)
        assert torch.equal(found[kind].mask, found["loose"].mask)


class Seen(nn.Module):
    """A network of one layer, on images as they are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layer(image.double() / 255)
        return logits


class Killed(BaseException):
    """Ends a run at once."""


@pytest.mark.parametrize("method", ["fixmatch", "selftraining"])
def test_a_run_over_archives(kinds: dict[str, Data], case: testing.Case, method: str) -> None:
    """Killed and gone on with, it ends like one over the same files, bit for bit."""
    case = replace(case, method=method, options={"least_pixels": 8} if method == "selftraining" else {})
    killed = set[Path]()

    def once(moment: testing.Moment) -> dict[str, torch.Tensor]:
        if moment.clock.step == 5 and moment.stage not in killed:
            killed.add(moment.stage)
            raise Killed
        return moment.go()

    short: dict[str, Any] = {"steps": 6, "evaluations": 1}
    whole, resumed = testing.run(case, "loose", data=kinds["loose"], **short), None
    while resumed is None:
        with suppress(Killed):
            resumed = testing.run(case, "tars", once, data=kinds["tars"], **short)
    assert len(killed) == (2 if method == "selftraining" else 1)
    assert whole.net.keys() == resumed.net.keys()
    assert all(torch.equal(tensor, resumed.net[name]) for name, tensor in whole.net.items())


# --------------------------------------------------------------------------------------------------- where it may lie


def test_places_of_shards(case: testing.Case, tmp_path: Path) -> None:
    alone = len(case.data().unlabelled)
    path = tar(tmp_path / "a/1.tar", {"a.png": picture(0), "b.png": picture(1)})
    assert len(pool(case, str(path)).unlabelled) == alone + 2
    data = pool(case, str(path.parent))
    assert len(data.unlabelled) == alone + 2
    assert f"The 2 images of {path.parent} are among the unlabelled ones (data.extra)." in data.notes
    assert "with 2 further images" in data.family
    (path.parent / "loose.png").write_bytes(picture(5))
    data = pool(case, str(path.parent))
    assert len(data.unlabelled) == alone + 1
    assert any("1.tar is not read: name it in data.extra" in note for note in data.notes)
    assert len(pool(case, [str(path), str(tar(tmp_path / "2.tar", {"a.png": picture(0)}))]).unlabelled) == alone + 3
    fails("share images", pool, case, [str(path.parent), str(path)])
    tar(tmp_path / "none/1.tar", {"a.txt": b""})
    fails("1.tar holds no image", pool, case, str(tmp_path / "none"))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/1.tar.gz").write_bytes(b"")
    fails("1.tar.gz is compressed", pool, case, str(tmp_path / "packed"))
    fails("1.tar.gz is compressed", pool, case, str(tmp_path / "packed/1.tar.gz"))
    (tmp_path / "a.zip").write_bytes(b"")
    fails("a.zip is no file with images: name a folder, a .tar or a .parquet", pool, case, str(tmp_path / "a.zip"))


@pytest.mark.parametrize("layout", ["folder", "splits"])
def test_shards_in_the_data_folder(tmp_path: Path, layout: str) -> None:
    root, inside = tmp_path / "data", "" if layout == "folder" else "train/"
    for i in range(3):
        for kind in ("images", "masks")[: 1 + (i < 2)]:
            (root / kind / inside).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 8), i, np.uint8)).save(root / f"{kind}/{inside}{i}.png")
    (root / "classes.json").write_text(json.dumps({"classes": ["a", "b", "c"]}))
    tar(root / "images/unlabelled/more/1.tar", {"a.png": picture(0), "b.png": picture(1)})
    tar(root / "images/backup.tar", {"a.png": picture(0)})
    config = DataConfig.model_validate({"root": str(root), "format": layout})
    data = load_data(config)
    assert [row.image.name for row in data.unlabelled] == ["2.png", "a.png", "b.png"]
    (root / "images/unlabelled/u.png").write_bytes(picture(2))
    data = load_data(config)
    assert len(data.unlabelled) == 2
    assert any("1.tar is not read" in note for note in data.notes)

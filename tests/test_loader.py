"""From the disk to batches: the same whatever reads them, whatever is damaged, wherever a run begins."""

import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semiseg.data.loader import MOST_SKIPPED, Item, Steps, first_step, steps
from semiseg.data.rows import Rows
from semiseg.data.sampling import Phase, Stream, Timetable, draws
from semiseg.data.splits import Data, DataConfig, load_data
from semiseg.testing import CLASSES, write_data
from semiseg.types import IGNORE, VIEW, InputError, Labelled, Unlabelled

TOTAL = 6


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """4 labelled and 8 unlabelled images of 40x48 px; every one has a mask on the disk."""
    write_data(tmp_path / "data")
    return load_data(DataConfig(root=str(tmp_path / "data"), format="splits", labelled=4))


def dataset(data: Data, batch: int = 4, seed: int = 0, total: int = TOTAL, strong: int = 2) -> Steps:
    phases = (Phase((24, 56), batch),)
    streams = {"labelled": Stream(data.labelled, phases), "unlabelled": Stream(data.unlabelled, phases, strong)}
    return Steps(streams, Timetable(phases, total * batch), data, seed)


def items(dataset: Steps, start: int = 0, workers: int = 0) -> list[Item]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # fewer cores than workers
        return list(steps(dataset, start, workers, pin=False))


def assert_same(one: Item, other: Item) -> None:
    assert one.skipped == other.skipped
    assert one.batches.keys() == other.batches.keys()
    for name, batch in one.batches.items():
        assert type(batch) is type(other.batches[name])
        for field in fields(batch):
            a, b = getattr(batch, field.name), getattr(other.batches[name], field.name)
            assert (a is None) == (b is None)
            if a is None:
                continue
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, err_msg=f"{name}.{field.name}")


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def unlabelled(item: Item) -> Unlabelled:
    batch = item.batches["unlabelled"]
    assert isinstance(batch, Unlabelled)
    return batch


def test_a_batch(data: Data) -> None:
    item = items(dataset(data))[0]
    labelled = item.batches["labelled"]
    assert isinstance(labelled, Labelled)
    assert labelled.image.shape == (4, 3, 24, 56)
    assert labelled.image.dtype == labelled.mask.dtype == torch.uint8
    assert labelled.mask.shape == labelled.valid.shape == (4, 24, 56)
    assert set(labelled.mask.unique().tolist()) <= {*range(len(CLASSES)), IGNORE}
    assert (labelled.mask[~labelled.valid] == IGNORE).all()
    assert not labelled.valid.all()  # 48 px are less than 56 at a scale below 1.16
    assert labelled.table.shape == (4, 0, len(VIEW))

    batch = unlabelled(item)
    assert batch.image.shape == (4, 3, 24, 56)
    assert batch.table.shape == (4, 2, len(VIEW))
    assert batch.table.dtype == torch.float32
    assert 0 <= batch.table.min() < batch.table.max() < 1
    assert len(batch.table.unique()) == batch.table.numel()
    assert (batch.partner != torch.arange(4)).all()
    assert item.skipped == {}


def test_strong_views_of_labelled_images(data: Data) -> None:
    """Their numbers come with the batch, and leave image, mask and crop as they are without them."""
    phases = (Phase((24, 56), 4),)
    plain, strong = (Steps({"x": Stream(data.labelled, phases, s)}, Timetable(phases, 8), data, 0) for s in (0, 2))
    for one, other in zip(items(plain), items(strong), strict=True):
        before, after = one.batches["x"], other.batches["x"]
        assert isinstance(before, Labelled)
        assert after.table.shape == (4, 2, len(VIEW))
        assert len(after.table.unique()) == after.table.numel()
        assert_same(Item({"x": before}, {}), Item({"x": replace(after, table=before.table)}, {}))


def test_a_batch_is_that_of_the_draws(data: Data) -> None:
    source = dataset(data)
    for step, item in enumerate(items(source)):
        for name, batch in item.batches.items():
            drawn = draws(source.streams[name], source.timetable, name, 0, step)
            np.testing.assert_array_equal(batch.row, drawn.rows)
            if isinstance(batch, Unlabelled):
                np.testing.assert_array_equal(batch.partner, drawn.partners)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_matter(data: Data, workers: int) -> None:
    spoil(data.unlabelled[2].image)
    for one, other in zip(items(dataset(data)), items(dataset(data), workers=workers), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("start", [1, TOTAL - 1, TOTAL])
def test_to_resume_is_to_start_later(data: Data, start: int) -> None:
    later = items(dataset(data), start)
    assert len(later) == TOTAL - start
    for one, other in zip(items(dataset(data))[start:], later, strict=True):
        assert_same(one, other)


def test_a_sample_depends_on_its_position_only(data: Data) -> None:
    """The fourth sample of a stream is the same, crop and uniforms, whether batches have 2 images or 4."""

    def samples(batch: int) -> Iterator[tuple[torch.Tensor, ...]]:
        for item in items(dataset(data, batch)):
            b = unlabelled(item)
            yield from zip(b.image, b.valid, b.table, b.row, strict=True)

    for one, other in zip(islice(samples(2), 12), samples(4), strict=False):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_another_seed_gives_other_batches(data: Data) -> None:
    one, other = (unlabelled(items(dataset(data, seed=seed))[0]) for seed in (0, 1))
    assert not torch.equal(one.table, other.table)
    assert not torch.equal(one.image, other.image)


def test_masks_of_unlabelled_images_are_never_opened(data: Data) -> None:
    before = items(dataset(data))
    labelled = {row.mask for row in data.labelled}
    masks = [path for path in (Path(data.labelled.root) / "masks").rglob("*.png") if path not in labelled]
    assert len(masks) > 8
    for path in masks:
        path.unlink()
    for one, other in zip(before, items(dataset(data)), strict=True):
        assert_same(one, other)


# ---- what cannot be read -----------------------------------------------------------------------------------------


def test_a_damaged_unlabelled_image_is_replaced_by_the_next_row(data: Data) -> None:
    whole = items(dataset(data))
    for number in (2, 3, 7):
        spoil(data.unlabelled[number].image)
    next_readable = {2: 4, 3: 4, 7: 0}
    seen: dict[str, str] = {}
    for before, after in zip(whole, items(dataset(data)), strict=True):
        rows = unlabelled(before).row.tolist()
        assert unlabelled(after).row.tolist() == [next_readable[r] if r in next_readable else r for r in rows]
        for slot, row in enumerate(rows):
            if row not in next_readable:
                assert torch.equal(unlabelled(before).image[slot], unlabelled(after).image[slot])
        assert_same(replace_unlabelled(before, after), after)
        seen |= after.skipped
    assert seen.keys() == {str(data.unlabelled[number].image) for number in (2, 3, 7)}
    assert all(path in reason for path, reason in seen.items())


def replace_unlabelled(before: Item, after: Item) -> Item:
    """Everything but the replaced images is as it was: chance belongs to the position."""
    old, new = unlabelled(before), unlabelled(after)
    batch = replace(old, image=new.image, valid=new.valid, row=new.row)
    return Item({**before.batches, "unlabelled": batch}, after.skipped)


def test_a_missing_unlabelled_image_is_replaced_too(data: Data) -> None:
    data.unlabelled[0].image.unlink()
    rows = [row for item in items(dataset(data)) for row in unlabelled(item).row.tolist()]
    assert 0 not in rows
    assert rows.count(1) > rows.count(2)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_in_a_row_end_the_run(data: Data, workers: int) -> None:
    lost = Rows.of(data.unlabelled.root, [f"images/train/lost-{i}.png" for i in range(MOST_SKIPPED)])
    good = data.unlabelled[:1]
    almost = replace(data, unlabelled=(lost[:-1] + good))
    assert (unlabelled(items(dataset(almost, total=1), workers=workers)[0]).row == MOST_SKIPPED - 1).all()
    with pytest.raises(InputError, match=r"lost-\d+\.png and the 99 unlabelled images before it cannot be read"):
        items(dataset(replace(data, unlabelled=lost)), workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("column", ["image", "mask"])
def test_a_damaged_labelled_file_ends_the_run(data: Data, column: str, workers: int) -> None:
    path = getattr(data.labelled[1], column)
    spoil(path)
    with pytest.raises(InputError, match=path.name):
        items(dataset(data), workers=workers)


def test_a_mask_of_another_size_ends_the_run(data: Data) -> None:
    row = data.labelled[0]
    Image.fromarray(np.zeros((40, 47), np.uint8)).save(row.mask)
    with pytest.raises(InputError, match="47x40 px where its image"):
        items(dataset(data))


# ---- depth and channels ------------------------------------------------------------------------------------------


def test_8_and_16_bit_meet(data: Data) -> None:
    """One image of 16 bit makes its batch 16 bit; white stays white."""
    for row in data.unlabelled[::2]:
        Image.fromarray(np.full((40, 48), 65535, np.uint16)).save(row.image)
    for row in data.unlabelled[1::2]:
        Image.fromarray(np.full((40, 48), 255, np.uint8)).save(row.image)
    for item in items(dataset(data, batch=8)):
        batch = unlabelled(item)
        assert batch.image.dtype == torch.uint16
        assert (batch.image.to(torch.int32).amin(1)[batch.valid] == 65535).all()


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(data: Data, tmp_path: Path, channels: int) -> None:
    config = data.config.model_copy(update={"channels": channels})
    for path in (tmp_path / "data" / "images" / "train").glob("*.png"):
        np.save(path.with_suffix(".npy"), np.full((40, 48, channels), 7, np.uint8))
        path.unlink()
    other = load_data(config)
    for item in items(dataset(other)):
        assert unlabelled(item).image.shape == (4, channels, 24, 56)


def test_images_are_resized_before_the_crop(data: Data) -> None:
    """At half the size a crop of the whole image has a quarter of its pixels."""
    config = data.config.model_copy(update={"size": (20, 24), "scale": (1.0, 1.0)})
    item = items(dataset(replace(data, config=config)))[0]
    assert (unlabelled(item).valid.sum((1, 2)) == 20 * 24).all()


def test_first_step_is_step_0(data: Data) -> None:
    source = dataset(data)
    assert_same(Item(first_step(source.streams, data, 0), {}), items(source)[0])

"""From rows to batches. Item t of the data set is step t: to resume is to start later, and workers cannot matter."""

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from semiseg import parallel
from semiseg.data.cache import open_image, open_mask, open_pair, open_soft
from semiseg.data.rows import Row
from semiseg.data.sampling import Draw, Stream, Timetable, draws
from semiseg.data.splits import Data
from semiseg.data.transforms import geometry
from semiseg.types import VIEW, Changed, InputError, Labelled, Unlabelled

MOST_SKIPPED = 100
"""Unreadable unlabelled files in a row that end the run."""


@dataclass(frozen=True)
class Item:
    """One step's batches by stream name, and the unlabelled files that could not be read, each with the reason."""

    batches: dict[str, Labelled | Unlabelled]
    skipped: dict[str, str]

    def pin_memory(self) -> "Item":
        return Item({name: batch.pin_memory() for name, batch in self.batches.items()}, self.skipped)


class Steps(Dataset["Item | InputError"]):
    """Item t holds the batches of step t, or what is wrong with its files: a worker would bury an exception.

    Of several processes each has its block of every batch.
    """

    def __init__(
        self, streams: Mapping[str, Stream], timetable: Timetable, data: Data, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.streams, self.timetable, self.data, self.seed = dict(streams), timetable, data, seed
        self.rank, self.world = rank, world

    def __getitem__(self, step: int) -> Item | InputError:
        try:
            return self._item(step)
        except InputError as error:
            return error

    def _item(self, step: int) -> Item:
        batches: dict[str, Labelled | Unlabelled] = {}
        skipped: dict[str, str] = {}
        for name, stream in self.streams.items():
            draw = draws(stream, self.timetable, name, self.seed, step).block(self.rank, self.world)
            batches[name] = self._labelled(stream, draw) if stream.labelled else self._unlabelled(stream, draw, skipped)
        return Item(batches, skipped)

    def _labelled(self, stream: Stream, draw: Draw) -> Labelled:
        samples, tables = [], []
        for number, key, (y, x) in zip(draw.rows, draw.keys, draw.centres.tolist(), strict=True):
            row = stream.rows[int(number)]
            image, mask = self._open_pair(row) if stream.images else self._open_mask(row)
            if stream.top > 1:
                mask = torch.cat([mask[None], self._open_soft(row, mask, stream.top)])
            centre = (y, x) if y >= 0 else None
            rng = np.random.default_rng(key)
            samples.append(self._crop(image, mask, draw, rng, centre))
            tables.append(_table(stream, rng))
        images, masks, valid = zip(*samples, strict=True)
        mask, soft = torch.stack(masks), None
        if stream.top > 1:
            mask, soft = mask[:, 0], mask[:, 1:]
        table, rows = torch.from_numpy(np.stack(tables)), torch.from_numpy(draw.rows)
        return Labelled(_stack(images), mask, torch.stack(valid), table, rows, soft)

    def _unlabelled(self, stream: Stream, draw: Draw, skipped: dict[str, str]) -> Unlabelled:
        samples, tables, rows = [], [], []
        for number, key in zip(draw.rows, draw.keys, strict=True):
            number, image = self._readable(stream, int(number), skipped)
            rng = np.random.default_rng(key)
            samples.append(self._crop(image, None, draw, rng))
            tables.append(_table(stream, rng))
            rows.append(number)
        images, _, valid = zip(*samples, strict=True)
        return Unlabelled(
            _stack(images),
            torch.stack(valid),
            torch.from_numpy(np.stack(tables)),
            torch.from_numpy(draw.partners),
            torch.tensor(rows),
        )

    def _readable(self, stream: Stream, number: int, skipped: dict[str, str]) -> tuple[int, Tensor]:
        """The row, or the next one that can be read: the same for every run, whatever was read before."""
        for offset in range(MOST_SKIPPED):
            candidate = (number + offset) % len(stream.rows)
            row = stream.rows[candidate]
            try:
                return candidate, self._open_image(row)
            except Changed:
                raise
            except InputError as error:
                skipped[str(row.image)] = str(error)
        raise InputError(
            f"{row.image} and the {MOST_SKIPPED - 1} unlabelled images before it cannot be read: repair or remove them."
        )

    def _open_image(self, row: Row) -> Tensor:
        config = self.data.config
        return _channels_first(open_image(row, config.channels, config.size, config.cache))

    def _open_pair(self, row: Row) -> tuple[Tensor, Tensor]:
        config = self.data.config
        image, mask = open_pair(row, config.channels, self.data.code, config.size, config.cache)
        return _channels_first(image), torch.from_numpy(mask)

    def _open_mask(self, row: Row) -> tuple[Tensor, Tensor]:
        config = self.data.config
        mask = torch.from_numpy(open_mask(row, self.data.code, config.size, config.cache))
        return torch.zeros((0, *mask.shape), dtype=torch.uint8), mask

    def _open_soft(self, row: Row, mask: Tensor, top: int) -> Tensor:
        if row.confidence is not None:
            return torch.from_numpy(open_soft(row, self.data.config.size, self.data.config.cache))
        sure = mask.new_zeros((2 * top - 1, *mask.shape))
        sure[0] = 255
        return sure

    def _crop(
        self,
        image: Tensor,
        mask: Tensor | None,
        draw: Draw,
        rng: np.random.Generator,
        centre: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        config = self.data.config
        return geometry(image, mask, draw.phase.crop, config.scale, config.flip, rng, centre)


def _table(stream: Stream, rng: np.random.Generator) -> NDArray[np.float32]:
    """(S, K) uniforms of a sample's strong views: drawn after its crop, so that the crop is the same without them."""
    return rng.random((stream.strong, len(VIEW)), dtype=np.float32)


def _channels_first(image: NDArray[Any]) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def _stack(images: tuple[Tensor, ...]) -> Tensor:
    """Stacks images of one depth; where 8 and 16 bit meet, 8 bit becomes 16 (white stays white)."""
    if len({image.dtype for image in images}) > 1:
        images = tuple(i if i.dtype == torch.uint16 else (i.to(torch.int32) * 257).to(torch.uint16) for i in images)
    return torch.stack(images)


def steps(dataset: Steps, start: int, workers: int, pin: bool) -> Generator[Item]:
    """The items from step `start` to the end, in order. To be closed by who does not take all.

    Raises:
        InputError: a labelled file cannot be used, or too many unlabelled ones.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, dataset.timetable.steps),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=parallel.quiet_worker if workers else None,
        prefetch_factor=4 if workers else None,
    )
    try:
        for item in loader:
            if isinstance(item, InputError):
                raise item
            yield item
    except (ConnectionError, EOFError) as error:
        # A worker was killed while it handed over a batch. torch's own error about it comes a moment later, wherever
        # the process is then: better here.
        time.sleep(1)
        raise RuntimeError("DataLoader worker ended while it handed over a batch") from error


def first_step(streams: Mapping[str, Stream], data: Data, seed: int) -> dict[str, Labelled | Unlabelled]:
    """The batches of step 0, to look at."""
    stream = next(iter(streams.values()))
    item = Steps(streams, Timetable(stream.phases, stream.phases[0].batch), data, seed)[0]
    if isinstance(item, InputError):
        raise item
    return item.batches

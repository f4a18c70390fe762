"""Which samples make up step t: a pure function of (seed, stream, step), so that nothing has to be restored at resume.

Position p counts the samples of a stream from the start of the run; epoch p // n has one shuffled order of the n rows.
In pools of more than LISTED rows that order is a function of the place in it, so that none is held in memory.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from semiseg.data.centroids import Centroids
from semiseg.data.rows import Rows

Key = tuple[int, int, int, int]
"""(seed, stream, position, SAMPLE): all chance of one sample comes from a generator seeded with it."""

SAMPLE, ORDER, PARTNER, SHUFFLE, PLACES = 1, 2, 3, 4, 5
"""What a generator is for. Never 0: NumPy takes a key and the same key with zeros behind it for one."""
LISTED = 2**17
"""Rows up to which an epoch's order is a list. Another value changes the draws of runs on pools between the two."""
ROUNDS = 8
"""Of the permutation: with random functions four do (Luby and Rackoff, SIAM J. Comput. 1988), and ours are hashes."""
NOWHERE = 1000
"""In a key, where the number of a class would be: the crops around no place."""


@dataclass(frozen=True)
class Phase:
    """A part of the run, up to the share `until` of its samples: crop (H, W), batch, factor on rates.

    The factor goes evenly from that of the phase before (of the first one from 1) to its own over `ramp`, a share of
    the run's samples.
    """

    crop: tuple[int, int]
    batch: int
    until: float = 1.0
    rate: float = 1.0
    ramp: float = 0.0


@dataclass(frozen=True)
class Stream:
    """What a method asks for: a pool of rows, the phases, and the number of strong views a sample.

    Without `images` only masks are opened, and the batch's images have no channel. With a `mixture` an
    epoch is made of parts of the pool, and crops may be drawn around places; without, it has every row once. Pseudo-
    labels have the `top` most probable classes of each pixel, a real mask its class.
    """

    rows: Rows
    phases: tuple[Phase, ...]
    strong: int = 0
    images: bool = True
    mixture: "Mixture | None" = None
    top: int = 1

    @property
    def epoch(self) -> int:
        """Samples of an epoch."""
        return len(self.rows) if self.mixture is None else self.mixture.items

    @cached_property
    def labelled(self) -> bool:
        """Whether the rows come with masks; a pool is of one kind."""
        masked = self.rows.mask != ""
        assert masked.all() or not masked.any(), "a stream's rows have masks, or none has"
        return bool(masked[0])


@dataclass(frozen=True)
class Draw:
    """The samples of one step: row numbers (B,), keys, each slot's mixing partner (B,), their phase, and (B, 2) the
    (y, x) in px that each crop is drawn around, or -1."""

    rows: NDArray[np.int64]
    keys: tuple[Key, ...]
    partners: NDArray[np.int64]
    phase: Phase
    centres: NDArray[np.int64]

    def block(self, rank: int, world: int) -> "Draw":
        """The part of process `rank` of `world`: a block of consecutive slots, in which partners stay."""
        size = len(self.rows) // world
        first, end = rank * size, (rank + 1) * size
        partners, centres = self.partners[first:end] - first, self.centres[first:end]
        return Draw(self.rows[first:end], self.keys[first:end], partners, self.phase, centres)


class Timetable:
    """Steps and samples of a run of `samples` samples in the given phases: a closed form, whatever the batches are."""

    def __init__(self, phases: Sequence[Phase], samples: int) -> None:
        shares = np.diff([0.0, *(phase.until for phase in phases)])
        assert (shares > 0).all() and phases[-1].until == 1, "phases follow one another and end at 1"
        self.phases = tuple(phases)
        # Each boundary by itself, so that what one phase is rounded by does not move the others.
        self.first_step, self.first_sample = np.zeros((2, len(phases) + 1), dtype=np.int64)
        for i, phase in enumerate(phases):
            steps = max(1, round((phase.until * samples - int(self.first_sample[i])) / phase.batch))
            self.first_step[i + 1] = self.first_step[i] + steps
            self.first_sample[i + 1] = self.first_sample[i] + steps * phase.batch
        self.steps, self.samples = int(self.first_step[-1]), int(self.first_sample[-1])

    def at(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and the number of samples before it."""
        i = int(np.searchsorted(self.first_step, step, side="right")) - 1
        phase = self.phases[i]
        return phase, int(self.first_sample[i] + (step - self.first_step[i]) * phase.batch)

    def progress(self, step: int) -> float:
        """The share of the samples before a step."""
        return self.at(step)[1] / self.samples

    def rate(self, step: int) -> float:
        """The factor on rates at a step."""
        i = int(np.searchsorted(self.first_step, step, side="right")) - 1
        phase, before = self.phases[i], self.phases[i - 1].rate if i else 1.0
        since = (self.at(step)[1] - int(self.first_sample[i])) / self.samples
        part = min(1.0, since / phase.ramp) if phase.ramp else 1.0
        return before + part * (phase.rate - before)


def mix_group(batch: int) -> int:
    """Slots that mix among themselves: the largest of 4, 3, 2 that divides the batch, else the whole batch."""
    return next((size for size in (4, 3, 2) if batch % size == 0), batch)


def stream_number(name: str) -> int:
    return zlib.crc32(name.encode())


def rows_at(places: NDArray[np.int64], rows: int, seed: int, stream: int, epoch: int) -> NDArray[np.int64]:
    """The rows at the given places of one epoch's shuffled order of the pool.

    An epoch never begins with the row that ended the one before: neighbours in time are different rows if the pool has
    two.
    """
    if rows <= LISTED:
        return epoch_order(rows, seed, stream, epoch)[places]
    if epoch > 0 and places.min() < 2:
        first, last = (
            permuted(np.array([place]), rows, _keys(seed, stream, number))[0]
            for place, number in ((0, epoch), (rows - 1, epoch - 1))
        )
        if first == last:
            places = np.where(places < 2, 1 - places, places)
    return permuted(places, rows, _keys(seed, stream, epoch))


def permuted(places: NDArray[np.int64], rows: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a permutation of 0..rows-1 that the keys choose takes some of them; it is held nowhere.

    A Feistel network permutes the numbers of as many bits as `rows - 1` has; what it takes beyond the rows goes through
    it again, until it comes back inside (cycle walking: Black and Rogaway, CT-RSA 2002): twice at most on average.
    """
    bits = max(2, (rows - 1).bit_length())
    low = np.uint64(bits // 2)
    left_mask, right_mask = (np.uint64(2**width - 1) for width in (bits - bits // 2, bits // 2))
    found = places.astype(np.uint64)
    outside = np.ones(len(found), dtype=np.bool_)
    while outside.any():
        left, right = found[outside] >> low, found[outside] & right_mask
        for even, odd in keys.reshape(-1, 2):
            left ^= _mixed(right, even) & left_mask
            right ^= _mixed(left, odd) & right_mask
        found[outside] = left << low | right
        outside = found >= rows
    return found.astype(np.int64)


@lru_cache(maxsize=8)
def _keys(seed: int, stream: int, epoch: int) -> NDArray[np.uint64]:
    return np.random.default_rng((seed, stream, epoch, ORDER)).integers(2**64, size=ROUNDS, dtype=np.uint64)


def _mixed(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Hashes numbers: the last steps of SplitMix64 (Steele et al., OOPSLA 2014)."""
    values = values + key
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=8)
def epoch_order(rows: int, seed: int, stream: int, epoch: int) -> NDArray[np.int64]:
    """One epoch's shuffled order of a pool that is not large; see `rows_at`."""
    if rows == 2:
        epoch = 0  # any other order of two would repeat a row at the seam
    order = np.random.default_rng((seed, stream, epoch, ORDER)).permutation(rows)
    if epoch > 0 and order[0] == _last_row(rows, seed, stream, epoch - 1):
        order[:2] = order[1::-1]
    return order


def _last_row(rows: int, seed: int, stream: int, epoch: int) -> int:
    # The swap above moves the first two rows only, so with three rows or more the last one needs no recursion.
    return int(np.random.default_rng((seed, stream, epoch, ORDER)).permutation(rows)[-1])


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a pool, `rows` of it from number `first` on, and how much of it is in an epoch: `items`.

    centroids: of these rows, numbered from 0; `share` of the crops, 0..1, are drawn around their places.
    """

    first: int
    rows: int
    items: int
    centroids: Centroids | None = None
    share: float = 0.5

    def shown(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """In how many samples of an epoch the image shows each class (C,): if all were drawn alike, and as they are.

        On average, and of the classes that have a place in the image. Needs centroids.
        """
        found = self.centroids
        assert found is not None
        present = np.zeros((self.rows, len(found.counts)), dtype=np.bool_)
        label = np.repeat(np.arange(len(found.counts)), found.counts)
        present[found.row, label] = True
        alike = self.items * present.mean(0)
        kinds = np.flatnonzero(found.counts)
        around = _per_epoch(self.share * self.items / max(1, len(kinds)))
        beside = sum((around * present[found.row[label == c]].mean(0) for c in kinds), np.zeros(present.shape[1]))
        return alike, (1 - around * len(kinds) / self.items) * alike + beside


@dataclass(frozen=True, eq=False)
class Mixture:
    """Epochs of a pool in parts that have each their own share, as real masks and pseudo-labels have.

    Where it is `even`, the parts alternate so that each batch has these shares, off by one sample at most; which sample
    of a part comes when stays random. Else a batch has them on average.
    """

    parts: tuple[Part, ...]
    even: bool = False

    def without_places(self) -> "Mixture":
        """The same shares, with crops anywhere."""
        return replace(self, parts=tuple(replace(part, centroids=None) for part in self.parts))

    @property
    def items(self) -> int:
        """Samples of an epoch."""
        return sum(part.items for part in self.parts)

    def epoch(self, seed: int, stream: int, number: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """One epoch's samples, shuffled: row numbers (n,), and (y, x) of the place each is drawn around (n, 2), or -1.

        Held whole, also of a large pool: 16 MB a million samples.

        Every class that a part has gets the same number of its crops, by its places in a shuffled order that goes on
        from epoch to epoch; the other crops go through the part's rows in the same manner. Where that is less than one
        crop a class and epoch, classes take turns over the epochs.
        """
        return _epoch(self, seed, stream, number)


@lru_cache(maxsize=4)  # two streams where one epoch ends and the next begins; each is held whole
def _epoch(mixture: Mixture, seed: int, stream: int, number: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    found = [_part(part, number, (seed, stream, i)) for i, part in enumerate(mixture.parts)]
    order = np.random.default_rng((seed, stream, number, SHUFFLE)).permutation(mixture.items)
    if mixture.even:
        items = [part.items for part in mixture.parts]
        ends = np.cumsum(items)
        inside = [order[(order >= end - n) & (order < end)] for n, end in zip(items, ends, strict=True)]
        due = np.concatenate([(np.arange(n) + 0.5) / n for n in items])
        order = np.concatenate(inside)[np.argsort(due, kind="stable")]
    row, at = (np.concatenate(columns)[order] for columns in zip(*found, strict=True))
    return row, at


def _part(part: Part, number: int, key: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    centroids, chosen, before = part.centroids, [np.zeros(0, np.int64)], 0
    if centroids is not None:
        present = np.flatnonzero(centroids.counts).tolist()
        quota = part.share * part.items / max(1, len(present))
        for turn, c in enumerate(present):
            start, end = _turns(number, quota, turn / len(present)), _turns(number + 1, quota, turn / len(present))
            before += start
            chosen.append(int(centroids.first[c]) + _slice(int(centroids.counts[c]), start, end - start, (*key, c)))
    places = np.concatenate(chosen)
    random = _slice(part.rows, number * part.items - before, part.items - len(places), (*key, NOWHERE))
    at = np.full((part.items, 2), -1, dtype=np.int32)
    if centroids is None:
        return part.first + random, at
    at[: len(places)] = np.stack([centroids.y[places], centroids.x[places]], 1)
    return part.first + np.concatenate([centroids.row[places].astype(np.int64), random]), at


def _turns(epochs: int, quota: float, offset: float) -> int:
    """How many crops a class has had after so many epochs: whole ones in each, or now and then one."""
    return int(epochs * _per_epoch(quota) + (0 if quota >= 1 else offset))


def _per_epoch(quota: float) -> float:
    """Crops of a class in an epoch, on average: a whole number, or less than one."""
    return float(int(quota)) if quota >= 1 else quota


def _slice(count: int, start: int, length: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Numbers start to start + length of an endless sequence: one shuffled order of 0..count-1 after another."""
    parts = [np.zeros(0, dtype=np.int64)]
    while length:
        turn, place = divmod(start, count)
        parts.append(np.random.default_rng((*key, turn, PLACES)).permutation(count)[place : place + length])
        start, length = start + len(parts[-1]), length - len(parts[-1])
    return np.concatenate(parts)


def draws(stream: Stream, timetable: Timetable, name: str, seed: int, step: int) -> Draw:
    """The global batch of a step."""
    phase, start = timetable.at(step)
    number, mixture = stream_number(name), stream.mixture
    count = stream.epoch
    positions = np.arange(start, start + phase.batch)
    rows = np.empty(phase.batch, dtype=np.int64)
    centres = np.full((phase.batch, 2), -1, dtype=np.int64)
    for epoch in range(positions[0] // count, positions[-1] // count + 1):
        inside = positions // count == epoch
        place = positions[inside] % count
        if mixture is None:
            rows[inside] = rows_at(place, count, seed, number, epoch)
        else:
            order, around = mixture.epoch(seed, number, epoch)
            rows[inside], centres[inside] = order[place], around[place]
    keys = tuple((seed, number, int(position), SAMPLE) for position in positions)
    partners = _partners(rows, np.random.default_rng((seed, number, step, PARTNER)))
    return Draw(rows, keys, partners, phase, centres)


def _partners(rows: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Each slot's partner: a roll inside its group by a drawn offset, moved on to the next slot of another row."""
    batch = len(rows)
    size = mix_group(batch)
    if size == 1:
        return np.zeros(1, dtype=np.int64)
    slots = np.arange(batch)
    first, inside = slots - slots % size, slots % size
    offset = np.repeat(rng.integers(1, size, batch // size), size)
    rolls = (offset[:, None] - 1 + np.arange(size - 1)) % (size - 1) + 1  # the drawn offset first, then the others
    candidates = first[:, None] + (inside[:, None] + rolls) % size
    other = rows[candidates] != rows[:, None]
    # Where no other row is there, argmax gives the drawn offset.
    partners: NDArray[np.int64] = candidates[slots, other.argmax(1)]
    return partners

"""Which samples make up a step, and who is mixed with whom."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semiseg.data.rows import Rows
from semiseg.data.sampling import (
    LISTED,
    ROUNDS,
    Draw,
    Phase,
    Stream,
    Timetable,
    draws,
    epoch_order,
    mix_group,
    permuted,
    rows_at,
)
from semiseg.engine import schedule
from semiseg.types import TrainConfig

pools = st.integers(2, 17)
batches = st.integers(1, 16)
seeds = st.integers(0, 2**32)


def stream(rows: int, *phases: Phase) -> Stream:
    return Stream(Rows.of("/data", [f"{i}.png" for i in range(rows)]), phases)


def draw_all(pool: Stream, samples: int, name: str = "unlabelled", seed: int = 0) -> list[Draw]:
    timetable = Timetable(pool.phases, samples)
    return [draws(pool, timetable, name, seed, step) for step in range(timetable.steps)]


def phases(*shares_and_batches: tuple[float, int]) -> list[Phase]:
    return [Phase((64 + i, 64), batch, until, rate=1 / (i + 1)) for i, (until, batch) in enumerate(shares_and_batches)]


@given(pools, batches, seeds)
def test_every_row_comes_once_an_epoch(rows: int, batch: int, seed: int) -> None:
    order = np.concatenate([draw.rows for draw in draw_all(stream(rows, Phase((8, 8), batch)), 5 * rows, seed=seed)])
    for epoch in range(len(order) // rows):
        assert sorted(order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(st.integers(2, 6), seeds)
def test_neighbours_are_different_rows_also_where_epochs_meet(rows: int, seed: int) -> None:
    order = np.concatenate([epoch_order(rows, seed, 1, epoch) for epoch in range(40)])
    assert (order[1:] != order[:-1]).all()


@pytest.mark.parametrize("rows", [3, 4, 10])
def test_epochs_have_orders_of_their_own(rows: int) -> None:
    orders = {tuple(epoch_order(rows, 0, 1, epoch)) for epoch in range(50)}
    assert len(orders) > (3 if rows == 3 else 10)
    firsts = Counter(int(epoch_order(rows, 0, 1, epoch)[0]) for epoch in range(600))
    assert set(firsts) == set(range(rows))
    assert min(firsts.values()) > 600 / rows / 2


def test_one_row_is_drawn_again_and_again() -> None:
    for draw in draw_all(stream(1, Phase((8, 8), 4)), 12):
        assert draw.rows.tolist() == [0] * 4
        assert len(set(draw.keys)) == 4


@given(pools, batches, seeds)
def test_partners_are_other_rows_of_the_same_group(rows: int, batch: int, seed: int) -> None:
    """Pools of 2 and 3 and batches over the seam of two epochs are the hard cases."""
    group = mix_group(batch)
    for draw in draw_all(stream(rows, Phase((8, 8), batch)), 4 * rows + 3 * batch, seed=seed):
        slots = np.arange(batch)
        assert (draw.partners // group == slots // group).all()
        if batch > 1:
            assert (draw.rows[draw.partners] != draw.rows).all()
            assert (draw.partners != slots).all()


@pytest.mark.parametrize(
    ("batch", "group"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 3), (8, 4), (9, 3), (10, 2), (12, 4), (35, 35)]
)
def test_mix_group(batch: int, group: int) -> None:
    assert mix_group(batch) == group
    assert batch % group == 0


def test_partners_change_from_step_to_step() -> None:
    found = {tuple(draw.partners) for draw in draw_all(stream(40, Phase((8, 8), 8)), 800)}
    assert len(found) == 9  # two groups of four, three offsets each


@given(pools, st.sampled_from([4, 8, 16]), st.sampled_from([1, 2, 4]), seeds)
def test_blocks_of_ranks_partition_a_step_and_mix_among_themselves(
    rows: int, batch: int, world: int, seed: int
) -> None:
    block = batch // world
    if block % mix_group(batch):
        return  # refused: the pairs would not be those of one process
    for draw in draw_all(stream(rows, Phase((8, 8), batch)), 3 * batch, seed=seed):
        blocks = [slice(rank * block, (rank + 1) * block) for rank in range(world)]
        assert [key for part in blocks for key in draw.keys[part]] == list(draw.keys)
        for part in blocks:
            inside = range(batch)[part]
            assert set(draw.partners[part]) <= set(inside)


@given(pools, seeds, st.permutations(range(10)))
def test_a_step_does_not_depend_on_what_was_drawn_before(rows: int, seed: int, order: Sequence[int]) -> None:
    pool = stream(rows, Phase((8, 8), 4))
    expected = draw_all(pool, 40, seed=seed)
    timetable = Timetable(pool.phases, 40)
    for step in order:
        epoch_order.cache_clear()
        draw = draws(pool, timetable, "unlabelled", seed, step)
        np.testing.assert_array_equal(draw.rows, expected[step].rows)
        np.testing.assert_array_equal(draw.partners, expected[step].partners)
        assert draw.keys == expected[step].keys


def test_name_and_seed_make_other_draws() -> None:
    pool = stream(50, Phase((8, 8), 8))
    one, other, reseeded = (
        draw_all(pool, 40, "labelled"),
        draw_all(pool, 40, "unlabelled"),
        draw_all(pool, 40, "labelled", 1),
    )
    assert not np.array_equal(one[0].rows, other[0].rows)
    assert not np.array_equal(one[0].rows, reseeded[0].rows)
    keys = [key for draws_ in (one, other, reseeded) for draw in draws_ for key in draw.keys]
    assert len(set(keys)) == len(keys)


def test_the_order_does_not_depend_on_batch_or_crop() -> None:
    plain = draw_all(stream(7, Phase((8, 8), 1)), 60)
    mixed = draw_all(stream(7, Phase((32, 16), 4, 0.4), Phase((8, 8), 5)), 60)
    count = sum(len(draw.rows) for draw in mixed)
    assert 55 <= count <= 65
    for name in ("rows", "keys"):
        one, other = ([x for draw in found for x in getattr(draw, name)] for found in (plain, mixed))
        assert one[: min(60, count)] == other[: min(60, count)]


@given(
    st.lists(st.floats(0.02, 1), max_size=3, unique=True).map(sorted),
    st.lists(batches, min_size=4, max_size=4),
    st.integers(1, 400),
)
def test_timetable_is_the_closed_form_of_counting(until: list[float], sizes: list[int], samples: int) -> None:
    until = [*[share for share in until if share < 0.98], 1.0]
    parts = phases(*zip(until, sizes, strict=False))
    timetable = Timetable(parts, samples)
    step = position = 0
    for phase in parts:
        for _ in range(max(1, round((phase.until * samples - position) / phase.batch))):
            assert timetable.at(step) == (phase, position)
            step, position = step + 1, position + phase.batch
    assert timetable.steps == step


def test_one_phase_has_the_steps_of_the_recipe() -> None:
    for steps, batch in ((1, 1), (20_000, 8), (7, 3)):
        assert Timetable([Phase((8, 8), batch)], steps * batch).steps == steps


def test_streams_of_other_batches_have_the_same_phases_in_samples() -> None:
    """Half of the samples in twice the batch: a quarter of the steps."""
    timetable = Timetable(phases((0.5, 16), (1.0, 8)), 800)
    assert timetable.first_step.tolist() == [0, 25, 75]
    assert timetable.at(24)[0].batch == 16
    assert timetable.at(25) == (timetable.phases[1], 400)


@pytest.mark.parametrize("untils", [(0.5,), (0.5, 0.5, 1.0), (0.6, 0.4, 1.0)])
def test_phases_follow_one_another_and_end_at_1(untils: tuple[float, ...]) -> None:
    with pytest.raises(AssertionError, match="phases follow"):
        Timetable(phases(*((until, 4) for until in untils)), 100)


def test_a_pool_is_labelled_or_not() -> None:
    pool = Rows.of("/data", ["a", "b"], ["a", "b"])
    assert Stream(pool, (Phase((8, 8), 2),)).labelled
    assert not Stream(pool.without_masks(), (Phase((8, 8), 2),)).labelled
    with pytest.raises(AssertionError, match="none has"):
        _ = Stream(pool + Rows.of("/data", ["c"]), (Phase((8, 8), 2),)).labelled


# ---- schedules -------------------------------------------------------------------------------------------------------


def scheduled_as(name: str, epoch: float = 0.1, **options: Any) -> tuple[Phase, ...]:
    config = TrainConfig(schedule=name, crop=(128, 192), batch=4, **options)
    return schedule.phases(Phase(config.crop, config.batch), config, epoch)


def test_schedules_by_hand() -> None:
    whole, small = (128, 192), (64, 96)
    assert scheduled_as("baseline") == (Phase(whole, 4),)
    assert scheduled_as("coarse2fine") == (Phase(small, 4, 0.6), Phase(whole, 4))
    assert scheduled_as("fine2coarse") == (Phase(whole, 4, 0.4), Phase(small, 4))
    assert scheduled_as("coarse2fine+") == (Phase(small, 16, 0.6, 4.0, 0.1), Phase(whole, 4, ramp=0.1))
    assert scheduled_as("fine2coarse+") == (Phase(whole, 4, 0.4), Phase(small, 16, 1.0, 4.0, 0.1))
    assert scheduled_as("coarse2fine+", small_batch=2)[0] == Phase(small, 8, 0.6, 2.0, 0.1)
    assert scheduled_as("coarse2fine", small=0.25, small_share=0.5)[0] == Phase((32, 32), 4, 0.5)


@pytest.mark.parametrize("epoch", [0.05, 0.1, 0.13, 0.45, 0.95, 1.0])
def test_alternate_changes_every_epoch_and_ends_whole(epoch: float) -> None:
    parts = scheduled_as("alternate", epoch)
    untils = [part.until for part in parts]
    assert untils == sorted(set(untils))
    assert untils[-2:] == [0.9, 1.0]
    assert all(part.crop == ((128, 192) if (len(parts) - i) % 2 else (64, 96)) for i, part in enumerate(parts))
    assert all(b - a <= epoch + 1e-9 for a, b in itertools.pairwise([0.0, *untils[:-1]]))


def test_a_small_crop_is_one_that_networks_take() -> None:
    config = TrainConfig(schedule="coarse2fine", crop=(321, 40), small=0.5)
    assert schedule.phases(Phase(config.crop, 4), config, 0.1)[0].crop == (160, 20)
    assert schedule.phases(Phase((50, 50), 4), TrainConfig(schedule="coarse2fine", small=0.97), 0.1)[0].crop == (32, 32)


@pytest.mark.parametrize(("share", "speed"), [(0.5, 1.6), (0.55, 1.702), (2 / 3, 2.0)])
def test_the_cost_model(share: float, speed: float) -> None:
    """Pixels of the constant schedule over those of this one (methods.md, case 44)."""
    parts = scheduled_as("coarse2fine", small_share=share)
    shares = np.diff([0.0, *(part.until for part in parts)])
    pixels = sum(s * part.crop[0] * part.crop[1] for s, part in zip(shares, parts, strict=True))
    assert 128 * 192 / pixels == pytest.approx(speed, abs=5e-4)


def test_the_rate_at_a_switch() -> None:
    """The envelope goes over samples; the factor goes from 1 to 4 and back, each within an epoch."""
    timetable = Timetable(scheduled_as("coarse2fine+"), 4000)
    assert timetable.steps == 150 + 400
    assert [timetable.rate(step) for step in (0, 10, 20, 25, 149)] == pytest.approx([1, 2.2, 3.4, 4, 4])
    assert timetable.progress(150) == pytest.approx(0.6)
    assert [timetable.rate(step) for step in (150, 200, 250, 549)] == pytest.approx([4, 2.5, 1, 1])
    short = scheduled_as("coarse2fine+", epoch=0.001)  # an epoch of a step: the ramp is longer
    assert [part.ramp for part in short] == [0.05, 0.05]
    plain = Timetable([Phase((8, 8), 3)], 300)
    assert [plain.rate(step) for step in (0, 99)] == [1, 1]
    assert [plain.progress(step) for step in (0, 7, 99)] == [step / 100 for step in (0, 7, 99)]


def test_how_rates_grow_with_the_batch() -> None:
    weights = [torch.zeros(1, requires_grad=True)]
    sgd, adamw = torch.optim.SGD(weights, 0.1), torch.optim.AdamW(weights)
    assert [schedule.power_of(some) for some in ([sgd], [adamw], [sgd, adamw])] == [1, 0.5, 0.5]
    streams = {"labelled": stream(7, Phase((128, 192), 4))}
    config = TrainConfig(schedule="coarse2fine+", crop=(128, 192), batch=4, steps=100)
    assert [part.rate for part in schedule.scheduled(streams, config, 0.5)["labelled"].phases] == [2, 1]
    assert [part.rate for part in schedule.scheduled(streams, config, 1.0)["labelled"].phases] == [4, 1]


def test_a_schedule_changes_the_crop_and_not_the_images() -> None:
    plain = draw_all(stream(7, *scheduled_as("baseline")), 240)
    for name in ("coarse2fine", "fine2coarse+", "alternate"):
        other = draw_all(stream(7, *scheduled_as(name)), 240)
        rows, others = (np.concatenate([d.rows for d in found]) for found in (plain, other))
        assert np.array_equal(rows, others)
        assert [k for d in plain for k in d.keys] == [k for d in other for k in d.keys]
        assert len({d.phase.crop for d in other}) == 2


@pytest.mark.parametrize("crop", [(96, 96), (224, 224), (352, 352), (360, 480), (128, 160)])
@pytest.mark.parametrize("small", [0.5, 0.6, 0.7, 0.8])
def test_more_small_crops_have_no_more_pixels(crop: tuple[int, int], small: float) -> None:
    config = TrainConfig(schedule="coarse2fine+", crop=crop, batch=4, small=small)
    part = schedule.phases(Phase(crop, 4), config, 0.1)[0]
    assert part.batch * part.crop[0] * part.crop[1] <= 4 * crop[0] * crop[1]


@pytest.mark.parametrize("pool", [4, 10, 11, 12, 46])
@pytest.mark.parametrize("name", ["alternate", "coarse2fine+", "fine2coarse"])
def test_a_schedule_leaves_the_run_its_samples(pool: int, name: str) -> None:
    """However short an epoch is: what one phase is rounded by does not add up over many."""
    config = TrainConfig(schedule=name, crop=(64, 64), batch=8, steps=1000)
    streams = {"labelled": stream(pool, Phase(config.crop, config.batch))}
    timetable = Timetable(schedule.scheduled(streams, config)["labelled"].phases, 8000)
    assert timetable.samples == pytest.approx(8000, abs=64)
    if name == "alternate":
        last = timetable.samples - int(timetable.first_sample[-2])
        assert last == pytest.approx(800, abs=8 * len(timetable.phases) * 0.05 + 64)


def keys_of(seed: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.random.default_rng(seed).integers(2**64, size=ROUNDS, dtype=np.uint64)


@given(st.integers(1, 3000), seeds)
def test_the_permutation_takes_every_row_once(rows: int, seed: int) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(rows), rows, keys_of(seed))), np.arange(rows))


def test_a_place_may_get_any_row() -> None:
    """Chi-square of the rows at the first, a middle and the last place, and of what follows what, over many keys."""
    rows, turns = 37, 2500
    found = np.stack([permuted(np.arange(rows), rows, keys_of(seed)) for seed in range(turns)])
    for column in (found[:, 0], found[:, 20], found[:, -1], (found[:, 1] - found[:, 0]) % rows - 1):
        counts = np.bincount(column, minlength=rows)[: column.max() + 1]
        expected = turns / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < 90, counts  # 36 degrees of freedom: beyond 1e-6


def test_a_large_pool_is_shuffled_evenly() -> None:
    """Each thousandth of the order is spread over the pool, and no row is a function of the one before."""
    rows = 1_000_000
    order = permuted(np.arange(rows), rows, keys_of(0))
    grid = np.histogram2d(np.arange(rows), order, bins=(100, 100))[0]
    assert ((grid - 100) ** 2 / 100).sum() == pytest.approx(9801, abs=6 * (2 * 9801) ** 0.5)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 6e-3
    assert abs((order == permuted(np.arange(rows), rows, keys_of(1))).sum() - 1) < 8


def test_epochs_of_a_large_pool() -> None:
    rows = LISTED + 1
    whole = [rows_at(np.arange(rows), rows, 5, 1, epoch) for epoch in range(2)]
    assert all(np.array_equal(np.sort(order), np.arange(rows)) for order in whole)
    assert (whole[0] == whole[1]).sum() < 12
    some = np.array([7, 0, rows - 1, 1])
    assert rows_at(some, rows, 5, 1, 1).tolist() == whole[1][some].tolist()


def test_the_seam_of_two_epochs_of_a_large_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few rows seams that would repeat one are frequent enough to be seen."""
    monkeypatch.setattr("semiseg.data.sampling.LISTED", 2)
    orders = [rows_at(np.arange(5), 5, 0, 1, epoch) for epoch in range(60)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert all(a[-1] != b[0] for a, b in itertools.pairwise(orders))
    for epoch in range(60):
        assert [int(rows_at(np.array([i]), 5, 0, 1, epoch)[0]) for i in range(5)] == orders[epoch].tolist()


@pytest.mark.parametrize(
    ("rows", "first", "seam"),
    [
        (10, [5, 1, 2, 9, 6, 3], [8, 0, 7, 4, 9, 7]),
        (LISTED, [10212, 88619, 31187, 14566, 33301, 3762], [82452, 18333, 107397, 105971, 6348, 14221]),
        (LISTED + 1, [63860, 35395, 58956, 23690, 29801, 52004], [55803, 52335, 119443, 32223, 56487, 109293]),
    ],
)
def test_draws_stay_what_they_are(rows: int, first: list[int], seam: list[int]) -> None:
    """Numbers that published runs were drawn by; in larger pools by the permutation."""
    pool = stream(rows, Phase((8, 8), 6))
    timetable = Timetable(pool.phases, 4 * rows)
    found = [draws(pool, timetable, "unlabelled", 3, step).rows.tolist() for step in (0, -(-rows // 6) - 1)]
    assert found == [first, seam]

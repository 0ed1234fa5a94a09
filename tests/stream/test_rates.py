"""Counters become rates when their slot closes, however the log was read and wherever it began."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from stream.buffer import PartitionBuffer
from stream.codec import Columns
from stream.formats import Decoded
from stream.grid import Grid
from stream.http import Health
from stream.metrics import ServiceMetrics
from stream.records import ReadingBatch
from stream.service import Service
from stream.sinks import MemorySink
from stream.sources import HistorySource, MemorySource, Source
from tests.stream.fakes import SCORING, FakeScorer, Reading, batch, grid
from tests.stream.test_service import FailingSink
from tsdiff.errors import ConfigError
from tsdiff.history import RATE_LOOKBACK, counter_rates, load_history, rate_channels, with_rates

NAN = float("nan")


def counting(**changes: int) -> Grid:
    """Slots of 10 ms in which channel b is a counter."""
    return replace(grid(**changes), counters=(1,))


def fed(readings: Sequence[Reading], first_offset: int = 0) -> ReadingBatch:
    made = batch(list(readings), first_offset)
    exact = np.array([[NAN if r[3] is None else r[3]] for r in readings]).reshape(-1, 1)
    return replace(made, counters=exact)


# -- rates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "rates"),
    [
        # a slot is 10 s
        ([], []),
        ([5], [NAN]),
        ([0, 10, 30, 30], [NAN, 1, 2, 0]),
        ([100, 200, 40, 50], [NAN, 10, 4, 1]),  # begun again in the third slot
        ([0, NAN, NAN, 60, 70], [NAN, NAN, NAN, 2, 1]),
        ([100, NAN, 40], [NAN, NAN, 2]),
        ([0, NAN, NAN, NAN, NAN, 50], [NAN, NAN, NAN, NAN, NAN, 1]),
        ([0, NAN, NAN, NAN, NAN, NAN, 60, 70], [*[NAN] * 7, 1]),  # too long ago
        ([2.0**53 - 20, 2.0**53 - 10], [NAN, 1]),
    ],
)
def test_rates_by_hand(counter: list[float], rates: list[float]) -> None:
    found = counter_rates(np.array(counter, np.float64).reshape(-1, 1), 10_000)
    np.testing.assert_allclose(found[:, 0], rates)


def test_patterns_choose_channels() -> None:
    channels = ("net.rx{if=eth0}", "net.tx", "cpu")
    assert rate_channels(channels, ["net.*"]) == (0, 1)
    assert rate_channels(channels, ["cpu", "net.r?{*"]) == (0, 2)
    assert rate_channels(channels, []) == ()
    with pytest.raises(ConfigError, match=r"input.rate.*'disk.\*' matches none of `net.rx"):
        rate_channels(channels, ["cpu", "disk.*"])


def test_columns_keep_counters_exact() -> None:
    columns = Columns(("a", "b"), (1,))
    columns.add(Decoded("x", 0, {"a": 1.0, "b": 2.0**24 + 1}), 0)
    columns.add(Decoded("x", 0, {"b": float("inf")}), 1)
    columns.add(Decoded("x", 0, {}), 2)
    assert columns.values()[0, 1] == 2.0**24
    np.testing.assert_array_equal(columns.counters(), [[2.0**24 + 1], [NAN], [NAN]])
    assert Columns(("a",)).counters() is None


# -- in the buffer -----------------------------------------------------------------------------


@st.composite
def logs(draw: st.DrawFn) -> list[Reading]:
    now, log = 0, []
    counters: dict[str, float] = defaultdict(float)
    for _ in range(draw(st.integers(1, 60))):
        now += draw(st.sampled_from([0, 0, 3, 10, 10, 25, 70]))
        entity = draw(st.sampled_from("abn"))
        counters[entity] += draw(st.sampled_from([0.0, 1.0, 2.0**25]))
        if draw(st.integers(0, 9)) == 0:
            counters[entity] = 0.0
        counter = draw(st.sampled_from([counters[entity]] * 3 + [None]))
        log.append((entity, now, draw(st.sampled_from([None, 1.0])), counter))
    return log


@given(
    log=logs(),
    lateness_ms=st.sampled_from([0, 10, 25]),
    lag=st.sampled_from([0, 2]),
    cuts=st.sets(st.integers(1, 59)),
    span=st.sampled_from([1, 2, 5]),
)
@settings(max_examples=150, deadline=None)
def test_closed_slots_hold_the_rates_of_a_simple_model(
    log: list[Reading], lateness_ms: int, lag: int, cuts: set[int], span: int
) -> None:
    shape = counting(lateness_ms=lateness_ms, span=span, ttl_slots=10_000, lag=lag)
    buffer = PartitionBuffer(shape, FakeScorer(lag=lag))
    closed: dict[str, dict[int, float]] = defaultdict(dict)
    windows: dict[tuple[str, int], list[float]] = {}
    for begin, end in pairwise([0, *sorted(c for c in cuts if c < len(log)), len(log)]):
        for closing in buffer.advance(fed(log[begin:end], begin)):
            for i, row in enumerate(closing.rows.tolist()):
                name = buffer.entity(row).name
                for t in np.flatnonzero(closing.present[i]).tolist():
                    closed[name][closing.first_slot + t] = float(closing.values[i, t, 1])
            for part in closing.spans:
                for i, row in enumerate(part.rows.tolist()):
                    for t in range(int(part.lengths[i])):
                        at = (buffer.entity(row).name, part.first_slot + t)
                        windows[at] = part.values[i, t : t + shape.window + lag, 1].tolist()

    last: dict[str, dict[int, float]] = defaultdict(dict)
    for entity, timestamp_ms, _, counter in log:
        if counter is not None:
            last[entity][timestamp_ms // 10] = counter

    def rate(entity: str, slot: int) -> float:
        counter = last[entity]
        for back in range(1, RATE_LOOKBACK + 1):
            if slot in counter and slot - back in counter:
                now, before = counter[slot], counter[slot - back]
                return float(np.float32((now - before if now >= before else now) / (back * 0.01)))
        return NAN

    for entity, slots in closed.items():
        expected = [rate(entity, slot) for slot in slots]
        np.testing.assert_array_equal(list(slots.values()), expected)
    for (entity, slot), window in windows.items():
        reach = range(slot - shape.window + 1, slot + lag + 1)
        np.testing.assert_array_equal(window, [rate(entity, s) for s in reach])


# -- in the loop -------------------------------------------------------------------------------


def run(source: Source, sink: MemorySink, shape: Grid) -> None:
    metrics = ServiceMetrics(
        CollectorRegistry(), channels=("a", "b"), max_entities=9, top_channels=2, entity_ttl_s=9
    )
    Service(
        source,
        sink,
        FakeScorer(),
        shape,
        SCORING,
        metrics,
        Health(),
        clock=lambda: 1.0,
        sleep=lambda _: None,
    ).run()


def steady(slots: int = 70) -> list[Reading]:
    """Two counters of different speed with gaps, one of which begins again now and then."""
    log: list[Reading] = []
    for slot in range(slots):
        big = 1e9 + 7.0 * slot * (1 + slot % 3)
        log.append(("a", slot * 10, 1.0, big if slot % 4 != 1 else None))
        log.append(("a", slot * 10 + 4, None, big + 1))
        log.append(("new", slot * 10 + 5, 0.5, float(slot % 13)))
    return log


def batches(size: int) -> list[ReadingBatch]:
    log = steady()
    return [fed(log[at : at + size], at) for at in range(0, len(log), size)]


@given(failing=st.sets(st.integers(0, 40), max_size=6), size=st.sampled_from([1, 5, 40]))
@settings(max_examples=25, deadline=None)
def test_a_restart_goes_on_with_the_same_rates(failing: set[int], size: int) -> None:
    shape = counting(lateness_ms=0)
    expected = MemorySink()
    run(MemorySource(batches(size)), expected, shape)
    sink = FailingSink(failing=tuple(failing))
    run(MemorySource(batches(size), sink.resume), sink, shape)
    assert len(expected.scores) > 100
    assert sink.scores == expected.scores


def history_folder(folder: Path) -> Path:
    for name in ("a", "new"):
        rows = [r for r in steady() if r[0] == name]
        columns = {
            "timestamp": pa.array([r[1] + 10**12 for r in rows], pa.timestamp("ms")),
            "a": pa.array([r[2] for r in rows], pa.float64()),
            "b": pa.array([r[3] for r in rows], pa.float64()),
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def test_history_gives_the_same_scores(tmp_path: Path) -> None:
    shape = counting(lateness_ms=0)
    live = MemorySink()
    log = [(entity, at + 10**12, a, b) for entity, at, a, b in steady()]
    run(MemorySource([fed(log)]), live, shape)
    history = load_history(history_folder(tmp_path), period_ms=10, rate=["b"])
    backfilled = MemorySink()
    run(HistorySource(history, lambda _: None), backfilled, shape)
    assert backfilled.scores == live.scores
    # It does matter: without the rates they are others.
    plain = MemorySink()
    run(HistorySource(history, lambda _: None), plain, grid(lateness_ms=0))
    assert plain.scores != live.scores


def test_training_sees_the_same_rates(tmp_path: Path) -> None:
    from tsdiff.windows import to_grid

    history = load_history(history_folder(tmp_path), period_ms=10, rate=["b"])
    entity = with_rates(history, ["b"], 10).entities[0]
    _, slots = to_grid(entity.timestamps_ms, entity.values, 10, 100)
    exact = history.entities[0].counters
    assert exact is not None
    last = exact[1::2]  # the second reading of each slot
    np.testing.assert_array_equal(slots[:, 1], counter_rates(last, 10)[:, 0].astype(np.float32))
    assert np.isfinite(slots[1:, 1]).all()
    np.testing.assert_array_equal(slots[:, 0], 1)

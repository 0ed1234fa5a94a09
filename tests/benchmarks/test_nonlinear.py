"""The non-linear fleet: its files, its faults, and that knowing the relations finds them."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.benchmarks import nonlinear
from tests.benchmarks.nonlinear import (
    ENTITIES,
    FAULT_KINDS,
    GAP,
    LONGEST,
    PLACE,
    SHORTEST,
    TEST_SLOTS,
    TRAIN_SLOTS,
    FaultKind,
    Simulated,
    main,
    simulate,
    write,
)
from tests.benchmarks.plants import (
    CHANNELS,
    PERIOD_MS,
    Floats,
    Plant,
    current_a,
    flow_through,
    latency_ms,
    run_plant,
    vibration_mm_s,
)
from train.labelled import find_sets, load_set
from train.metrics import Cause, average_precision

SEED = 0
REACH = 12  # slots that a relation in time is looked at for


@cache
def fleet() -> tuple[Simulated, ...]:
    return tuple(simulate(SEED, number) for number in range(ENTITIES))


@cache
def sound(number: int) -> Floats:
    """The same plant (T, D) without its faults."""
    course = run_plant(np.random.default_rng([SEED, number]), TRAIN_SLOTS + TEST_SLOTS)
    return np.stack(list(course.channels.values()), axis=-1)


# -- files -------------------------------------------------------------------------------------


def test_a_seed_is_a_fleet(tmp_path: Path) -> None:
    def files(name: str, seed: int, entities: int) -> dict[str, bytes]:
        write(tmp_path / name, seed, entities)
        paths = [path for path in sorted((tmp_path / name).rglob("*")) if path.is_file()]
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths}

    one, again, more, other = files("a", 3, 1), files("b", 3, 1), files("c", 3, 2), files("d", 4, 1)
    assert set(one) == {
        f"nonlinear/plant-1/{name}"
        for name in ("train.parquet", "test.parquet", "interpretation.json")
    }
    assert one == again
    assert one == {name: more[name] for name in one}  # an entity does not depend on how many
    assert not set(one.values()) & set(other.values())
    for part in ("train.parquet", "test.parquet"):
        assert more[f"nonlinear/plant-1/{part}"] != more[f"nonlinear/plant-2/{part}"]


def test_evaluation_reads_it(tmp_path: Path) -> None:
    written = write(tmp_path, SEED, 2)
    ((name, folders),) = find_sets([tmp_path]).items()
    labelled = load_set(name, folders, None, None)
    assert (name, labelled.channels, labelled.period_ms) == (
        "nonlinear",
        tuple(CHANNELS),
        PERIOD_MS,
    )
    for entity, simulated in zip(labelled.entities, written, strict=True):
        test = entity.test
        assert test is not None
        assert test.goes_on
        np.testing.assert_array_equal(entity.past, simulated.train)
        np.testing.assert_array_equal(test.values, simulated.test)
        np.testing.assert_array_equal(test.labels, simulated.labels != 0)
        assert test.causes == tuple(
            Cause(fault.start, fault.end, frozenset({PLACE[fault.channel]}))
            for fault in simulated.faults
        )


def test_labels_and_interpretation_agree(tmp_path: Path) -> None:
    write(tmp_path, SEED, 1)
    folder = tmp_path / "nonlinear" / "plant-1"
    assert pq.read_schema(folder / "train.parquet").names == ["timestamp", *CHANNELS]
    table = pq.read_table(folder / "test.parquet")
    assert table.column_names == ["timestamp", *CHANNELS, "label"]
    assert {str(table.schema.field(name).type) for name in CHANNELS} == {"float"}
    edges = np.diff(table["label"].to_numpy(), prepend=0, append=0).nonzero()[0].reshape(-1, 2)
    segments = json.loads((folder / "interpretation.json").read_text("utf-8"))["segments"]
    assert [[each["start"], each["end"]] for each in segments] == edges.tolist()
    assert {each["type"] for each in segments} == set(FAULT_KINDS)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path), "--seed", "1", "--entities", "1"])
    assert "nonlinear: 1 entities, 8 faults" in capsys.readouterr().out
    for arguments, said in (
        ([], "remove it or give another OUT"),
        (["--entities", "0"], "expected a whole number of at least 1, got '0'"),
        (["--seed", "-1"], "expected a whole number of at least 0, got '-1'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(tmp_path), *arguments])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err.replace("\n", " ")


def test_a_fault_without_room_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nonlinear, "GAP", 3_000)
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "expected room for a fault" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -- faults ------------------------------------------------------------------------------------


def test_every_kind_occurs_in_every_plant() -> None:
    for entity in fleet():
        assert sorted(fault.kind for fault in entity.faults) == sorted(FAULT_KINDS)
        for fault in entity.faults:
            assert SHORTEST[fault.kind] <= fault.end - fault.start <= LONGEST
        starts, ends = zip(*((fault.start, fault.end) for fault in entity.faults), strict=True)
        assert all(np.subtract(starts[1:], ends[:-1]) >= GAP)
    assert 0.03 < np.mean([entity.labels for entity in fleet()]) < 0.05


def test_nothing_else_is_faulty() -> None:
    """The train part, and the test part but for its faults, are those of the sound plant.

    Only a tank takes its time to come back, which is as it should be.
    """
    for number, entity in enumerate(fleet()):
        expected = sound(number).astype(np.float32)
        np.testing.assert_array_equal(entity.train, expected[:TRAIN_SLOTS])
        changed = entity.test != expected[TRAIN_SLOTS:]
        allowed = np.zeros_like(changed)
        for fault in entity.faults:
            blamed = changed[fault.start : fault.end, PLACE[fault.channel]]
            assert blamed.mean() > 0.7, fault
            allowed[fault.start : fault.end, PLACE[fault.channel]] = True
            if fault.kind == "temperature_unmoved":
                allowed[fault.end :, PLACE["temperature"]] = True
                off = entity.test[fault.end :, PLACE["temperature"]]
                off = np.abs(off - expected[TRAIN_SLOTS + fault.end :, PLACE["temperature"]])
                assert off[GAP:].max() < 4 + 1e-3
        assert not (changed & ~allowed).any()


def test_a_fault_keeps_to_the_range_of_the_train_part() -> None:
    for entity in fleet():
        low, high = np.quantile(entity.train, [0.0005, 0.9995], axis=0)
        for fault in entity.faults:
            place = PLACE[fault.channel]
            values = entity.test[fault.start : fault.end, place]
            assert low[place] <= values.min() <= values.max() <= high[place], fault


def test_a_covariance_does_not_tell_where_it_is_hot() -> None:
    said, exclusive = [], []
    for entity in fleet():
        valve, power, temperature = (
            entity.train[:, PLACE[name]] for name in ("valve", "power", "temperature")
        )
        said += [np.corrcoef(each, temperature)[0, 1] for each in (valve, power)]
        hot = (valve > 10) != (power > 1.6 * entity.plant.idle_kw)
        exclusive.append(np.corrcoef(hot, temperature)[0, 1])
    assert abs(np.mean(said)) < 0.1
    assert np.mean(exclusive) > 0.7


# -- the oracle --------------------------------------------------------------------------------

# It sees readings (T, D) as a detector does, and knows the plant. Each relation gives how much it
# is broken in every slot (T,), looking back by at most REACH slots, in units of its own.


def _flow(plant: Plant, of: Callable[[str], Floats]) -> Floats:
    law = flow_through(plant, np.where(of("valve") > 10, of("valve"), 0) / 100, of("pressure"))
    return np.abs(of("flow") - law) / (0.05 * law + 0.02 * plant.conductance)


def _latency(plant: Plant, of: Callable[[str], Floats]) -> Floats:
    return np.abs(np.log(of("latency") / latency_ms(plant, of("queue"), of("requests"))))


def _tank(plant: Plant, of: Callable[[str], Floats]) -> Floats:
    """Compare with where the regimes of the last slots lead from the temperature before them."""
    temperature, steps = of("temperature"), 8
    hot = (of("valve") > 10) != (of("power") > 1.6 * plant.idle_kw)
    keep = np.where(hot, plant.keep_heating, plant.keep_cooling)
    target = np.where(hot, plant.hot, plant.cold)
    expected = temperature[:-steps]
    for step in range(1, steps + 1):
        now = slice(step, len(temperature) - steps + step)
        expected = keep[now] * expected + (1 - keep[now]) * target[now]
    return np.concatenate([np.zeros(steps), np.abs(temperature[steps:] - expected)])


def _wave(plant: Plant, of: Callable[[str], Floats]) -> Floats:
    """Fit one phase to both waves of the last slots: what remains is of another shape."""
    phase = np.linspace(0, 1, 120, endpoint=False)[:, None]
    phases = phase + np.arange(1 - REACH, 1) / plant.cycle_slots
    remains = np.zeros(())
    for measured, law in (
        (of("current") / 1.5, current_a(plant, phases) / 1.5),
        (np.log(of("vibration")) / 0.1, np.log(vibration_mm_s(plant, phases)) / 0.1),
    ):
        window = np.lib.stride_tricks.sliding_window_view(measured, REACH)
        squares = (window**2).sum(1)[:, None] - 2 * window @ law.T + (law**2).sum(1)
        remains = remains + squares
    return np.concatenate([np.zeros(REACH - 1), remains.min(1)])


def _calm(channel: str) -> Callable[[Plant, Callable[[str], Floats]], Floats]:
    def calm(_: Plant, of: Callable[[str], Floats]) -> Floats:
        """How little the channel goes up and down."""
        steps = np.lib.stride_tricks.sliding_window_view(np.diff(np.log(of(channel))), REACH)
        return np.concatenate([np.zeros(REACH), 1 / steps.std(1)])

    return calm


RELATIONS: dict[str, Callable[[Plant, Callable[[str], Floats]], Floats]] = {
    "flow": _flow,
    "latency": _latency,
    "tank": _tank,
    "wave": _wave,
    "calm pressure": _calm("pressure"),
    "calm ratio": _calm("hit_ratio"),
}
BROKEN: dict[FaultKind, tuple[str, ...]] = {
    "leak": ("flow",),
    "blocked": ("flow",),
    "latency_apart": ("latency",),
    "temperature_unmoved": ("tank",),
    "switch_ignored": ("flow", "tank"),
    "wave_shape": ("wave",),
    "phase_slip": ("wave",),
    "frozen_variation": ("calm pressure", "calm ratio"),
}


def broken(entity: Simulated) -> dict[str, Floats]:
    """Each relation of the test part (T,): above 1 it is broken more than ever in training."""
    values = np.concatenate([entity.train, entity.test]).astype(np.float64)
    found = {}
    for name, relation in RELATIONS.items():
        surprise = relation(entity.plant, lambda channel: values[:, PLACE[channel]])
        usual = np.quantile(surprise[:TRAIN_SLOTS], 0.9995)
        found[name] = surprise[TRAIN_SLOTS:] / usual
    return found


def test_who_knows_the_relations_finds_the_faults() -> None:
    precisions = []
    for entity in fleet():
        found = broken(entity)
        for fault in entity.faults:
            own = np.max([found[name] for name in BROKEN[fault.kind]], axis=0)
            settled = own[fault.start + min(REACH, SHORTEST[fault.kind] - 4) : fault.end]
            assert (settled > 1).mean() > 0.5, (fault, settled.round(1))
        worst = np.max(list(found.values()), axis=0)
        # Windows that reach back into a fault are no false alarms.
        near = np.convolve(entity.labels, np.ones(REACH + 1))[: len(worst)] > 0
        assert (worst[~near] > 1).mean() < 0.02
        precisions.append(average_precision(entity.labels != 0, worst))
    assert np.mean(precisions) > 0.85

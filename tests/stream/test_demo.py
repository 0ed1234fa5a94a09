"""The demo and its parts, run for real: embedded broker, service, training, this machine."""

import builtins
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata
from rich.console import Console

from stream.board import Board, Episode, Record, alert_line
from stream.codec import rfc3339
from stream.demo import GRACE_SLOTS, Plan, judge, out_of_order, run_demo
from stream.embedded import EmbeddedBroker
from stream.host import _UNITS, HostSampler, _Ticks, run_host
from stream.simulate import FAULT_KINDS, Arrivals, Fault, FaultKind
from tests.conftest import ROOT
from tsdiff.bundle import Bundle
from tsdiff.errors import ConfigError, TsdiffError
from tsdiff.history import History

PERIOD_MS = 60_000
# Six days, then one live: enough for what is gross.
SMALL = Plan(
    history_slots=1728,
    live_slots=300,
    live_seconds=8.0,
    kinds=("dead", "broken_correlation", "level_shift"),
    train={"network": None, "held_out": 0.4},
)


def train(history: History, *, period_ms: int, **settings: Any) -> Bundle:  # noqa: ANN401
    from train.config import TrainConfig
    from train.loop import train as fit

    return fit(history, TrainConfig(**settings), period_ms=period_ms)


def shown() -> Console:
    return Console(file=io.StringIO(), width=120)


def text_of(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


# -- the broker --------------------------------------------------------------------------------


def test_the_embedded_broker_keeps_records_groups_and_offsets() -> None:
    with EmbeddedBroker() as broker:
        kwargs = broker.client_kwargs()
        with KafkaProducer(**kwargs, acks="all", enable_idempotence=True) as producer:
            assert producer.partitions_for("in") == {0, 1, 2, 3}
            for i in range(100):
                producer.send("in", value=b"%d" % i, key=b"k%d" % (i % 8), timestamp_ms=1000 + i)
            producer.flush(10)
        found: list[Any] = []
        with KafkaConsumer(
            "in",
            **kwargs,
            group_id="g",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            isolation_level="read_committed",
        ) as consumer:
            deadline = time.monotonic() + 60
            while len(found) < 100 and time.monotonic() < deadline:
                for records in consumer.poll(timeout_ms=200).values():
                    found += records
            first = TopicPartition("in", found[0].partition)
            consumer.commit({first: OffsetAndMetadata(1, "meta", -1)})
            committed = consumer.committed(first, metadata=True)
        assert sorted(int(record.value) for record in found) == list(range(100))
        assert all(record.timestamp == 1000 + int(record.value) for record in found)
        assert len({record.partition for record in found if record.key == b"k1"}) == 1
        assert (committed.offset, committed.metadata) == (1, "meta")
        host, port = broker.address.split(":")
    with pytest.raises(OSError), socket.create_connection((host, int(port)), timeout=2):
        pass


def test_a_missing_extra_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:  # noqa: ANN401
        if name.split(".", maxsplit=1)[0] in {"confluent_kafka", "psutil"}:
            raise ModuleNotFoundError(name=name)
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TsdiffError, match=r"confluent-kafka.*pip install 'tsdiff\[demo\]'"):
        EmbeddedBroker()
    with pytest.raises(TsdiffError, match=r"psutil.*pip install 'tsdiff\[demo\]'"):
        HostSampler()


# -- what is said about faults and alerts ------------------------------------------------------


def fault(entity: str, start_slot: int, end_slot: int, kind: FaultKind = "dead") -> Fault:
    times = (start_slot * PERIOD_MS, end_slot * PERIOD_MS)
    return Fault(entity, kind, ("cpu",), start_slot, end_slot, *times)


def alert(entity: str, slot: int, *channels: str) -> Episode:
    return Episode(entity, slot * PERIOD_MS, 1.5, channels)


def test_faults_are_set_against_alerts() -> None:
    faults = [fault("a", 10, 20), fault("b", 10, 20), fault("c", 10, 20)]
    late = 20 + GRACE_SLOTS
    alerts = [
        alert("a", 9, "cpu"),  # before it began: false
        alert("a", 12, "mem", "cpu"),
        alert("a", 15, "cpu"),  # again for the same fault: neither a catch nor false
        alert("b", late - 1, "mem"),
        alert("c", late, "cpu"),  # too late: false
        alert("d", 12, "cpu"),  # nothing was wrong with this one
    ]
    outcomes, false = judge(faults, alerts, PERIOD_MS)
    assert [o.alert for o in outcomes] == [alerts[1], alerts[3], None]
    assert [o.alerts for o in outcomes] == [(alerts[1], alerts[2]), (alerts[3],), ()]
    assert [o.delay_slots for o in outcomes] == [2, 14, None]
    assert [o.blamed_right for o in outcomes] == [True, False, None]
    assert false == [alerts[0], alerts[4], alerts[5]]


def record(entity: str, slot: int, state: str, **more: Any) -> Record:  # noqa: ANN401
    channel = {"observed": 1.0, "expected": 2.0, "lower": 0.0, "upper": 3.0}
    return {
        "entity": entity,
        "timestamp": rfc3339(slot * PERIOD_MS),
        "state": state,
        "anomaly_score": 1.25,
        "faulty": {},
        "channels": {
            "cpu": {**channel, "contribution": 0.2},
            "mem": {**channel, "contribution": 0.7},
            "net": {**channel, "contribution": 0.1},
            "disk": {**channel, "contribution": 0.0},
        },
        **more,
    }


def test_the_board_counts_nothing_twice_and_knows_one_alert_from_two() -> None:
    board = Board({"mem": "%"})
    slots = [record("a", 1, "ok", anomaly_score=None, channels={}), record("a", 2, "firing")]
    assert board.take([*slots, slots[1]], []) == []
    assert (board.scores, board.judged, board.now_ms) == (2, 1, 2 * PERIOD_MS)
    states = ["pending", "firing", "recovering", "firing", "recovering", "ok", "pending", "firing"]
    begun = [board.take([], [record("a", 10 + i, state)]) for i, state in enumerate(states)]
    assert [len(found) for found in begun] == [0, 1, 0, 0, 0, 0, 0, 1]
    assert [(e.start_ms, e.end_ms) for e in board.episodes] == [
        (11 * PERIOD_MS, 15 * PERIOD_MS),
        (17 * PERIOD_MS, None),
    ]
    assert board.episodes[0].channels == ("mem", "cpu", "net")
    (row,) = board.rows()
    assert (row.entity, row.state, row.top_channel, row.unit) == ("a", "firing", "mem", "%")
    assert row.last_alert == "Thu 00:17 mem, cpu"


def test_a_channel_that_is_dead_or_stuck_is_told_once_and_until_it_is_well() -> None:
    board = Board({})
    states: list[dict[str, str]] = [
        {"mem": "dead"},
        {"mem": "dead", "cpu": "stuck"},
        {"cpu": "stuck"},
        {},
        {"cpu": "dead"},
    ]
    for i, faulty in enumerate(states):
        state = "firing" if i == 2 else "ok"
        board.take([], [record("a", 10 + i, state, faulty=faulty)])
    told = [(e.state, e.channels[0], e.start_ms // PERIOD_MS, e.end_ms) for e in board.episodes]
    assert told == [
        ("dead", "mem", 10, 12 * PERIOD_MS),
        ("stuck", "cpu", 11, 13 * PERIOD_MS),
        ("firing", "mem", 12, 13 * PERIOD_MS),
        ("dead", "cpu", 14, None),
    ]
    assert alert_line(board.episodes[1]) == "Thu 00:11 a cpu is stuck"


def test_entities_are_shown_in_the_order_of_their_numbers() -> None:
    board = Board({})
    board.take([record(name, 1, "ok") for name in ("web-10", "web-9", "db")], [])
    assert [row.entity for row in board.rows()] == ["db", "web-9", "web-10"]


def test_a_reading_is_late_behind_a_newer_one_of_its_own_entity() -> None:
    rows = np.array([0, 1, 0, 0, 1])
    timestamps_ms = np.array([1, 5, 3, 2, 5])
    assert (
        out_of_order(Arrivals(rows, timestamps_ms, timestamps_ms, np.zeros((5, 1), np.float32)))
        == 1
    )


def test_an_address_that_is_none_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        run_demo(train, listen="nowhere", console=shown())
    with pytest.raises(ConfigError, match="nowhere"):
        run_host(train, listen="nowhere", console=shown())


# -- all of it ---------------------------------------------------------------------------------


def test_the_demo_from_simulation_to_summary() -> None:
    console = shown()
    # A port that is taken is no reason to stop.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        summary = run_demo(train, listen=f"127.0.0.1:{port}", console=console, plan=SMALL)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["faults"] == len(summary["details"]) == 3
    assert summary["caught"] == sum(detail["caught"] for detail in summary["details"])
    caught = {detail["kind"]: detail for detail in summary["details"] if detail["caught"]}
    shift = caught["level_shift"]  # four standard deviations and more: hard to overlook
    assert shift["blamed_right"]
    assert 0 <= shift["delay_slots"] < 10
    assert 0 < summary["seconds_to_first_score"] < summary["seconds"]
    assert summary["false_alarms"] == sum(a["fault"] is None for a in summary["alerts"])
    assert {a["fault"] for a in summary["alerts"]} >= set(caught)
    # Every slot of every entity once: those at the very end wait for late readings for ever.
    open_slots = SMALL.lateness_slots + 2
    assert 8 * (SMALL.live_slots - open_slots) <= summary["scores"] <= 8 * SMALL.live_slots
    assert summary["readings_late"] > 0
    text = text_of(console)
    assert "in use; " in text
    assert "a free port is taken instead" in text
    assert "metrics at http://127.0.0.1:" in text
    assert f"metrics at http://127.0.0.1:{port}" not in text
    assert "Faults injected and caught" in text
    assert f"{summary['caught']} of 3 caught" in text
    assert "at-least-once" in text


def test_the_same_seed_gives_the_same_demo() -> None:
    plan = replace(SMALL, live_seconds=3.0, live_slots=240, kinds=("dead",))
    console = shown()
    first, second = (
        run_demo(train, console=console, plan=replace(plan, live_seconds=seconds))
        for seconds in (2.0, 5.0)
    )
    assert "first score after" in text_of(console)
    assert "metrics at" not in text_of(console)  # nothing listens
    for key in ("details", "alerts", "scores", "readings", "readings_too_late"):
        assert first[key] == second[key]


@pytest.mark.slow
def test_json_is_the_last_line_whatever_else_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        answer = subprocess.run(
            [
                *(sys.executable, "-m", "tsdiff.cli", "demo", "--json"),
                *("--listen", f"127.0.0.1:{taken.getsockname()[1]}"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=290,
            check=True,
        )
    (line,) = answer.stdout.splitlines()
    summary = json.loads(line)
    assert summary["faults"] == 7
    assert {detail["kind"] for detail in summary["details"]} == set(FAULT_KINDS)
    assert len({detail["entity"] for detail in summary["details"]}) == 7
    assert summary["caught"] >= 5
    assert "Traceback" not in answer.stderr
    assert "a free port is taken instead" in answer.stderr


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """What is started inherits nothing of a shell that put us into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_ends_the_demo_without_a_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tsdiff.cli", "demo", "--listen", ""],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    with process:
        assert process.stdout is not None
        assert "simulated servers" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=120)
    assert process.returncode == 130
    assert complaint == ""


# -- this machine ------------------------------------------------------------------------------


def test_this_machine_gives_finite_channels() -> None:
    now = [100.0]
    sampler = HostSampler(lambda: now[0])
    for _ in range(3):
        now[0] += 1.0
        sample = sampler.sample()
        assert list(sample) == list(sampler.channels)
        assert all(np.isfinite(value) and value >= 0 for value in sample.values())
        assert sample["memory"] <= 100
        assert sample["processes"] >= 1
    assert {"cpu", "memory", "processes"} <= set(sampler.channels)
    assert len(sampler.channels) >= 8


def test_rates_are_per_second_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sent = [100.0], [10 * 1024 * 1024]

    def counters() -> Any:  # noqa: ANN401
        kinds = {"bytes_recv": sent[0], "bytes_sent": 0, "packets_recv": 0, "packets_sent": 0}
        return type("Counters", (), kinds)

    monkeypatch.setattr(psutil, "net_io_counters", counters)
    sampler = HostSampler(lambda: now[0])
    now[0], sent[0] = 104.0, 18 * 1024 * 1024
    assert sampler.sample()["net_in"] == pytest.approx(2.0)
    now[0], sent[0] = 105.0, 0  # the counter began anew
    assert sampler.sample()["net_in"] == 0.0


def test_a_machine_without_disks_network_or_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("not here")

    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)
    monkeypatch.setattr(psutil, "net_io_counters", refuse)
    monkeypatch.setattr(psutil, "getloadavg", refuse)
    monkeypatch.setattr(psutil, "swap_memory", refuse)
    sampler = HostSampler()
    gone = {"disk_read", "disk_write", "net_in", "net_out", "packets", "load_1m", "swap"}
    assert set(sampler.channels).isdisjoint(gone)
    assert set(sampler.sample()) == set(sampler.channels) <= set(_UNITS)


def test_no_second_is_sampled_twice() -> None:
    class Asleep:
        waited: list[float] = []  # noqa: RUF012

        def wait(self, seconds: float) -> None:
            self.waited.append(seconds)

    ticks = _Ticks(1000)
    slots = [ticks.wait(Asleep()) for _ in range(5)]  # type: ignore[arg-type]
    assert all(later - earlier >= 1000 for earlier, later in pairwise(slots))
    assert all(seconds >= 0 for seconds in Asleep.waited)


def test_too_little_to_learn_from_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="--learn"):
        run_host(train, learn_ms=60_000)


def test_this_machine_is_watched() -> None:
    console = shown()
    # Ten times as often as the command does: what it needs is slots, not minutes.
    summary = run_host(train, learn_ms=22_000, period_ms=100, console=console, watch_seconds=10)
    assert summary["scores"] >= 10
    assert "watching until Ctrl-C" in text_of(console)
    assert text_of(console).rstrip().endswith("alerts") or "still on" in text_of(console)

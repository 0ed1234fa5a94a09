"""Settings and bundles change while the service runs: in between rounds, or not at all."""

import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from stream.codec import rfc3339
from stream.compose import Model, Running, prepare
from stream.config import ServiceConfig, load_config
from stream.http import Health
from stream.metrics import ServiceMetrics
from stream.records import PartitionId, SlotScore
from stream.reload import Reloader, Wish, changed_keys
from stream.scoring import ScoringConfig
from stream.service import Service
from stream.sources import MemorySource
from tests.conftest import MakeTopic
from tests.stream.conftest import SmallBundle
from tests.stream.fakes import POLICY, SCORING, FakeLearner, FakeScorer, Reading, batch
from tests.stream.test_service import FailingSink, log
from tests.stream.workers import Deployment, Worker, deployment, wait_until
from tsdiff.bundle import load_bundle, make_bundle, save_bundle
from tsdiff.detector import Detector
from tsdiff.errors import BundleError, ConfigError
from tsdiff.history import History

REQUIRED = {"model.path": "bundle", "input.topic": "telemetry"}


def settings(**changes: object) -> ServiceConfig:
    return load_config(None, {**REQUIRED, **{k.replace("__", "."): v for k, v in changes.items()}})


@pytest.mark.parametrize(
    "change",
    [
        {"model__path": "other"},
        {"alerts__trigger": 2.0},
        {"alerts__false_alarms_per_entity_week": 3},
        {"metrics__max_entities": 5},
        {"metrics__top_channels": 2},
        {"log__level": "debug"},
    ],
)
def test_what_may_change(change: dict[str, object]) -> None:
    key = next(iter(change)).replace("__", ".")
    assert changed_keys(settings(), settings(**change)) == [key]


@pytest.mark.parametrize(
    "change",
    [
        {"input__topic": "another"},
        {"grid__lateness": "1s"},
        {"detect__lag": 3},
        {"metrics__listen": ""},
        {"metrics__reload": True},
        {"log__format": "json"},
    ],
)
def test_what_needs_a_restart_is_named(change: dict[str, object]) -> None:
    key = next(iter(change)).replace("__", ".")
    with pytest.raises(ConfigError, match=f"needs a restart: {key} "):
        changed_keys(settings(), settings(alerts__trigger=2.0, **change))


def test_a_secret_that_changed_is_named_and_not_told() -> None:
    def guarded(word: str) -> ServiceConfig:
        return settings(metrics__username="u", metrics__password=word)

    with pytest.raises(ConfigError, match=r"needs a restart: metrics.password ") as caught:
        changed_keys(guarded("hunter2"), guarded("hunter3"))
    assert "hunter" not in str(caught.value)


# -- beside the loop -----------------------------------------------------------------------------


class Workshop:
    """A reloader whose preparing waits for the test."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        metrics = ServiceMetrics(
            self.registry, channels=("a",), max_entities=1, top_channels=1, entity_ttl_s=1
        )
        self.go, self.results = threading.Event(), list[Any]()
        self.swapped: list[tuple[str, int]] = []
        self.wish = Wish()
        self.reloader = Reloader(
            self.wish,
            self.prepare,
            lambda what: self.swapped.append((what, threading.get_ident())),
            metrics,
        )

    def prepare(self) -> str:
        assert self.go.wait(10)
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return str(result)

    def finish(self) -> None:
        self.go.set()
        deadline = time.monotonic() + 10
        while self.reloader.busy:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        self.go.clear()
        self.reloader.turn()

    def metric(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"tsdiff_config_last_reload_{name}")


def test_the_loop_goes_round_while_a_reload_is_prepared() -> None:
    shop = Workshop()
    shop.results = ["new"]
    shop.reloader.turn()
    assert not shop.reloader.busy
    shop.wish.ask()
    for _ in range(5):
        shop.reloader.turn()
    assert (shop.reloader.busy, shop.swapped) == (True, [])
    shop.finish()
    assert shop.swapped == [("new", threading.get_ident())]  # on the loop's own thread
    shop.reloader.turn()
    assert len(shop.swapped) == 1


@pytest.mark.parametrize(
    "error", [ConfigError("alerts.m: no"), OSError("no disk"), MemoryError("too large")]
)
def test_a_bad_one_is_refused_and_the_next_is_not(error: Exception) -> None:
    shop = Workshop()
    at_start = shop.metric("success_timestamp_seconds")
    assert shop.metric("successful") == 1
    assert at_start == pytest.approx(time.time(), abs=10)
    shop.results = [error, "good"]
    shop.wish.ask()
    shop.reloader.turn()
    shop.finish()
    assert (shop.swapped, shop.metric("successful")) == ([], 0)
    assert shop.metric("success_timestamp_seconds") == at_start
    shop.wish.ask()
    shop.reloader.turn()
    shop.finish()
    assert ([what for what, _ in shop.swapped], shop.metric("successful")) == (["good"], 1)
    assert (shop.metric("success_timestamp_seconds") or 0) > (at_start or 0)


def test_who_asks_meanwhile_is_served_afterwards() -> None:
    shop = Workshop()
    shop.results = ["first", "second"]
    shop.wish.ask()
    shop.reloader.turn()
    shop.wish.ask()
    shop.finish()
    shop.reloader.turn()
    shop.finish()
    assert [what for what, _ in shop.swapped] == ["first", "second"]


def test_sighup_is_a_wish() -> None:
    wish, before = Wish(), signal.getsignal(signal.SIGHUP)
    with wish.on_signal():
        os.kill(os.getpid(), signal.SIGHUP)
        assert wish.take()
        assert not wish.take()
    assert signal.getsignal(signal.SIGHUP) == before


# -- in the loop ---------------------------------------------------------------------------------

OTHER = replace(SCORING, model="fake@1", threshold=1.0, policy=replace(POLICY, m=1, n=5))


def service(source: MemorySource, sink: FailingSink, scorer: FakeScorer) -> Service:
    metrics = ServiceMetrics(
        CollectorRegistry(), channels=("a", "b"), max_entities=9, top_channels=2, entity_ttl_s=9
    )
    return Service(source, sink, scorer, scorer.grid(), SCORING, metrics, Health())


def in_memory() -> tuple[MemorySource, FailingSink]:
    readings: list[Reading] = log()
    cuts = [readings[i : i + 7] for i in range(0, len(readings), 7)]
    sink = FailingSink()
    batches = [batch(part, 7 * i) for i, part in enumerate(cuts)]
    return MemorySource(batches, sink.resume), sink


def other_scorer() -> FakeScorer:
    """Another model: it knows other entities by other numbers, and learns by another key."""
    learner = FakeLearner()
    learner.key = "other"
    return FakeScorer({"a": 2, "b": 0}, adaptation=learner)


def told(scores: list[SlotScore]) -> list[tuple[object, ...]]:
    return sorted(
        (s.entity, s.timestamp_ms, s.model, s.state, s.anomaly_score and round(s.anomaly_score, 4))
        for s in scores
    )


@pytest.mark.parametrize("rounds", [1, 7, 12, 16])
@pytest.mark.parametrize("what", ["alerts", "model"])
def test_a_swap_is_what_a_restart_would_be(rounds: int, what: str) -> None:
    def running() -> tuple[MemorySource, FailingSink, Service, FakeScorer]:
        source, sink = in_memory()
        scorer = FakeScorer(adaptation=FakeLearner())
        made = service(source, sink, scorer)
        for _ in range(rounds):
            assert made.step()
        return source, sink, made, scorer

    def next_scorer(scorer: FakeScorer) -> FakeScorer:
        return other_scorer() if what == "model" else scorer

    _, swapped, live, scorer = running()
    new = next_scorer(scorer)
    live.swap(new, new.grid(), OTHER)
    live.run()

    source, restarted, _, scorer = running()
    new = next_scorer(scorer)
    source.rewind()
    metrics = ServiceMetrics(
        CollectorRegistry(), channels=("a", "b"), max_entities=9, top_channels=2, entity_ttl_s=9
    )
    Service(source, restarted, new, new.grid(), OTHER, metrics, Health()).run()

    assert told(swapped.scores) == told(restarted.scores)
    assert swapped.alerts == restarted.alerts
    keys = [(s.entity, s.timestamp_ms) for s in swapped.scores]
    assert len(keys) == len(set(keys)), "a slot was told twice"
    source, undisturbed = in_memory()
    service(source, undisturbed, FakeScorer(adaptation=FakeLearner())).run()
    assert set(keys) == {(s.entity, s.timestamp_ms) for s in undisturbed.scores}
    assert {s.model for s in swapped.scores} == {SCORING.model, OTHER.model}


def test_a_smaller_budget_alone_rebuilds_nothing() -> None:
    source, sink = in_memory()
    scorer = FakeScorer()
    made = service(source, sink, scorer)
    for _ in range(9):
        made.step()
    waiting = source.lag()[PartitionId("in", 0)]
    fewer: ScoringConfig = replace(SCORING, top_channels=1)
    made.swap(scorer, scorer.grid(), fewer)
    assert source.lag()[PartitionId("in", 0)] == waiting
    made.run()
    assert {len(s.channels) for s in sink.scores if s.state == "ok" and s.channels} == {1, 2}


def test_a_smaller_budget_ends_series() -> None:
    registry = CollectorRegistry()
    metrics = ServiceMetrics(
        registry, channels=("a",), max_entities=9, top_channels=1, entity_ttl_s=9
    )
    states = {"calm": "ok", "hot": "firing", "late": "ok"}
    metrics.observe_scores(
        [SlotScore(name, 0, 1.0, 0.5, state, 0.0, "m", {}) for name, state in states.items()]  # type: ignore[arg-type]
    )
    metrics.budget(max_entities=2, top_channels=1)
    shown = {name for name in states if _series(registry, name) is not None}
    assert shown == {"calm", "hot"}
    metrics.budget(max_entities=1, top_channels=1)
    assert {name for name in states if _series(registry, name) is not None} == {"hot"}


def _series(registry: CollectorRegistry, entity: str) -> float | None:
    return registry.get_sample_value("tsdiff_anomaly_score", {"entity": entity})


# -- with bundles --------------------------------------------------------------------------------


def renamed(bundle: Path, folder: Path, **manifest: Any) -> str:  # noqa: ANN401
    """Write the same model under another name, which makes it another version."""
    old = load_bundle(bundle)
    changed = make_bundle(
        replace_manifest(old.manifest, **{"name": "other", **manifest}), old.arrays
    )
    return save_bundle(changed, folder)


def replace_manifest(manifest: Any, **changes: Any) -> Any:  # noqa: ANN401
    import msgspec

    return msgspec.structs.replace(manifest, **changes)


def test_bundles_are_checked_before_they_are_compiled(
    small_bundle: SmallBundle, tmp_path: Path
) -> None:
    def wanted(path: Path, **changes: object) -> ServiceConfig:
        return settings(model__path=path, **changes)

    loaded: list[Path] = []

    def load(config: ServiceConfig) -> Model:
        loaded.append(config.model.path)
        bundle = load_bundle(config.model.path)
        return Model(bundle, Detector(bundle, shapes=((1, 1),)))

    bundle = load_bundle(small_bundle.path)
    model = Model(bundle, Detector(bundle, shapes=((1, 1),)))
    running = Running(wanted(small_bundle.path), model)
    same = prepare(running, wanted(small_bundle.path, alerts__trigger=3), load)
    assert (same.model, same.changed, loaded) == (model, ("alerts.trigger",), [])
    version = renamed(small_bundle.path, tmp_path / "new")
    new = prepare(running, wanted(tmp_path / "new"), load)
    assert (new.model.bundle.version, new.changed) == (version, ("model.path",))
    assert new.model.detector.compilations > 0
    with pytest.raises(BundleError, match="found none"):
        prepare(running, wanted(tmp_path / "nowhere"), load)
    renamed(small_bundle.path, tmp_path / "slow", period_ms=120_000)
    with pytest.raises(ConfigError, match=r"needs a restart: bundle .* has other period_ms"):
        prepare(running, wanted(tmp_path / "slow"), load)
    with pytest.raises(ConfigError, match=r"expected grid.entity_ttl_slots of at least"):
        prepare(running, wanted(small_bundle.path, alerts__n=5000), load)
    assert loaded == [tmp_path / "new"]


# -- on a real broker ----------------------------------------------------------------------------


@pytest.fixture
def deployed(
    kafka: str, make_topic: MakeTopic, small_bundle: SmallBundle, tmp_path: Path
) -> Iterator[Deployment]:
    topic = make_topic(partitions=2, name="telemetry")
    with deployment(kafka, topic, small_bundle.path, tmp_path) as deployed:
        yield deployed


def part(history: History, begin: int, end: int) -> History:
    entities = tuple(
        replace(e, timestamps_ms=e.timestamps_ms[begin:end], values=e.values[begin:end])
        for e in history.entities
    )
    return replace(history, entities=entities)


def hang_up(worker: Worker, event: str, times: int) -> dict[str, Any]:
    """Send SIGHUP and wait until the log says how it went; return what it says."""
    worker.process.send_signal(signal.SIGHUP)

    def said() -> list[dict[str, Any]]:
        return [e for e in worker.events() if e["event"].startswith(event)]

    wait_until(lambda: len(said()) == times, f"{event} ({times})", 90, worker)
    return said()[-1]


@pytest.mark.timeout(300)
def test_a_reload_on_a_real_broker(
    deployed: Deployment, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    def write(path: Path, **sections: object) -> None:
        deployed.config = tmp_path / "tsdiff.yaml"
        deployed.config.write_text(yaml.safe_dump({"model": {"path": str(path)}, **sections}))

    metric: Callable[[], bytes] = lambda: urllib.request.urlopen(f"{url}/metrics").read()  # noqa: E731, S310
    del deployed.settings["model.path"]
    deployed.settings["metrics.listen"] = "127.0.0.1:0"
    new = tmp_path / "new"
    version = renamed(small_bundle.path, new)
    write(small_bundle.path)
    worker = deployed.start(input__max_poll_records=20)
    worker.wait_for("partition assigned", 120)
    url = next(e["url"] for e in worker.events() if e["event"] == "metrics")

    entities = len(small_bundle.live.entities)
    deployed.send(part(small_bundle.live, 0, 100), small_bundle.period_ms)
    deployed.wait_for_scores(50 * entities, worker)

    # A broken bundle, and a setting that cannot change: both refused, the old ones run on.
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    write(broken)
    assert "manifest.json" in hang_up(worker, "reload refused", 1)["error"]
    assert b"tsdiff_config_last_reload_successful 0.0" in metric()
    write(new, grid={"stale_after_slots": 7})
    refusal = hang_up(worker, "reload refused", 2)["error"]
    assert refusal.startswith("needs a restart: grid.stale_after_slots")
    deployed.send(part(small_bundle.live, 100, 150), small_bundle.period_ms)
    deployed.wait_for_scores(140 * entities, worker)
    assert {s["model"] for s in deployed.read_scores().values()} == {small_bundle.version}

    # Another alert rule, then another bundle in the middle of the work.
    write(small_bundle.path, alerts={"trigger": 0.9})
    assert hang_up(worker, "reloaded", 1)["changed"] == ["alerts.trigger"]
    assert b"tsdiff_config_last_reload_successful 1.0" in metric()
    write(new, alerts={"trigger": 0.9})
    deployed.send(part(small_bundle.live, 150, 300), small_bundle.period_ms)
    assert hang_up(worker, "reloaded", 2)["changed"] == ["model.path"]
    deployed.send(part(small_bundle.live, 300, 400), small_bundle.period_ms)
    begins = {e.entity: int(e.timestamps_ms[0]) for e in small_bundle.live.entities}
    ends = {e.entity: int(e.timestamps_ms[399]) for e in small_bundle.live.entities}
    period = small_bundle.period_ms

    def all_told() -> bool:
        told = deployed.read_scores()  # which fails where a slot is told twice
        return all(
            (name, rfc3339(end - end % period - period)) in told for name, end in ends.items()
        )

    wait_until(all_told, "the last closed slot of every entity", 90, worker)
    assert worker.stop() == 0
    scores = deployed.read_scores()
    for name, begin in begins.items():
        mine = sorted(stamp for entity, stamp in scores if entity == name)
        first = begin - begin % period
        assert mine == [rfc3339(first + n * period) for n in range(len(mine))], "a slot is lost"
        models = [scores[(name, stamp)]["model"] for stamp in mine]
        switch = models.index(version)
        assert set(models[:switch]) == {small_bundle.version}
        assert set(models[switch:]) == {version}

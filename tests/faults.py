"""Break a running deployment at random, again and again, and compare what it wrote afterwards.

    python -m tests.faults --seed 1 --rounds 200
    python -m tests.faults --seed 2 --minutes 60 --mode at-least-once

One real broker, one feeder of readings, one to three `tsdiff run` processes. Each round does one
fault; half of the rounds wait until everything is scored again, the others go on at once. At the
end a `read_committed` reader's scores, alerts and dead letters are compared with what an
undisturbed run over the same readings gives (`tsdiff backfill`'s own code). Exit status 1 on any
violation, and that includes two minutes without catching up, so it wants a machine with a core or
two to spare. The seed decides what is done; the machine decides at which instruction.
"""

import argparse
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.structs import TopicPartition

import tests.conftest  # noqa: F401  (makes kafka_node importable)
from stream.backfill import backfill
from stream.codec import rfc3339
from stream.compose import load_model
from stream.config import load_config
from stream.simulate import Fleet, inject_faults, simulate_fleet
from tests.stream.workers import Deployment, Worker, difference
from train.config import TrainConfig
from train.loop import train
from tsdiff.bundle import save_bundle
from tsdiff.detector import HISTORY_SHAPES

from kafka_node import KafkaLocal  # isort: skip  (found by tests.conftest)

PERIOD_MS: Final = 60_000
TRAINING_SLOTS: Final = 2400
ENTITIES: Final = 6
CHANNELS: Final = 6
PARTITIONS: Final = 4
TOPIC: Final = "telemetry"
# The broker here allows less than most; a drill has more faults an hour for it.
SESSION_S: Final = 3.0
SLOT_S: Final = 0.08
"""Wall time between two slots of the feed."""
MOST_SLOTS: Final = 30
"""Slots fed in one round, at most."""
CATCH_UP_S: Final = 120.0
BAD_EVERY: Final = 97
"""One message in so many cannot be read."""
MOST_TOLD: Final = 20
FALSE_ALARMS: Final = 100
"""A threshold low enough for many alerts."""
COARSER: Final = 6.0
"""A lower threshold makes scores larger, and rounding with them; learning adds a little."""

Key = tuple[str, str]


@dataclass
class Summary:
    """What was done and what came out."""

    seed: int
    mode: str
    rounds: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    workers: int = 0
    refused: int = 0
    """Rounds of workers that the broker did not commit; each was done again."""
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def text(self) -> str:
        """As lines for people."""
        lines = [
            f"seed {self.seed}, {self.mode}: {self.rounds} rounds in {self.seconds:.0f} s, "
            f"{self.workers} workers started, {self.refused} times back to the last commit",
            "faults: " + ", ".join(f"{n} {kind}" for kind, n in sorted(self.faults.items())),
        ]
        for name, counts in self.counts.items():
            told = ("expected", "seen", "missing", "repeated", "different", "unexpected")
            lines.append(f"{name}: " + ", ".join(f"{counts[what]} {what}" for what in told))
        lines += [f"VIOLATION {text}" for text in self.violations[:MOST_TOLD]]
        if len(self.violations) > MOST_TOLD:
            lines.append(f"... and {len(self.violations) - MOST_TOLD} more")
        lines.append("FAILED" if self.violations else "nothing lost, nothing wrong")
        return "\n".join(lines)


def simulated(seed: int, slots: int) -> Fleet:
    """The fleet whose first slots train the model and whose others are the feed."""
    fleet = simulate_fleet(ENTITIES, CHANNELS, slots=TRAINING_SLOTS + slots, seed=seed)
    span = 900
    for begin in range(TRAINING_SLOTS + 50, TRAINING_SLOTS + slots - span, span):
        fleet = inject_faults(fleet, seed=seed + begin, start_slot=begin, end_slot=begin + span)
    return fleet


def trained(fleet: Fleet, folder: Path) -> Path:
    """A bundle of the Gaussian anchor alone; one entity is a newcomer to it."""
    history = fleet.history(0, TRAINING_SLOTS)
    history = replace(history, entities=history.entities[:-1])
    path = folder / "bundle"
    save_bundle(train(history, TrainConfig(name="drill", network=None), period_ms=PERIOD_MS), path)
    return path


class Feeder(threading.Thread):
    """Writes slot after slot of the feed to the input topic, as far as it is let."""

    def __init__(self, servers: str, fleet: Fleet) -> None:
        super().__init__(name="feeder", daemon=True)
        self._fleet = fleet
        self._wanted: SimpleQueue[int] = SimpleQueue()
        self._wished = 0
        self.messages = 0
        self.slots = 0
        self.bad: list[bytes] = []
        self.error: BaseException | None = None
        self._producer = KafkaProducer(
            bootstrap_servers=servers,
            acks="all",
            enable_idempotence=True,
            linger_ms=5,
            delivery_timeout_ms=600_000,
            max_block_ms=600_000,
            reconnect_backoff_max_ms=1_000,
        )

    def feed(self, slots: int) -> None:
        """Let it write so many slots more."""
        self._wished += slots
        self._wanted.put(slots)

    def idle(self) -> bool:
        """Whether all that was wished is written."""
        return self.slots == self._wished

    def finish(self) -> None:
        """Wait until everything is stored; afterwards nothing can be fed."""
        self._wanted.put(0)
        self.join(600)
        if self.error is not None or self.is_alive():
            raise RuntimeError(f"the feeder failed: {self.error!r}")

    def run(self) -> None:
        """Work until told to end."""
        try:
            while slots := self._wanted.get():
                for _ in range(slots):
                    self._send_slot(TRAINING_SLOTS + self.slots)
                    self.slots += 1
                    time.sleep(SLOT_S)
            self._producer.flush(300)
            self._producer.close()
        except Exception as error:
            self.error = error

    def _send_slot(self, slot: int) -> None:
        timestamp = int(self._fleet.timestamps_ms[slot])
        for name, values in zip(self._fleet.entities, self._fleet.values[:, slot], strict=True):
            there = ~np.isnan(values)
            names = np.array(self._fleet.channels)[there].tolist()
            present = dict(zip(names, values[there].tolist(), strict=True))
            if not present:
                continue
            message = {"entity": name, "timestamp": timestamp, "values": present}
            self._producer.send(TOPIC, key=name.encode(), value=json.dumps(message).encode())
            self.messages += 1
            if self.messages % BAD_EVERY == 0:
                self.bad.append(b"{unreadable, number %d" % self.messages)
                self._producer.send(TOPIC, key=name.encode(), value=self.bad[-1])


class Drill:
    """One broker, one feeder, some workers, and what is done to them."""

    def __init__(self, seed: int, mode: str, folder: Path, say: Callable[[str], None]) -> None:
        self.random = random.Random(seed)  # noqa: S311 - it is to be repeatable, not secret
        self.folder = folder
        self.say = say
        self.summary = Summary(seed, mode)
        self.mode = mode
        self.broker = KafkaLocal(port=0, data=folder / "kafka")
        self.running: list[Worker] = []
        self._named: dict[Worker, str] = {}
        self.faults: dict[str, Callable[[], None]] = {
            "kill -9": self.kill,
            "SIGTERM": self.term,
            "worker joins": self.join,
            "worker leaves": self.leave,
            "zombie": self.zombie,
            "hiccup": self.hiccup,
            "twin": self.twin,
            "broker stop and start": self.broker_restart,
            "broker kill -9": self.broker_kill,
            "broker paused": self.broker_pause,
            "SIGTERM without a broker": self.term_without_broker,
        }

    # -- the whole -----------------------------------------------------------------------------

    def draw(self, rounds: int, only: Sequence[str] = ()) -> list[str]:
        """Kinds of fault for so many rounds."""
        return self.random.choices(list(only or self.faults), k=rounds)

    def run(self, kinds: Sequence[str], seconds: float = math.inf) -> Summary:
        """Do a round for each of `kinds`, or for as many as fit into the time."""
        began = time.monotonic()
        fleet = simulated(self.summary.seed, (2 * len(kinds) + 4) * MOST_SLOTS)
        bundle = trained(fleet, self.folder)
        self.say(f"trained in {time.monotonic() - began:.1f} s")
        self.broker.start()
        deployed: Deployment | None = None
        try:
            servers = self.broker.bootstrap_servers
            admin = KafkaAdminClient(bootstrap_servers=servers)
            admin.create_topics({TOPIC: {"num_partitions": PARTITIONS}}, wait_for_metadata=True)
            admin.close()
            self.deployed = deployed = Deployment(servers, TOPIC, bundle, self.folder)
            deployed.settings |= {
                "input.session_timeout": f"{SESSION_S:g}s",
                "delivery.mode": self.mode,
                "alerts.false_alarms_per_entity_week": FALSE_ALARMS,
            }
            self.feeder = Feeder(servers, fleet)
            self.feeder.start()
            self.start()
            self.feeder.feed(MOST_SLOTS)
            self.catch_up()
            for kind in kinds:
                if time.monotonic() - began > seconds:
                    break
                self.round(kind)
            self.finish_feed(fleet)
            scores, alerts = self.undisturbed(fleet, bundle)
            self.drain(len(scores))
            self.compare(scores, alerts)
        finally:
            if deployed is not None:
                for worker in self.running:
                    worker.signal(signal.SIGCONT)
                deployed.end()
            self.broker.stop()
        self.summary.seconds = time.monotonic() - began
        self.summary.workers = len(deployed.workers)
        self.summary.refused = sum(
            event["event"] == "going back to the last commit"
            for worker in deployed.workers
            for event in worker.events()
        )
        return self.summary

    def round(self, kind: str) -> None:
        """Feed, do one fault, and perhaps wait until all is well again."""
        began = time.monotonic()
        self.feeder.feed(self.random.randint(10, MOST_SLOTS))
        self.pause(0.2, 1.5)
        self.summary.rounds += 1
        self.summary.faults[kind] += 1
        self.faults[kind]()
        if self.random.random() < 0.5 or self.behind() > 4 * MOST_SLOTS * ENTITIES:
            self.catch_up()
        self.reap()
        took = time.monotonic() - began
        self.say(
            f"round {self.summary.rounds}: {kind}, {took:.1f} s, {len(self.running)} workers, "
            f"{self.behind()} slots behind"
        )

    def finish_feed(self, fleet: Fleet) -> None:
        """Feed up to a slot that everybody has a reading in, which closes all before it."""
        self.wait(self.feeder.idle, "the feeder goes on", 120)
        while np.isnan(fleet.values[:, TRAINING_SLOTS + self.feeder.slots - 1]).all(axis=1).any():
            self.feeder.feed(1)
            self.wait(self.feeder.idle, "the feeder goes on", 60)
        self.feeder.finish()

    def drain(self, scores: int) -> None:
        """Let everything be scored, and end in good order."""

        def drained() -> bool:
            self.reap()
            return self.scored() >= scores

        self.wait(drained, f"{scores} scores", CATCH_UP_S)
        for worker in list(self.running):
            self.end(worker)

    # -- workers -------------------------------------------------------------------------------

    def start(self, name: str | None = None) -> Worker:
        """Start a worker, each with another appetite and another patience of the broker."""
        if name is None and self.random.random() < 0.5:
            name = f"pod-{len(self.deployed.workers)}"
        worker = self.deployed.start(
            input__max_poll_records=self.random.choice([5, 20, 100, 500]),
            # Shorter and longer than a session: a dead worker's transaction may outlive its place.
            delivery__transaction_timeout=self.random.choice(["2s", "6s"]),
            input__instance_id=name or "",
        )
        if name:
            self._named[worker] = name
        self.running.append(worker)
        return worker

    def end(self, worker: Worker) -> None:
        """SIGTERM; it has to end in good order, and soon."""
        self.running.remove(worker)
        listening = worker.said("model ready")
        try:
            status = worker.stop(40)
        except subprocess.TimeoutExpired as error:
            self.violation(
                f"{worker.log.name}: not ended {error.timeout:g} s after SIGTERM{worker.abort()}"
            )
            return
        # Before it has begun to listen to signals, the system's own answer to one is right.
        if status != 0 and not (status == -signal.SIGTERM and not listening):
            self.violation(f"{worker.log.name}: status {status} after SIGTERM{worker.tail()}")

    def any_worker(self) -> Worker:
        """One of those that run; one is started if there are none."""
        return self.random.choice(self.running) if self.running else self.start()

    def reap(self) -> None:
        """Nobody ends unasked."""
        for worker in list(self.running):
            status = worker.process.poll()
            if status is not None:
                self.running.remove(worker)
                self.violation(
                    f"{worker.log.name}: ended by itself, status {status}{worker.tail()}"
                )
        if not self.running:
            self.start()

    def violation(self, text: str) -> None:
        """Write down what should not have happened."""
        self.say(f"VIOLATION {text}")
        self.summary.violations.append(f"round {self.summary.rounds}: {text}")

    # -- faults --------------------------------------------------------------------------------

    def kill(self) -> None:
        worker = self.any_worker()
        self.running.remove(worker)
        worker.kill()
        self.pause(0, 2)
        name = self._named.get(worker)
        self.start(name if name and self.random.random() < 0.7 else None)

    def term(self) -> None:
        worker = self.any_worker()
        self.end(worker)
        self.pause(0, 1)
        self.start(self._named.get(worker))

    def join(self) -> None:
        if len(self.running) >= 3:
            self.end(self.any_worker())
        self.start()

    def leave(self) -> None:
        if len(self.running) < 2:
            self.wait_for_assignment(self.start())
        self.end(self.any_worker())

    def zombie(self) -> None:
        """A worker that stops breathing, loses all it had, and wakes up."""
        if len(self.running) < 2:
            self.wait_for_assignment(self.start())
        worker = self.any_worker()
        worker.signal(signal.SIGSTOP)
        self.feeder.feed(MOST_SLOTS // 2)
        self.pause(SESSION_S + 1, SESSION_S + 5)
        worker.signal(signal.SIGCONT)
        self.pause(0, 2)

    def hiccup(self) -> None:
        worker = self.any_worker()
        worker.signal(signal.SIGSTOP)
        self.pause(0.2, SESSION_S - 1)
        worker.signal(signal.SIGCONT)

    def twin(self) -> None:
        """A second process with the name of the first, which sleeps and wakes up: one has to go.

        Mostly it is the first; but whoever was about to join again when it fell asleep joins last.
        """
        named = [w for w in self.running if w in self._named and w.said("partition assigned")]
        if not named:
            self.wait_for_assignment(self.start(f"pod-{len(self.deployed.workers)}"))
            named = self.running[-1:]
        first = self.random.choice(named)
        first.signal(signal.SIGSTOP)
        second = self.start(self._named[first])
        self.wait_for_assignment(second)
        self.pause(0, 2)
        first.signal(signal.SIGCONT)

        def ended() -> list[Worker]:
            return [w for w in (first, second) if w.process.poll() is not None]

        self.wait(lambda: bool(ended()), "one of two namesakes gives way", 40)
        for worker in ended() or [first]:
            self.running.remove(worker)
            worker.kill()
            status = worker.process.returncode
            if status != 1 or "instance_id" not in worker.log.read_text():
                text = f"{worker.log.name}: status {status}, without a reason{worker.tail()}"
                self.violation(text)

    def broker_restart(self) -> None:
        self.deployed.close_readers()
        self.broker.restart()

    def broker_kill(self) -> None:
        self.deployed.close_readers()
        self.broker.kill()
        self.pause(0, SESSION_S + 2)
        self.broker.restart()

    def broker_pause(self) -> None:
        self.broker.pause()
        self.pause(SESSION_S + 0.5, SESSION_S + 4)
        self.broker.resume()

    def term_without_broker(self) -> None:
        self.deployed.close_readers()
        self.broker.kill()
        self.pause(0, 2)
        self.end(self.any_worker())
        self.broker.restart()
        self.start()

    # -- waiting -------------------------------------------------------------------------------

    def pause(self, least_s: float, most_s: float) -> None:
        time.sleep(self.random.uniform(least_s, most_s))

    def scored(self) -> int:
        """Slots of entities that are scored."""
        records = self.deployed.records(self.deployed.scores)
        if self.mode == "exactly-once":
            return len(records)
        return len({key_of(json.loads(record.value)) for record in records})

    def behind(self) -> int:
        """Slots of entities that are fed and not scored; about as many as entities at the best."""
        return self.feeder.slots * ENTITIES - self.scored()

    def catch_up(self) -> None:
        """Wait until all that was fed is scored, but for the slots that are still open."""
        wanted = (self.feeder.slots - 2) * ENTITIES

        def caught_up() -> bool:
            self.reap()
            return self.scored() >= wanted

        self.wait(caught_up, f"{wanted} scores", CATCH_UP_S)

    def wait_for_assignment(self, worker: Worker) -> None:
        self.wait(
            lambda: worker.said("partition assigned") or worker.process.poll() is not None,
            f"{worker.log.name} has partitions",
            60,
        )

    def wait(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.feeder.error is not None:
                raise RuntimeError("the feeder failed") from self.feeder.error
            if time.monotonic() > deadline:
                tails = "".join(w.tail() for w in self.running)
                self.violation(f"not within {seconds:g} s: {what}{tails}")
                return
            time.sleep(0.2)

    # -- the verdict ---------------------------------------------------------------------------

    def undisturbed(self, fleet: Fleet, bundle: Path) -> tuple[dict[Key, Any], dict[Key, str]]:
        """Scores by entity and slot, and alerts by entity and change, of a run without faults."""
        self.check_feed()
        settings = {
            "model.path": bundle,
            "input.topic": TOPIC,
            "grid.lateness": "0s",
            "alerts.false_alarms_per_entity_week": FALSE_ALARMS,
        }
        path = self.folder / "scores.parquet"
        told = backfill(
            fleet.history(TRAINING_SLOTS, TRAINING_SLOTS + self.feeder.slots),
            load_model(bundle, HISTORY_SHAPES),
            load_config(None, settings),
            path,
        )
        scores = {
            (row["entity"], rfc3339(int(row["timestamp"].timestamp() * 1000))): row
            for row in pq.read_table(path).to_pylist()
        }
        alerts = {
            (a.entity, f"{rfc3339(a.timestamp_ms)} {a.previous} -> {a.state}"): rfc3339(a.since_ms)
            for a in told.alerts
        }
        self.say(f"an undisturbed run has {len(scores)} scores and {len(alerts)} alerts")
        return scores, alerts

    def compare(self, scores: dict[Key, Any], alerts: dict[Key, str]) -> None:
        """Scores, alerts and dead letters against those of the undisturbed run."""
        read = self.deployed.records
        live = [json.loads(record.value) for record in read(self.deployed.scores)]
        self.tally(
            "scores",
            scores,
            [(key_of(score), score) for score in live],
            lambda score, wanted: difference(score, wanted, COARSER),
        )
        changes = [json.loads(record.value) for record in read(self.deployed.alerts)]
        seen = [
            ((a["entity"], f"{a['timestamp']} {a['previous']} -> {a['state']}"), a["since"])
            for a in changes
        ]
        self.tally("alerts", alerts, seen, lambda a, b: "" if a == b else f"since {b}, got {a}")
        letters = [record.value for record in read(self.deployed.dead_letters)]
        self.tally(
            "dead letters",
            dict.fromkeys(self.feeder.bad),
            [(letter, None) for letter in letters],
            lambda _a, _b: "",
        )

    def tally(
        self,
        name: str,
        expected: dict[Any, Any],
        seen: list[tuple[Any, Any]],
        differs: Callable[[Any, Any], str],
    ) -> None:
        """Count what is missing, there twice, or other than it should be."""
        counts = self.summary.counts[name] = Counter(expected=len(expected), seen=len(seen))
        found: dict[Any, list[Any]] = defaultdict(list)
        for key, value in seen:
            found[key].append(value)

        def wrong(what: str, text: str) -> None:
            counts[what] += 1
            self.summary.violations.append(f"{name}: {text}")

        for key, wanted in expected.items():
            values = found.pop(key, [])
            if not values:
                wrong("missing", f"{key} is missing")
            if len(values) > 1:
                counts["repeated"] += 1
                if self.mode == "exactly-once":
                    self.summary.violations.append(f"{name}: {key} is there {len(values)} times")
            differences = [text for value in values if (text := differs(value, wanted))]
            if differences:
                wrong("different", f"{key}: {differences[0]}")
        for key in found:
            wrong("unexpected", f"{key} was not to be there")

    def check_feed(self) -> None:
        """The input holds what was fed, once: else the drill itself is at fault."""
        servers = self.broker.bootstrap_servers
        consumer = KafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest")
        try:
            partitions = [TopicPartition(TOPIC, number) for number in range(PARTITIONS)]
            total = sum(consumer.end_offsets(partitions).values())
        finally:
            consumer.close()
        fed = self.feeder.messages + len(self.feeder.bad)
        if total != fed:
            raise RuntimeError(f"the drill fed {fed} messages, the topic holds {total}")


def key_of(score: dict[str, Any]) -> Key:
    """Entity and slot."""
    return score["entity"], score["timestamp"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, break, tell."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, help="200, or as many as fit into --minutes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no round begins later")
    parser.add_argument("--mode", choices=["exactly-once", "at-least-once"], default="exactly-once")
    parser.add_argument("--only", action="append", default=[], help="this kind of fault only")
    parser.add_argument("--keep", type=Path, help="folder for logs and topics; kept afterwards")
    given = parser.parse_args(arguments)

    def say(text: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def run(folder: Path) -> Summary:
        drill = Drill(given.seed, given.mode, folder, say)
        # More rounds than fit: the quickest takes a second or two.
        rounds = 200 if math.isinf(given.minutes) else int(given.minutes * 60)
        return drill.run(drill.draw(given.rounds or rounds, given.only), given.minutes * 60)

    # As Ctrl-C: what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if given.keep is not None:
        given.keep.mkdir(parents=True)
        summary = run(given.keep)
    else:
        with tempfile.TemporaryDirectory(prefix="tsdiff-faults-") as folder:
            summary = run(Path(folder))
    sys.stdout.write(summary.text() + "\n")
    return 1 if summary.violations else 0


if __name__ == "__main__":
    sys.exit(main())

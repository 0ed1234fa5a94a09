"""Tries everything that the service needs before it is needed, and says how to mend what is wrong.

Each check is a generator of findings; one that cannot be tried, since an earlier one failed, says
so. Nothing is written to the brokers: topics that are missing are not created here.
"""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError
from kafka.structs import TopicPartition

from stream.clients import connect
from stream.compose import Model, decoder_of, grid_of, load_model
from stream.config import ServiceConfig, load_config
from stream.errors import DecodeError, RetryableError
from stream.formats import Decoded
from stream.grid import Grid
from stream.topics import connect_admin
from tsdiff.errors import TsdiffError

Status = Literal["ok", "wrong", "skipped"]
# Newest messages looked at in each partition, and how long that may take.
SAMPLE: Final = 500
SAMPLE_S: Final = 20.0
# Clocks of machines that ask a time server differ by less; timestamps are compared to wall time.
MOST_SKEW_S: Final = 60.0


@dataclass(frozen=True)
class Finding:
    """What one check found; `mend` says what to do where it is wrong."""

    check: str
    status: Status
    said: str
    mend: str = ""


@dataclass(frozen=True)
class Sampled:
    """One message of the sample: what it held, or why it could not be read."""

    partition: int
    keyed: bool
    appended_ms: int
    readings: tuple[Decoded, ...] = ()
    reason: str = ""


@dataclass
class Sample:
    """The newest messages of every partition."""

    partitions: int
    messages: list[Sampled] = field(default_factory=list)

    @property
    def readings(self) -> list[tuple[Sampled, Decoded]]:
        """Every reading beside the message that held it."""
        return [(message, reading) for message in self.messages for reading in message.readings]


def examine(
    path: Path | None,
    overrides: Mapping[str, Any],
    clock: Callable[[], float] = time.time,
) -> list[Finding]:
    """Try everything in order of need."""
    try:
        config = load_config(path, overrides)
    except TsdiffError as error:
        return [Finding("config", "wrong", str(error), "mend the settings; README lists every key")]
    found = [Finding("config", "ok", "the settings can be read")]
    grid, model = None, None
    try:
        model = load_model(config.model.path, detect=config.detect)
        grid = grid_of(model, config)
        found.append(_bundle(model))
    except TsdiffError as error:
        mend = "train a bundle (tsdiff train), or name another one in model.path"
        found.append(Finding("bundle", "wrong", str(error), mend))
    try:
        admin = connect_admin(config, {})
    except RetryableError as error:
        mend = (
            "start it, or mend input.bootstrap_servers and input.security (protocol, user, files)"
        )
        return [
            *found,
            Finding("broker", "wrong", str(error), mend),
            _skipped("topics", "no broker"),
        ]
    try:
        found.append(Finding("broker", "ok", f"answers as {_servers(config)}"))
        topics = {t["name"]: len(t["partitions"]) for t in admin.describe_topics()}
        found += _topics(config, admin, topics, grid)
        found.append(_transactions(config))
        if config.input.topic in topics:
            sample = take_sample(config)
            found += judge_sample(sample, config, model, clock())
        else:
            found.append(_skipped("sample", "there is no input topic"))
    except KafkaError as error:
        mend = (
            "look at the brokers' log; rights to describe topics and to read the input are needed"
        )
        found.append(Finding("broker", "wrong", f"refuses: {error!r}", mend))
    finally:
        admin.close()
    return found


def _servers(config: ServiceConfig) -> str:
    return ",".join(config.input.bootstrap_servers)


def _skipped(check: str, why: str) -> Finding:
    return Finding(check, "skipped", f"not tried: {why}")


def _bundle(model: Model) -> Finding:
    detector = model.detector
    said = (
        f"{model.bundle.version}: {len(detector.channels)} channels, a reading every "
        f"{detector.period_ms / 1000:g} s"
    )
    return Finding("bundle", "ok", said)


# -- topics ------------------------------------------------------------------------------------


def _topics(
    config: ServiceConfig, admin: KafkaAdminClient, topics: Mapping[str, int], grid: Grid | None
) -> Iterator[Finding]:
    name = config.input.topic
    partitions = topics.get(name)
    if partitions is None:
        yield Finding("input topic", "wrong", f"{name} does not exist", f"create topic {name}")
        return
    yield Finding("input topic", "ok", f"{name} has {partitions} partitions")
    if grid is not None:
        yield _retention(_settings(admin, name), grid)
    outputs = config.outputs
    for key in ("scores", "alerts", "dead_letters", "state"):
        topic, check = getattr(outputs, key), f"topic of outputs.{key}"
        if topic not in topics:
            if outputs.create_topics:
                yield Finding(check, "ok", f"{topic} is missing; tsdiff run will create it")
            else:
                mend = f"create it with {partitions} partitions, or set outputs.create_topics"
                yield Finding(check, "wrong", f"{topic} is missing", mend)
            continue
        policy = _settings(admin, topic).get("cleanup.policy", "")
        if key in {"alerts", "state"} and "compact" not in policy:
            mend = f"set cleanup.policy=compact on {topic}"
            yield Finding(check, "wrong", f"{topic} is not compacted, but {policy}", mend)
        elif key == "state" and "delete" in policy:
            mend = f"set cleanup.policy=compact on {topic}: state of quiet entities would vanish"
            yield Finding(check, "wrong", f"{topic} is also deleted by time", mend)
        elif key == "state" and topics[topic] < partitions:
            said = f"{topic} has {topics[topic]} partitions, {name} has {partitions}"
            yield Finding(check, "ok", f"{said}; tsdiff run will add them")
        else:
            yield Finding(check, "ok", f"{topic} has {topics[topic]} partitions")


def _settings(admin: KafkaAdminClient, topic: str) -> dict[str, str]:
    resource = ConfigResource(ConfigResourceType.TOPIC, topic)
    found = admin.describe_configs([resource], config_filter="all")["topic"][topic]
    return {k: str(v["value"] if isinstance(v, dict) else v) for k, v in found.items()}


def _retention(settings: Mapping[str, str], grid: Grid) -> Finding:
    kept_ms = int(settings.get("retention.ms", "-1"))
    needed_ms = grid.replay_slots * grid.period_ms
    needed = f"a restart reads {needed_ms / 3.6e6:.1f} h again"
    if 0 <= kept_ms < needed_ms:
        said = f"messages are kept for {kept_ms / 3.6e6:.1f} h, {needed}"
        return Finding("retention", "wrong", said, f"set retention.ms to {2 * needed_ms} or more")
    return Finding("retention", "ok", f"messages are kept for long enough; {needed}")


def _transactions(config: ServiceConfig) -> Finding:
    if config.delivery.mode != "exactly-once":
        return _skipped("transactions", "delivery.mode is at-least-once")
    try:
        kwargs = config.producer_kwargs(f"{config.input.group}-doctor")
        producer = connect(KafkaProducer, **kwargs, max_block_ms=15_000)
        try:
            producer.init_transactions()
        finally:
            producer.close(timeout=5)
    except KafkaError as error:
        mend = (
            "allow the service to write with transactional ids that begin with the group's name, "
            "see to transaction.state.log.replication.factor, or set delivery.mode: at-least-once"
        )
        return Finding("transactions", "wrong", f"the broker refuses: {error!r}", mend)
    return Finding("transactions", "ok", "the broker grants them")


# -- what arrives ------------------------------------------------------------------------------


def take_sample(config: ServiceConfig) -> Sample:
    """Read the newest messages of every partition, as nobody's group member.

    Raises:
        KafkaError: the broker does not let us.

    """
    decoder = decoder_of(config)
    kwargs = {**config.input.consumer_kwargs(), "group_id": None, "group_instance_id": None}
    with connect(KafkaConsumer, **kwargs) as consumer:
        numbers = consumer.partitions_for_topic(config.input.topic) or set()
        partitions = [TopicPartition(config.input.topic, number) for number in sorted(numbers)]
        sample = Sample(len(partitions))
        consumer.assign(partitions)
        begins, ends = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
        for partition in partitions:
            consumer.seek(partition, max(begins[partition], ends[partition] - SAMPLE))
        deadline = time.monotonic() + SAMPLE_S
        while any(consumer.position(p) < ends[p] for p in partitions):
            if time.monotonic() > deadline:
                break
            for partition, records in consumer.poll(timeout_ms=500).items():
                for record in records:
                    message = _sampled(partition.partition, record, decoder)
                    sample.messages.append(message)
    return sample


def _sampled(partition: int, record: Any, decoder: Any) -> Sampled:  # noqa: ANN401
    keyed = record.key is not None
    try:
        readings = tuple(decoder(record.value or b""))
    except DecodeError as error:
        return Sampled(partition, keyed, record.timestamp, reason=error.reason)
    return Sampled(partition, keyed, record.timestamp, readings)


def judge_sample(
    sample: Sample, config: ServiceConfig, model: Model | None, now: float
) -> Iterator[Finding]:
    """Format, keys, clocks, channels and period of what arrives."""
    if not sample.messages:
        yield _skipped("sample", "the input topic is empty; run it again once readings arrive")
        return
    yield _format(sample, config)
    if not sample.readings:
        return
    yield _keys(sample, config)
    yield _clock(sample, config, now)
    if model is not None:
        yield _channels(sample, model)
        yield _period(sample, model)


def _format(sample: Sample, config: ServiceConfig) -> Finding:
    reasons = Counter(message.reason for message in sample.messages if message.reason)
    total, bad = len(sample.messages), sum(reasons.values())
    if not bad:
        return Finding("format", "ok", f"{total} messages read as {config.input.format}")
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    mend = "set input.format to what the producer writes, or mend the producer"
    return Finding("format", "wrong", f"{bad} of {total} messages cannot be read: {told}", mend)


def _keys(sample: Sample, config: ServiceConfig) -> Finding:
    homes: dict[str, set[int]] = defaultdict(set)
    for message, reading in sample.readings:
        homes[reading.entity].add(message.partition)
    spread = sorted(entity for entity, where in homes.items() if len(where) > 1)
    unkeyed = sum(not message.keyed for message in sample.messages)
    mend = (
        "key the messages by entity, the same way in all producers; or run "
        f"`tsdiff rekey -c ... --to {config.input.topic}-keyed` and read that topic"
    )
    if spread:
        said = f"{len(spread)} of {len(homes)} entities are in several partitions, as {spread[0]!r}"
        return Finding("keys", "wrong", said, mend)
    if unkeyed and sample.partitions > 1:
        said = f"{unkeyed} of {len(sample.messages)} messages have no key: they will be spread"
        return Finding("keys", "wrong", said, mend)
    return Finding("keys", "ok", f"each of {len(homes)} entities is in one partition")


def _clock(sample: Sample, config: ServiceConfig, now: float) -> Finding:
    newest = max(message.appended_ms for message in sample.messages) / 1000
    if newest > now + MOST_SKEW_S:
        said = f"the newest message was appended {newest - now:.0f} s in the future"
        mend = "set the clocks of brokers, producers and this machine by a time server"
        return Finding("clocks", "wrong", said, mend)
    ahead: dict[str, float] = {}
    for message, reading in sample.readings:
        since = (reading.timestamp_ms - message.appended_ms) / 1000
        ahead[reading.entity] = max(since, ahead.get(reading.entity, since))
    first = max(ahead, key=lambda entity: ahead[entity])
    if ahead[first] > MOST_SKEW_S:
        some = sum(seconds > MOST_SKEW_S for seconds in ahead.values())
        said = f"{some} entities are ahead of Kafka's clock, {first!r} by {ahead[first]:.0f} s"
        mend = "mend the sender's clock or time zone: it closes the slots of its whole partition"
        return Finding("clocks", "wrong", said, mend)
    delay = statistics.median(-seconds for seconds in ahead.values())
    return Finding("clocks", "ok", f"readings are {delay:.0f} s old when they are appended")


def _channels(sample: Sample, model: Model) -> Finding:
    seen = {channel for _, reading in sample.readings for channel in reading.values}
    known = set(model.detector.channels)
    missing, unknown = sorted(known - seen), sorted(seen - known)
    extra = f"; {len(unknown)} that it does not know are ignored" if unknown else ""
    if missing:
        said = f"{len(missing)} of the bundle's {len(known)} channels do not arrive: "
        said += ", ".join(missing[:5]) + extra
        mend = "have them sent under the names of the training, or train without them"
        return Finding("channels", "wrong", said, mend)
    return Finding("channels", "ok", f"all {len(known)} of the bundle arrive{extra}")


def _period(sample: Sample, model: Model) -> Finding:
    period_ms = model.detector.period_ms
    times: dict[str, set[int]] = defaultdict(set)
    for _, reading in sample.readings:
        times[reading.entity].add(reading.timestamp_ms // period_ms)
    gaps = [
        after - before
        for slots in times.values()
        for before, after in zip(sorted(slots)[:-1], sorted(slots)[1:], strict=True)
    ]
    if not gaps:
        return _skipped("period", "no entity has readings of two slots in the sample")
    typical = statistics.median(gaps)
    if typical > 1.5:
        said = f"readings come every {typical * period_ms / 1000:g} s, the bundle's period is "
        mend = "train a bundle with the period of the readings, or send them more often"
        return Finding("period", "wrong", f"{said}{period_ms / 1000:g} s", mend)
    return Finding("period", "ok", f"a reading in every slot of {period_ms / 1000:g} s")


def as_dict(found: list[Finding]) -> dict[str, Any]:
    """For machines: whether all is well, and every finding."""
    return {
        "ok": all(finding.status != "wrong" for finding in found),
        "findings": [asdict(finding) for finding in found],
    }

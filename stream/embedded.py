"""A Kafka broker inside this process, and the service beside it: for the demo and for tests.

The broker is the mock cluster of librdkafka, which confluent-kafka brings along. It keeps records
in memory and speaks enough of the protocol for kafka-python, as long as that is told a version:

- topics appear when they are asked for, with four partitions each; they cannot be created by an
  admin, grown, configured or compacted;
- consumer groups, cooperative assignment and committed offsets with metadata work; the first
  member of a group waits three seconds for others;
- transactions hide what was aborted, but the offsets sent with them are not kept and their markers
  carry no checksum, so exactly-once is not to be had: services here use at-least-once.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import msgspec
from kafka import KafkaProducer
from kafka.errors import KafkaError
from prometheus_client import CollectorRegistry

from stream.compose import Model, run_service
from stream.config import ServiceConfig, parse_listen
from stream.errors import StreamError
from stream.stop import Stop
from tsdiff.errors import TsdiffError

# kafka-python would ask the broker for its version by requests that the mock does not know.
CLIENT_OPTIONS: Final[Mapping[str, Any]] = {"api_version": (2, 0)}
DELIVERY_MODE: Final = "at-least-once"
_START_SECONDS: Final = 10.0
# Longer than any round of the loop, shorter than anybody's patience.
_STOP_SECONDS: Final = 20.0


def missing_extra(package: str, command: str = "tsdiff demo") -> TsdiffError:
    """Say what to install."""
    return TsdiffError(
        f"`{command}` needs the package {package}, which is not installed; "
        "install it with: pip install 'tsdiff[demo]'"
    )


class EmbeddedBroker:
    """One broker on a free local port, gone when it is closed.

    Raises:
        TsdiffError: confluent-kafka is not installed, or its mock cluster does not answer.

    """

    def __init__(self) -> None:
        try:
            from confluent_kafka import KafkaException, Producer  # noqa: PLC0415 - optional
        except ModuleNotFoundError:
            raise missing_extra("confluent-kafka") from None
        # Its own log would be written across the demo's table, and says nothing of use.
        settings = {"test.mock.num.brokers": 1, "bootstrap.servers": "mock", "log_level": 0}
        # The cluster lives as long as the client that it was made with.
        self._cluster: Any = Producer(settings)
        try:
            brokers = list(self._cluster.list_topics(timeout=_START_SECONDS).brokers.values())
        except KafkaException as error:
            raise StreamError(f"the embedded broker does not answer: {error}") from error
        self.address = f"{brokers[0].host}:{brokers[0].port}"
        # kafka-python tells at length of the one connection that the mock closes (see above).
        logging.getLogger("kafka").setLevel(logging.CRITICAL)

    def client_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for any kafka-python client."""
        return {"bootstrap_servers": [self.address], **CLIENT_OPTIONS}

    def create_topics(self, config: ServiceConfig) -> None:
        """Make the topics of a service appear.

        Raises:
            StreamError: one did not.

        """
        names = config.outputs
        try:
            with KafkaProducer(**self.client_kwargs()) as producer:
                for name in (
                    config.input.topic,
                    names.scores,
                    names.alerts,
                    names.dead_letters,
                    names.state,
                ):
                    producer.partitions_for(name)
        except KafkaError as error:
            raise StreamError(f"the embedded broker makes no topic: {error!r}") from error

    def close(self) -> None:
        """End the broker and forget its records."""
        self._cluster = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ReadingsThread(threading.Thread):
    """Writes readings to the embedded broker for as long as its `with` lasts.

    A subclass says which, in `feed`; a failure of it is kept for `check`.
    """

    def __init__(self, broker: EmbeddedBroker, topic: str) -> None:
        super().__init__(name="tsdiff-readings", daemon=True)
        self._topic = topic
        self._producer = KafkaProducer(**broker.client_kwargs(), acks="all", linger_ms=5)
        self._stopping = threading.Event()
        self._failure: Exception | None = None

    def feed(self) -> None:
        """Send readings until they are all sent, or until `_stopping` is set."""
        raise NotImplementedError

    def run(self) -> None:
        """Feed, and keep what ended it too early."""
        try:
            self.feed()
        except Exception as error:  # handed to whoever watches, by `check`
            self._failure = error

    def check(self) -> None:
        """Raise what ended the readings too early, if anything did."""
        if self._failure is not None:
            raise StreamError(f"readings could not be delivered: {self._failure!r}")

    def send(self, entity: str, timestamp_ms: int, values: Mapping[str, float]) -> None:
        """Hand over one reading; NaN, a missing cell, is written as null."""
        reading = {"entity": entity, "timestamp": timestamp_ms, "values": values}
        self._producer.send(self._topic, value=msgspec.json.encode(reading), key=entity.encode())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self.join(10)
        self._producer.close(timeout=1)


class EmbeddedService:
    """`tsdiff run`, as it is, in a thread of its own; it starts and stops with the `with`.

    Where the address of /metrics is taken, another port is, and `say` is told.
    """

    def __init__(self, config: ServiceConfig, model: Model, say: Callable[[str], None]) -> None:
        self.registry = CollectorRegistry()
        self.url = ""
        self._config = config
        self._model = model
        self._say = say
        self._listens = False
        self._stop = Stop()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tsdiff-service", daemon=True)

    def _run(self) -> None:
        try:
            try:
                self._serve(self._config)
            except StreamError as error:
                if self._listens:
                    raise
                self._say(f"{error}; a free port is taken instead")
                self.registry = CollectorRegistry()
                self._serve(_on_a_free_port(self._config))
        except BaseException as error:  # handed to whoever watches, by `check`
            self._failure = error

    def _serve(self, config: ServiceConfig) -> None:
        run_service(
            config,
            self._model,
            self._stop,
            registry=self.registry,
            client_options=CLIENT_OPTIONS,
            on_listening=self._listening,
        )

    def _listening(self, url: str) -> None:
        self._listens = True
        self.url = url

    def check(self) -> None:
        """Raise what ended the service, if anything did."""
        if self._failure is not None:
            raise self._failure

    def counted(self, metric: str) -> int:
        """Value of one of the service's counters."""
        return int(self.registry.get_sample_value(metric) or 0)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.request()
        self._thread.join(_STOP_SECONDS)


def _on_a_free_port(config: ServiceConfig) -> ServiceConfig:
    host, _ = parse_listen(config.metrics.listen)
    listen = f"[{host}]:0" if ":" in host else f"{host}:0"
    metrics = config.metrics.model_copy(update={"listen": listen})
    return config.model_copy(update={"metrics": metrics})

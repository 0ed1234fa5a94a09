"""kafka-python's clients, made so that nothing of them is left when they cannot connect."""

import threading
from collections.abc import Callable
from typing import Any

from kafka.errors import KafkaError, KafkaTimeoutError


def connect(client: Any, **settings: Any) -> Any:  # noqa: ANN401 - kafka-python is untyped
    """Make a `KafkaConsumer`, `KafkaProducer` or `KafkaAdminClient`.

    A constructor of kafka-python that raises leaves its thread and four file descriptors behind;
    a service that waits for its broker would run out of them within the hour.
    """
    begun: list[Any] = []
    make_net: Callable[..., Any] = client.DEFAULT_CONFIG["kafka_client"]

    def remember(**options: Any) -> Any:  # noqa: ANN401
        begun.append(make_net(**options))
        return begun[-1]

    try:
        return client(**settings, kafka_client=remember)
    except BaseException:
        for net in begun:
            net.close()
        raise


def within(seconds: float, call: Callable[[], None]) -> None:
    """Call what kafka-python waits for without end, such as a transaction's commit.

    Raises:
        KafkaTimeoutError: it took longer; it goes on in its own thread, which a closed client ends.

    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="kafka-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise KafkaTimeoutError(f"no answer within {seconds:g} s")
    if failures:
        raise failures[0]


def abandon(producer: Any) -> None:  # noqa: ANN401
    """Close a `KafkaProducer` at once, whatever it still has to send."""
    try:
        producer.close(timeout=0)
    except KafkaError:
        # 3.0.12 flushes first, and raises before it ends its thread.
        producer._sender.force_close()

"""kafka-python's clients, made so that nothing of them is left when they cannot connect."""

from collections.abc import Callable
from typing import Any


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

"""kafka-python's clients, made so that nothing of them is left when they cannot connect."""

import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from kafka.errors import (
    IllegalSaslStateError,
    KafkaConfigurationError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    RequestTimedOutError,
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
)
from kafka.net.compat import KafkaNetClient
from kafka.net.inet import KafkaNetSocket
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector
from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport

from stream.errors import StreamError
from stream.headers import tolerate

# What trying again does not change: OpenSSL's names for certificates that are missing or not
# trusted.
_HOPELESS: Final = re.compile(r"CERTIFICATE|UNKNOWN_CA|HANDSHAKE_FAILURE")


class _Manager(KafkaConnectionManager):  # type: ignore[misc]
    """Remembers why the last connection failed; kafka-python itself says "timed out" at the end."""

    reason: BaseException | None = None

    def get_connection(self, node_id: Any, **options: Any) -> Any:  # noqa: ANN401
        connection = super().get_connection(node_id, **options)
        connection.init_future.add_errback(self._remember)
        connection.close_future.add_errback(self._remember)
        return connection

    def _remember(self, reason: BaseException) -> None:
        vague = isinstance(reason, KafkaTimeoutError | RequestTimedOutError)
        if self.reason is None or not (vague or _hopeless(self.reason)):
            self.reason = reason

    async def _socket(self, node: Any, timeout_at: float | None) -> socket.socket:  # noqa: ANN401
        """Connect to the first of a host's addresses that answers.

        kafka-python 3.0.12 leaves the sockets of the others to the garbage collector, which may be
        long in coming.
        """
        sockets = KafkaNetSocket(self.config["proxy_url"])
        failure: Exception = KafkaConnectionError(f"no address of {node.host} is known")
        for family, kind, protocol, _, address in sockets.dns_lookup(node.host, node.port):
            made: socket.socket = sockets.socket(family, kind, protocol)
            try:
                made.setblocking(False)
                for option in self.config["socket_options"]:
                    made.setsockopt(*option)
                await sockets.sock_connect(self._net, made, address, timeout_at=timeout_at)
                return made
            except BaseException as error:
                made.close()
                if not isinstance(error, OSError | KafkaError):
                    raise
                failure = error
        raise KafkaConnectionError(f"unable to connect: {failure}") from failure

    async def _build_transport(self, node: Any, timeout_at: float | None = None) -> Any:  # noqa: ANN401
        sock = await self._socket(node, timeout_at)
        if self.ssl_enabled:
            context = self.config["ssl_context"]
            transport = KafkaSSLTransport(self._net, sock, host=node.host, ssl_context=context)
        else:
            transport = KafkaTCPTransport(self._net, sock, host=node.host)
        try:
            await transport.handshake()
        except BaseException as error:
            # kafka-python 3.0.12 leaves the socket to the garbage collector, also when it is closed
            # before the handshake ends (GeneratorExit).
            transport.abort(error)
            if isinstance(error, Exception):
                raise KafkaConnectionError(f"Handshake failed: {error}") from error
            raise
        receive = transport._sock_recv

        def receive_all() -> tuple[bytes, Exception | None]:
            # A broker says what is wrong with a password and hangs up; kafka-python 3.0.12 forgets
            # bytes that come together with the end. The end comes again at the next look.
            data, error = receive()
            return data, None if data else error

        transport._sock_recv = receive_all
        return transport


class _Client(KafkaNetClient):  # type: ignore[misc]
    """kafka-python's own, with that manager."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        net = NetworkSelector(**options)
        self.manager = _Manager(net, **options)
        super().__init__(net, self.manager)


def _hopeless(reason: BaseException | None) -> bool:
    refused = (SaslAuthenticationFailedError, UnsupportedSaslMechanismError, IllegalSaslStateError)
    return isinstance(reason, refused) or _HOPELESS.search(repr(reason)) is not None


def connect(client: Any, **settings: Any) -> Any:  # noqa: ANN401 - kafka-python is untyped
    """Make a `KafkaConsumer`, `KafkaProducer` or `KafkaAdminClient`.

    A constructor of kafka-python that raises leaves its thread and four file descriptors behind;
    a service that waits for its broker would run out of them within the hour.

    Raises:
        StreamError: the brokers do not let us in: to try again would change nothing.
        KafkaError: whatever else kept it from connecting, with the reason where one is known.

    """
    tolerate()
    begun: list[_Client] = []

    def remember(**options: Any) -> _Client:  # noqa: ANN401
        begun.append(_Client(**options))
        return begun[-1]

    try:
        return client(**settings, kafka_client=remember)
    except BaseException as error:
        for made in begun:
            made.close()
        reason = begun[0].manager.reason if begun else None
        if not isinstance(error, KafkaError) or isinstance(error, KafkaConfigurationError):
            raise
        if _hopeless(reason):
            servers = ",".join(settings["bootstrap_servers"])
            raise StreamError(
                f"the brokers at {servers} do not let us in: {_in_words(reason)}; "
                "see input.security"
            ) from error
        if reason is not None:
            raise type(error)(f"{error}: {_in_words(reason)}") from error
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


def deliver(producer: Any, sent: Iterable[Any], seconds: float) -> None:  # noqa: ANN401
    """Wait until the broker has all that was `sent` (futures).

    Raises:
        KafkaError: that it has not, or refuses some of it.

    """
    producer.flush(seconds)
    for future in sent:
        if not future.succeeded():
            future.get(timeout=0)


def end_transaction(
    producer: Any,  # noqa: ANN401 - kafka-python is untyped
    sent: Iterable[Any],
    offsets: Mapping[Any, Any],
    group: Any,  # noqa: ANN401
    seconds: float,
) -> None:
    """Add the group's offsets to a transaction, and commit it once all that was `sent` is there.

    A commit alone would not tell. Where the records took longer than the transaction's timeout, the
    broker has given it up, and refuses them by their old epoch; kafka-python 3.0.12 then takes a
    new epoch, finds nothing to commit under it, and says that all is committed.

    Raises:
        KafkaError: it is not committed.

    """
    producer.send_offsets_to_transaction(offsets, group)
    deliver(producer, sent, seconds)
    producer.commit_transaction()


def abandon(producer: Any) -> None:  # noqa: ANN401
    """Close a `KafkaProducer` at once, whatever it still has to send."""
    try:
        producer.close(timeout=0)
    except KafkaError:
        # 3.0.12 flushes first, and raises before it ends its thread.
        producer._sender.force_close()


def _in_words(reason: BaseException | None) -> str:
    """The reason without the names of classes, and without OpenSSL's source lines."""
    text = re.sub(r"\s*\(_ssl\.c:\d+\)", "", str(reason))
    return " ".join(re.sub(r"^(\[Error \d+\] )?(\w+Error: )+", "", text).split())

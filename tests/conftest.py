"""The real parts that tests need: Apache Kafka, labelled telemetry, Prometheus' tools.

Where one cannot be had, the tests that need it skip and print the reason. With `CI` set in the
environment they fail instead, so that a broken CI machine cannot look like a passing suite.
"""

import logging
import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import pytest
import structlog

ROOT = Path(__file__).resolve().parent.parent
# A folder with a hyphen in its name, and outside of any package: its scripts run uninstalled.
sys.path.insert(0, str(ROOT / "deploy" / "kafka-local"))

from kafka_node import KafkaLocal, KafkaLocalError  # noqa: E402  (found by the line above)

from tsdiff.cli import use_one_blas_thread  # noqa: E402

# For the workers of pytest-xdist, which are started after this, as the commands have it.
use_one_blas_thread()

MARKED_BY_FIXTURE = {"kafka": "kafka", "make_topic": "kafka", "telemetry": "data"}


class MakeTopic(Protocol):
    """Creates a topic with a name nobody else uses; waits until it has leaders."""

    def __call__(
        self, partitions: int = 1, config: Mapping[str, str] | None = None, name: str = "test"
    ) -> str:
        """Return the topic's name, which begins with `name`."""
        ...


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """Commands set up logging for a process of their own: to a stream that is a test's."""
    root, kafka = logging.getLogger(), logging.getLogger("kafka")
    before = root.handlers, root.level, kafka.level
    yield
    root.handlers, root.level, kafka.level = before
    structlog.reset_defaults()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures they use, so that `-m "not kafka"` needs no bookkeeping.

    Slow ones come first, and with them their files: a long one begun last would be waited for.
    """
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in MARKED_BY_FIXTURE:
                item.add_marker(MARKED_BY_FIXTURE[fixture])
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def unavailable(reason: str) -> NoReturn:
    """Skip the test for `reason`, or fail it where `CI` is set."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (CI is set, so this is not skipped)", pytrace=False)
    pytest.skip(reason)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_program(name: str, package: str) -> str:
    """Return the path of a program; `package` is what Debian calls its package."""
    path = shutil.which(name)
    if path is None:
        unavailable(f"{name} is not in PATH; install it (Debian: {package})")
    return path


@pytest.fixture(scope="session")
def promtool() -> str:
    """Return the path of promtool, which checks Prometheus' rules and configuration."""
    return require_program("promtool", "prometheus")


@pytest.fixture(scope="session")
def amtool() -> str:
    """Return the path of amtool, which checks Alertmanager's configuration."""
    return require_program("amtool", "prometheus-alertmanager")


@pytest.fixture(scope="session")
def telemetry() -> Path:
    """Return the folder of labelled telemetry: `TSDIFF_DATA`, or `../shared/data`."""
    folder = Path(os.environ.get("TSDIFF_DATA") or ROOT.parent / "shared" / "data")
    if not any(folder.glob("*/*/train.parquet")):
        # Never a failure in CI: the data's licences keep it out of the repository.
        pytest.skip("no labelled telemetry; set TSDIFF_DATA to a folder <set>/<entity>/*.parquet")
    return folder


@pytest.fixture(scope="session")
def kafka() -> Iterator[str]:
    """Return the bootstrap servers of a real broker that all tests share.

    `KAFKA_BOOTSTRAP_SERVERS` where it is set, else one node started for this session. Tests that
    break their broker start their own: `KafkaLocal` in `deploy/kafka-local/kafka_node.py`.
    """
    given = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
    if given:
        host, _, port = given.split(",")[0].rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, ValueError) as error:
            unavailable(f"no Kafka at KAFKA_BOOTSTRAP_SERVERS={given}: {error}")
        yield given
        return
    try:
        node = KafkaLocal(port=0).start()
    except KafkaLocalError as error:
        unavailable(f"no local Kafka: {error}")
    try:
        yield node.bootstrap_servers
    finally:
        node.stop()


@pytest.fixture
def make_topic(kafka: str) -> Iterator[MakeTopic]:
    """Return a function that creates topics; they are deleted when the test ends."""
    from kafka import KafkaAdminClient

    from stream.topics import await_topics

    made: list[str] = []
    admin = KafkaAdminClient(bootstrap_servers=kafka)

    def make(
        partitions: int = 1, config: Mapping[str, str] | None = None, name: str = "test"
    ) -> str:
        topic = f"{name}-{uuid.uuid4().hex[:12]}"
        options = {"num_partitions": partitions, "configs": dict(config or {})}
        admin.create_topics({topic: options})
        made.append(topic)
        await_topics(admin, [topic])
        return topic

    try:
        yield make
    finally:
        if made:
            admin.delete_topics(made, raise_errors=False)
        admin.close()


@dataclass(frozen=True)
class Certificates:
    """PEM files: an authority, what it signed, and an authority that nobody trusts."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def other_ca(self) -> Path:
        return self.folder / "other.pem"

    def certificate(self, name: str) -> Path:
        """The certificate of `server` or `client`."""
        return self.folder / f"{name}.pem"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Make certificates for 127.0.0.1, good for two days."""
    openssl = require_program("openssl", "openssl")
    folder = tmp_path_factory.mktemp("certificates")
    # The machine's own configuration would add what it likes.
    (folder / "openssl.cnf").write_text("[req]\ndistinguished_name = dn\n[dn]\n")

    def make(name: str, *options: str) -> None:
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2"]
        command = [openssl, "req", "-config", "openssl.cnf", "-x509", *curve, *files]
        command += ["-subj", f"/CN=tsdiff-{name}", *options]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    authority = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"]
    for name in ("ca", "other"):
        make(name, *(text for entry in authority for text in ("-addext", entry)))
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE"]
    make("server", *signed, "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")
    make("client", *signed)
    return Certificates(folder)

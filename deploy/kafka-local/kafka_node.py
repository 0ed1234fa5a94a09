"""One real Apache Kafka node: a combined KRaft broker and controller on the loopback interface.

The jars come from Maven (see `pom.xml`) and are kept in a cache folder. Standard library only.
The command line is in `kafka_local.py`; tests use the class:

    with KafkaLocal(port=0) as kafka:
        client = KafkaConsumer(bootstrap_servers=kafka.bootstrap_servers)
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

HOST = "127.0.0.1"
MINIMUM_JAVA = 17
POM = Path(__file__).with_name("pom.xml")
LOG_TAIL_LINES = 15

# Everything that a single node, or a test that cannot wait, needs to have changed.
SETTINGS: dict[str, str] = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "auto.create.topics.enable": "false",
    "num.partitions": "1",
    "default.replication.factor": "1",
    "min.insync.replicas": "1",
    # One node cannot hold three replicas; few partitions make the first commit fast.
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "2",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "2",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    # A group of one needs no 3 s wait for others; short sessions let tests see a member die.
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "500",
    # What a killed transactional producer left open ends at its timeout, not up to 10 s later.
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
    # A message of 10 MB must be possible, so that refusing it downstream can be tested.
    "message.max.bytes": str(16 * 1024 * 1024),
    # Retention goes by event time: replayed history is old, and would vanish within minutes.
    "log.retention.ms": "-1",
    # The default reserves 128 MiB of heap for compaction.
    "log.cleaner.dedupe.buffer.size": str(8 * 1024 * 1024),
    # After SIGKILL a restart is refused until the dead one's session is over: 9 s by default.
    # Not below 1 s between heartbeats: it also is their time-out, and a shutdown that finds the
    # controller slower than that goes round in circles.
    "broker.heartbeat.interval.ms": "1000",
    "broker.session.timeout.ms": "4000",
}

BROKER_JVM = ("-Xms128m", "-Xmx512m", "-XX:+UseG1GC", "-XX:+ExitOnOutOfMemoryError")
TOOL_JVM = ("-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
LOGGING = (
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=info",
    "-Dorg.slf4j.simpleLogger.logFile=System.out",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd HH:mm:ss.SSS",
    "-Dorg.slf4j.simpleLogger.showThreadName=false",
    "-Dorg.slf4j.simpleLogger.levelInBrackets=true",
)


class KafkaLocalError(Exception):
    """The node cannot be started, reached or stopped; the first line says what to do."""


# -- what is needed before anything can start ------------------------------------------------


def kafka_version() -> str:
    """Read from `pom.xml` which version of Kafka it asks for."""
    found = re.search(r"<kafka\.version>([^<]+)</kafka\.version>", POM.read_text("utf-8"))
    if found is None:
        raise KafkaLocalError(f"{POM.name} names no <kafka.version>; restore the file")
    return found[1].strip()


def cache_dir() -> Path:
    """Where the jars are kept: `$XDG_CACHE_HOME/tsdiff/kafka-<version>`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tsdiff" / f"kafka-{kafka_version()}"


def find_java() -> str:
    """Find a Java runtime that is new enough; `JAVA_HOME` goes before `PATH`."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=str(Path(home) / "bin")) if home else None
    java = java or shutil.which("java")
    if java is None:
        raise KafkaLocalError(
            f"no java found in JAVA_HOME or PATH; install Java {MINIMUM_JAVA} or newer "
            "(Debian: openjdk-17-jre-headless)"
        )
    answer = subprocess.run(  # noqa: S603 - what is in the user's own PATH
        [java, "-version"], capture_output=True, text=True, check=False
    )
    text = answer.stderr + answer.stdout
    found = re.search(r'version "(?:1\.)?(\d+)', text)
    if found is None or int(found[1]) < MINIMUM_JAVA:
        said = text.strip().splitlines()[0] if text.strip() else "nothing"
        raise KafkaLocalError(
            f"Kafka {kafka_version()} needs Java {MINIMUM_JAVA} or newer, {java} says: {said}; "
            "set JAVA_HOME to a newer one"
        )
    return java


def find_jars(log: Callable[[str], None] = lambda _: None) -> Path:
    """Find the folder of Kafka's jars; Maven fetches them the first time, and never again.

    Raises `KafkaLocalError` where Maven is missing or cannot reach the jars.
    """
    folder = cache_dir()
    if folder.is_dir():
        return folder
    mvn = shutil.which("mvn")
    if mvn is None:
        raise KafkaLocalError(
            f"no mvn found in PATH, and no jars in {folder}; install Maven (Debian: maven)"
        )
    log(f"fetching Kafka {kafka_version()} with Maven, once")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Into a neighbour first: a broken download must not look like a complete cache, and two
    # that start at once must not mix.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as parts:
        jars = Path(parts) / "jars"
        wanted = ["-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
        answer = subprocess.run(  # noqa: S603 - what is in the user's own PATH
            [mvn, "-q", "-B", "-f", str(POM), "dependency:copy-dependencies", *wanted],
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode != 0 or not any(jars.glob("kafka_*.jar")):
            lines = [line for line in answer.stdout.splitlines() if line.startswith("[ERROR]")]
            reason = lines[0].removeprefix("[ERROR]").strip() if lines else "no reason given"
            raise KafkaLocalError(f"Maven could not fetch Kafka {kafka_version()}: {reason}")
        with contextlib.suppress(OSError):  # Another process was faster; its jars are the same.
            jars.rename(folder)
    return folder


# -- talking to the node ---------------------------------------------------------------------


def answers(port: int, timeout_seconds: float = 1.0) -> bool:
    """Whether a broker at `port` says that it knows at least one live broker (itself).

    One Metadata request (key 3, version 1, no topics), written out by hand: a listening socket
    alone proves nothing, since it is open before requests are processed.
    """
    body = struct.pack(">hhih", 3, 1, 1, -1) + struct.pack(">i", 0)
    try:
        with socket.create_connection((HOST, port), timeout_seconds) as connection:
            connection.settimeout(timeout_seconds)
            connection.sendall(struct.pack(">i", len(body)) + body)
            reply = b""
            while len(reply) < 12:
                part = connection.recv(4096)
                if not part:
                    return False
                reply += part
    except OSError:
        return False
    _, correlation, brokers = struct.unpack(">iii", reply[:12])
    return bool(correlation == 1 and brokers >= 1)


def free_port() -> int:
    """Find a port of the loopback interface that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def require_free(port: int) -> None:
    """Raise `KafkaLocalError` where `port` is in use."""
    with socket.socket() as probe:
        # As Kafka does: connections of an earlier node that are still closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise KafkaLocalError(
                f"cannot listen on {HOST}:{port} ({error.strerror}); "
                "choose another with --port, or --port 0 for any free one"
            ) from error


class KafkaLocal:
    """One node: start it, break it, start it again on the same data and port.

    `port` 0 means any free port, chosen at the first start and then kept. `data` is a folder that
    outlives the node; without it, a temporary one goes with `stop()`. `settings` are added to the
    broker's properties. `listeners` beside the plain one are named here with their protocols
    (`{"TLS": "SSL"}`), get free ports (`address("TLS")`), and are set up by `settings` that begin
    with `listener.name.tls.`.
    """

    def __init__(
        self,
        port: int = 0,
        data: Path | str | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        listeners: Mapping[str, str] | None = None,
        detach: bool = False,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._port = port
        self._wish = port
        self._data = None if data is None else Path(data).resolve()
        self._settings = dict(settings or {})
        self._protocols = dict(listeners or {})
        self._ports: dict[str, int] = {}
        self._detach = detach
        self._log = log
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def port(self) -> int:
        """The port clients connect to; 0 before the first start when any would do."""
        return self._port

    @property
    def bootstrap_servers(self) -> str:
        """What a client's `bootstrap_servers` wants."""
        return f"{HOST}:{self._port}"

    def address(self, listener: str) -> str:
        """What a client's `bootstrap_servers` wants, for one of the `listeners`."""
        if listener not in self._ports:
            raise KafkaLocalError(f"no listener {listener}; name it in `listeners`, call start()")
        return f"{HOST}:{self._ports[listener]}"

    @property
    def pid(self) -> int | None:
        """The process id while it runs, else `None`."""
        return self._process.pid if self.running and self._process is not None else None

    @property
    def running(self) -> bool:
        """Whether the process exists (a paused one does)."""
        return self._process is not None and self._process.poll() is None

    @property
    def folder(self) -> Path:
        """Where properties, log and data are."""
        if self._folder is None:
            raise KafkaLocalError("the node was never started; call start() first")
        return self._folder

    @property
    def temporary(self) -> bool:
        """Whether the data goes away with `stop()`."""
        return self._data is None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout_seconds: float = 120.0) -> Self:
        """Start the node and wait until it answers; a no-op while it runs.

        Raises `KafkaLocalError` with the end of the broker's log where it dies or stays silent.
        """
        if self.running:
            return self
        java, jars = find_java(), find_jars(self._log)
        if self._folder is None:
            self._folder = self._data or Path(tempfile.mkdtemp(prefix="tsdiff-kafka-"))
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._detach:
                atexit.register(self.stop)
        try:
            self._start(java, jars, timeout_seconds)
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self, java: str, jars: Path, timeout_seconds: float) -> None:
        if self._port == 0:
            self._port = free_port()
        require_free(self._port)
        with (self.folder / "node.lock").open("ab") as lock:
            # Kafka locks its data too, but only after it has opened, and spoilt, the metadata log
            # of the node that runs. The broker inherits this lock and holds it while it lives.
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise KafkaLocalError(
                    f"another node runs on {self.folder}; stop it, or choose another --data"
                ) from error
            self._process = self._launch(java, jars, lock.fileno())
        deadline = time.monotonic() + timeout_seconds
        while not answers(self._port):
            if not self.running:
                status = self._process.returncode
                raise KafkaLocalError(f"the broker died (status {status}){self.log_tail()}")
            if time.monotonic() > deadline:
                raise KafkaLocalError(
                    f"the broker does not answer after {timeout_seconds:.0f} s{self.log_tail()}"
                )
            time.sleep(0.05)

    def _launch(self, java: str, jars: Path, lock: int) -> subprocess.Popen[bytes]:
        properties = self._write_properties()
        command = [*LOGGING, "-cp", str(jars / "*")]
        if not (self.folder / "topics" / "meta.properties").exists():
            self._format([java, *TOOL_JVM, *command], properties)
        with (self.folder / "kafka.log").open("ab") as log:
            self._log_start = log.tell()
            return subprocess.Popen(  # noqa: S603 - Java, found above
                [java, *BROKER_JVM, *command, "kafka.Kafka", str(properties)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its own session: Ctrl-C in the terminal is ours to handle.
                start_new_session=True,
                pass_fds=[lock],
                cwd=self.folder,
            )

    def _write_properties(self) -> Path:
        controller = free_port()
        for name in self._protocols.keys() - self._ports.keys():
            self._ports[name] = free_port()
        advertised = ",".join(
            f"{name}://{HOST}:{port}"
            for name, port in {"PLAINTEXT": self._port, **self._ports}.items()
        )
        protocols = {"PLAINTEXT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT", **self._protocols}
        properties = {
            **SETTINGS,
            "listeners": f"{advertised},CONTROLLER://{HOST}:{controller}",
            "advertised.listeners": advertised,
            "listener.security.protocol.map": ",".join(f"{n}:{p}" for n, p in protocols.items()),
            "controller.quorum.voters": f"1@{HOST}:{controller}",
            "log.dirs": str(self.folder / "topics"),
            **self._settings,
        }
        path = self.folder / "server.properties"
        # In a properties file a backslash escapes; a folder's name may hold one.
        lines = [f"{key}={value}".replace("\\", "\\\\") for key, value in properties.items()]
        path.write_text("\n".join(lines) + "\n", "utf-8")
        return path

    def _format(self, command: list[str], properties: Path) -> None:
        self._log("formatting the storage")
        # Half-formatted is worse than not formatted: the tool refuses such a folder.
        shutil.rmtree(self.folder / "topics", ignore_errors=True)
        # The "A" keeps the tool from taking an id that begins with a hyphen for an option.
        cluster = "A" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode("ascii")[1:22]
        answer = subprocess.run(  # noqa: S603 - Java, found above
            [*command, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(properties)],
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode != 0:
            lines = (answer.stdout + answer.stderr).strip().splitlines() or ["no reason given"]
            raise KafkaLocalError(f"Kafka could not format {self.folder}: {lines[-1]}")

    def stop(self, timeout_seconds: float = 30.0) -> None:
        """End the node and, where its data is temporary, remove that; a no-op when stopped."""
        if self.temporary:
            self.kill()  # Nothing is worth flushing.
        else:
            self._terminate(timeout_seconds)
        if self._folder is not None and self.temporary:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._wish == 0:
            self._port = 0
            self._ports.clear()
        atexit.unregister(self.stop)

    def restart(self, timeout_seconds: float = 120.0) -> None:
        """Stop in good order (if still running) and start again on the same data and port."""
        self._terminate(30.0)
        self.start(timeout_seconds)

    def _terminate(self, timeout_seconds: float) -> None:
        if self._process is not None and self.running:
            self.resume()
            self._process.terminate()
            try:
                self._process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """SIGKILL: what a power cut does to the process. The data stays for `restart()`."""
        if self._process is not None and self.running:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: the node is there and says nothing, as behind a network that swallows."""
        self._signal(signal.SIGSTOP)
        if self._process is not None and hasattr(os, "waitid"):  # macOS before Python 3.13 has none
            # The signal is only sent; on a busy machine some threads go on for a while.
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT: the end of a `pause()`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None or not self.running:
            raise KafkaLocalError("the node is not running")
        self._process.send_signal(number)

    def wait(self) -> int:
        """Block until the process ends; its exit status."""
        return 0 if self._process is None else self._process.wait()

    def log_tail(self) -> str:
        """Tell why it ended, if its log since the last start says so, and the last lines."""
        try:
            said = (self.folder / "kafka.log").read_bytes()[self._log_start :]
        except OSError:
            said = b""
        lines = said.decode("utf-8", errors="replace").splitlines()
        if not lines:
            return "; it logged nothing"
        reasons = [line for line in lines if re.search(r"\[(?:ERROR|FATAL)\]|Exception:", line)]
        reason = f": {reasons[-1].strip()}" if reasons else ""
        told = [line for line in lines if not line.startswith("\tat ")]
        return "\n  ".join([f"{reason}; its log ends:", *told[-LOG_TAIL_LINES:]])

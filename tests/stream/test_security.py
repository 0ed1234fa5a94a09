"""The service on a real broker that asks who it is: TLS, client certificates, SASL.

Each listener asks for something else; a service that is let in scores readings through it, and one
that is not says why in one line and ends.
"""

import base64
import contextlib
import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient
from kafka.admin import UserScramCredentialUpsertion
from kafka_node import KafkaLocal, KafkaLocalError

from stream.config import load_config
from stream.errors import RetryableError
from stream.topics import connect_admin
from tests.conftest import Certificates, unavailable
from tests.stream.conftest import SmallBundle
from tests.stream.workers import Deployment, deployment
from tsdiff.history import History

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]

USER, WORD = "watcher", "correct-horse-battery"
MODULES = "org.apache.kafka.common.security"
# What each listener of the broker speaks.
LISTENERS = {"TLS": "SSL", "MTLS": "SSL", "SASL": "SASL_PLAINTEXT", "SASLTLS": "SASL_SSL"}


def broker_settings(certificates: Certificates, folder: Path) -> dict[str, str]:
    """One certificate for all of the listeners, and every mechanism that needs no other server."""
    store = folder / "server-store.pem"
    store.write_text(
        certificates.key("server").read_text() + certificates.certificate("server").read_text()
    )
    mechanisms = {
        "plain": f'{MODULES}.plain.PlainLoginModule required user_{USER}="{WORD}";',
        "scram-sha-256": f"{MODULES}.scram.ScramLoginModule required;",
        "scram-sha-512": f"{MODULES}.scram.ScramLoginModule required;",
        "oauthbearer": f"{MODULES}.oauthbearer.OAuthBearerLoginModule required "
        f'unsecuredLoginStringClaim_sub="{USER}";',
    }
    settings = {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(store),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(certificates.ca),
        "listener.name.mtls.ssl.client.auth": "required",
    }
    for listener in ("sasl", "sasltls"):
        prefix = f"listener.name.{listener}"
        settings[f"{prefix}.sasl.enabled.mechanisms"] = ",".join(mechanisms).upper()
        for name, module in mechanisms.items():
            settings[f"{prefix}.{name}.sasl.jaas.config"] = module
    return settings


@pytest.fixture(scope="module")
def guarded(
    certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KafkaLocal]:
    settings = broker_settings(certificates, tmp_path_factory.mktemp("guarded"))
    try:
        node = KafkaLocal(port=0, settings=settings, listeners=LISTENERS).start()
    except KafkaLocalError as error:
        unavailable(f"no local Kafka: {error}")
    try:
        with contextlib.closing(
            KafkaAdminClient(bootstrap_servers=node.bootstrap_servers)
        ) as admin:
            admin.create_topics({"telemetry": {"num_partitions": 1}}, wait_for_metadata=True)
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
                # A user may be altered only once in a request.
                user = UserScramCredentialUpsertion(USER, mechanism, WORD)
                assert admin.alter_user_scram_credentials([user]) == {USER: None}
        yield node
    finally:
        node.stop()


@pytest.fixture
def deployed(
    guarded: KafkaLocal, small_bundle: SmallBundle, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Deployment]:
    """A deployment with topics of its own, of which tests read the plain listener."""
    topic = f"telemetry-{request.node.name.partition('[')[2].rstrip(']') or 'one'}"
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=guarded.bootstrap_servers)) as admin:
        admin.create_topics({topic: {"num_partitions": 1}}, wait_for_metadata=True)
    with deployment(guarded.bootstrap_servers, topic, small_bundle.path, tmp_path) as deployed:
        yield deployed


def short(history: History, slots: int = 60) -> History:
    """The first slots of each entity: enough for scores after the warm-up."""
    entities = tuple(
        replace(e, timestamps_ms=e.timestamps_ms[:slots], values=e.values[:slots])
        for e in history.entities
    )
    return replace(history, entities=entities)


def let_in(
    deployed: Deployment,
    guarded: KafkaLocal,
    listener: str,
    security: dict[str, Any],
    secrets: dict[str, str],
) -> None:
    """Point the service at a listener; secrets go through the environment."""
    deployed.settings["input.bootstrap_servers"] = guarded.address(listener)
    security = {"protocol": LISTENERS[listener], **security}
    deployed.settings |= {f"input.security.{key}": value for key, value in security.items()}
    deployed.environment = {
        f"TSDIFF_INPUT__SECURITY__{key.upper()}": value for key, value in secrets.items()
    }


def unsigned_token() -> str:
    """A token as Kafka's development handler takes it: `alg` none, good until 2100."""
    parts = [{"alg": "none"}, {"sub": USER, "iat": 1_700_000_000, "exp": 4_102_444_800}]
    encoded = [base64.urlsafe_b64encode(json.dumps(p).encode()).decode() for p in parts]
    return ".".join(text.rstrip("=") for text in encoded) + "."


WAYS_IN = ["tls", "mtls", "scram256", "scram512", "scramtls", "plain", "oauthbearer"]


@pytest.mark.parametrize("way", WAYS_IN)
def test_readings_are_scored_over(
    way: str,
    guarded: KafkaLocal,
    deployed: Deployment,
    small_bundle: SmallBundle,
    certificates: Certificates,
    tmp_path: Path,
) -> None:
    word = tmp_path / "password"
    word.write_text(f"{WORD}\n")
    token = tmp_path / "token"
    token.write_text(unsigned_token())
    tls = {"ssl_cafile": certificates.ca}
    own = {
        "ssl_certfile": certificates.certificate("client"),
        "ssl_keyfile": certificates.key("client"),
    }
    user, env = {"sasl_username": USER}, {"sasl_password": WORD}
    ways: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
        "tls": ("TLS", tls, {}),
        "mtls": ("MTLS", tls | own, {}),
        "scram256": ("SASL", user | {"sasl_mechanism": "SCRAM-SHA-256"}, env),
        "scram512": ("SASL", user | {"sasl_password_file": word}, {}),
        "scramtls": ("SASLTLS", user | tls, env),
        "plain": ("SASLTLS", user | tls | {"sasl_mechanism": "PLAIN"}, env),
        "oauthbearer": (
            "SASLTLS",
            tls | {"sasl_mechanism": "OAUTHBEARER", "sasl_token_file": token},
            {},
        ),
    }
    listener, security, secrets = ways[way]
    let_in(deployed, guarded, listener, security, secrets)
    sent = deployed.send(short(small_bundle.live), small_bundle.period_ms)
    entities = len(small_bundle.live.entities)
    worker = deployed.start(log__level="debug")
    deployed.wait_for_scores(sent - entities, worker)
    assert worker.stop() == 0
    assert any(score["anomaly_score"] is not None for score in deployed.read_scores().values())
    # Not even the most talkative level tells what let it in, in the clear or in base64.
    said = worker.log.read_text()
    for secret in (WORD, base64.b64encode(WORD.encode()).decode(), unsigned_token()):
        assert secret not in said


@pytest.mark.parametrize("way", ["password", "user", "untrusted", "nobody"])
def test_who_is_not_let_in_is_told_why(
    way: str, guarded: KafkaLocal, deployed: Deployment, certificates: Certificates
) -> None:
    user = {"sasl_username": USER}
    tls, other = {"ssl_cafile": certificates.ca}, {"ssl_cafile": certificates.other_ca}
    ways: dict[str, tuple[str, dict[str, Any], dict[str, str], str]] = {
        "password": ("SASL", user, {"sasl_password": "not-that-word"}, "Authentication failed"),
        "user": (
            "SASLTLS",
            tls | {"sasl_username": "nobody"},
            {"sasl_password": WORD},
            "Authentication failed",
        ),
        "untrusted": ("TLS", other, {}, "certificate verify failed"),
        "nobody": ("MTLS", tls, {}, "bad certificate"),
    }
    listener, security, secrets, why = ways[way]
    let_in(deployed, guarded, listener, security, secrets)
    worker = deployed.start()
    assert worker.process.wait(60) == 1
    lines = [line for line in worker.log.read_text().splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    address = guarded.address(listener)
    assert f"the brokers at {address} do not let us in: " in lines[0]
    assert why in lines[0]
    assert "not-that-word" not in worker.log.read_text()


@pytest.mark.parametrize(
    ("listener", "protocol", "why"),
    [
        ("TLS", "PLAINTEXT", "Invalid frame length|socket disconnected"),
        ("SASL", "PLAINTEXT", "socket disconnected"),
        ("SASL", "SSL", "UNEXPECTED_EOF"),
    ],
)
def test_a_listener_of_another_protocol_is_not_waited_for_in_silence(
    listener: str, protocol: str, why: str, guarded: KafkaLocal
) -> None:
    # The broker only hangs up, as one that is starting may; so the service waits, and says why.
    settings = {
        "model.path": "bundle",
        "input.topic": "telemetry",
        "input.bootstrap_servers": guarded.address(listener),
        "input.security.protocol": protocol,
    }
    with pytest.raises(RetryableError, match=why) as caught:
        connect_admin(load_config(None, settings), {})
    assert f"no broker answers at {guarded.address(listener)}" in str(caught.value)
    del caught
    gc.collect()  # a socket left open is a warning here, and warnings are errors

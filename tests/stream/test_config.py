"""The service's settings: layers, defaults, and one line for everything that is wrong."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stream.config import SECRETS, ServiceConfig, json_schema, load_config, parse_listen
from tsdiff.errors import ConfigError

WORD = "hunter2"
REQUIRED = {"model.path": "bundle", "input.topic": "telemetry"}


@pytest.fixture(autouse=True)
def _no_settings_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TSDIFF_"):
            monkeypatch.delenv(name)


def load(**sections: Mapping[str, Any]) -> ServiceConfig:
    return load_config(None, {**REQUIRED, **sections})


def refusal(path: Path | None = None, overrides: Mapping[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def settings_file(folder: Path, text: str) -> Path:
    path = folder / "tsdiff.yaml"
    path.write_text(text)
    return path


def test_defaults_need_a_model_and_a_topic_only() -> None:
    config = load_config(None, REQUIRED)
    assert config.model.path == Path("bundle")
    assert config.input.bootstrap_servers == ("localhost:9092",)
    assert config.input.session_timeout_ms == 10_000
    assert config.grid.period_ms is None
    assert config.grid.lateness_ms == 10_000
    assert config.grid.max_ahead_ms == 300_000
    assert config.delivery.mode == "exactly-once"
    assert config.delivery.transaction_timeout_ms == 15_000
    assert config.metrics.listen == "127.0.0.1:9464"
    assert config.metrics.entity_ttl_ms == 900_000
    assert config.outputs.dead_letters == "tsdiff.dead-letters"


def test_a_config_is_frozen() -> None:
    config = load_config(None, REQUIRED)
    with pytest.raises(ValidationError):
        config.grid.lateness_ms = 5
    with pytest.raises(ValidationError):
        config.grid = config.grid


def test_layers_win_in_order_file_environment_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settings_file(
        tmp_path,
        "model: {path: a}\ninput:\n  topic: from-file\n  group: from-file\n  max_poll_records: 7\n"
        "grid:\nalerts: {m: 1}\n",
    )
    monkeypatch.setenv("TSDIFF_INPUT__GROUP", "from-environment")
    monkeypatch.setenv("TSDIFF_INPUT__TOPIC", "from-environment")
    monkeypatch.setenv("TSDIFF_GRID__LATENESS", "0s")
    monkeypatch.setenv("TSDIFF_OUTPUTS__CREATE_TOPICS", "false")
    monkeypatch.setenv("TSDIFF_INPUT__SECURITY__PROTOCOL", "SSL")
    config = load_config(path, {"input.topic": "from-option", "input.group": None})
    assert config.input.topic == "from-option"
    assert config.input.group == "from-environment"
    assert config.input.max_poll_records == 7
    assert config.input.security.protocol == "SSL"
    assert config.grid.lateness_ms == 0
    assert config.outputs.create_topics is False
    assert config.alerts.m == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a:1", ("a:1",)),
        ("a:1, b:2,", ("a:1", "b:2")),
        (["a:1", "[::1]:2"], ("a:1", "[::1]:2")),
    ],
)
def test_bootstrap_servers_are_a_list_or_a_string(given: object, expected: tuple[str, ...]) -> None:
    assert load(input={"bootstrap_servers": given}).input.bootstrap_servers == expected


def test_bootstrap_servers_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSDIFF_INPUT__BOOTSTRAP_SERVERS", "a:1,b:2")
    assert load_config(None, REQUIRED).input.bootstrap_servers == ("a:1", "b:2")


def test_an_empty_optional_is_unset_and_an_empty_listen_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TSDIFF_INPUT__INSTANCE_ID", "")
    monkeypatch.setenv("TSDIFF_GRID__PERIOD", "")
    monkeypatch.setenv("TSDIFF_METRICS__LISTEN", "")
    config = load_config(None, REQUIRED)
    assert config.input.instance_id is None
    assert config.grid.period_ms is None
    assert config.metrics.listen == ""


def test_building_a_config_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSDIFF_INPUT__TOPIC", "from-environment")
    config = ServiceConfig.model_validate({"model": {"path": "b"}, "input": {"topic": "t"}})
    assert config.input.topic == "t"


def test_unknown_key_names_file_line_and_nearest_key(tmp_path: Path) -> None:
    path = settings_file(tmp_path, "model: {path: a}\ninput:\n  topci: telemetry\n")
    text = refusal(path)
    assert text.startswith(f"{path}:3: input.topci: unknown key; did you mean input.topic?")
    assert "telemetry" not in text


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("topic", "did you mean input.topic?"),
        ("inputs.topic", "did you mean input"),
        ("alerts.triger", "did you mean alerts.trigger?"),
        ("grid.period_ms", "did you mean grid.period?"),
        ("input.security.sasl_pasword", "did you mean input.security.sasl_password?"),
        ("log.zzzzzz", "expected one of level, format"),
        ("zzzzzz", "expected one of model, detect, input"),
    ],
)
def test_unknown_keys_suggest(key: str, hint: str) -> None:
    text = refusal(None, {**REQUIRED, key: "secretvalue"})
    assert key.partition(".")[0] in text
    assert hint in text
    assert "secretvalue" not in text


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("TSDIFF_INPUT__TOPCI", "environment variable TSDIFF_INPUT__TOPCI: input.topci: unknown"),
        ("TSDIFF_INPT__TOPIC", "unknown key inpt.topic; did you mean input.topic?"),
        ("TSDIFF_INPUT_TOPIC", "two underscores between section and key, as in TSDIFF_INPUT__TOPI"),
        ("TSDIFF_INPUT", "expected one variable for each key"),
    ],
)
def test_unknown_environment_variables(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "hunter2")
    text = refusal(None, REQUIRED)
    assert hint in text
    assert WORD not in text


def test_other_variables_with_the_prefix_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSDIFF_DATA", "somewhere")
    monkeypatch.setenv("TSDIFF_METRICS_PORT", "tcp://10.0.0.1:9464")  # a Kubernetes service link
    load_config(None, REQUIRED)


def test_missing_keys_are_named_with_the_way_to_set_them(tmp_path: Path) -> None:
    path = settings_file(tmp_path, "input: {topic: t}\n")
    text = refusal(path)
    assert text.startswith(f"{path}: model.path: expected folder of the bundle")
    assert "got nothing (set it in the file, or as TSDIFF_MODEL__PATH)" in text
    text = refusal(None, {"model.path": "b"})
    assert text.startswith("settings: input.topic: expected topic that holds")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input.max_poll_records", "many", "expected a valid integer"),
        ("input.max_poll_records", 0, "greater than or equal to 1, got 0"),
        ("input.format", "avro", "'connect-json', got 'avro'"),
        ("input.entity", "host", "expected entity and labels only beside another format"),
        ("input.entity", 5, "expected a name, a list of them, or one string"),
        ("input.timestamp", "ts", "expected timestamp only beside format connect-json"),
        ("input.topic", "no spaces", "expected the name of a Kafka topic"),
        ("input.topic", "..", "expected the name of a Kafka topic"),
        ("input.bootstrap_servers", "kafka", "expected host:port in each place, not 'kafka'"),
        ("input.bootstrap_servers", "kafka:0", "expected host:port in each place"),
        ("input.bootstrap_servers", " , ", "expected at least one host:port"),
        ("input.bootstrap_servers", 9092, "expected host:port, a list of them"),
        ("input.session_timeout", "10", "expected a duration with its unit, such as 60s or 5m"),
        ("input.session_timeout", "0s", "expected a duration longer than nothing"),
        ("grid.period", "0s", "expected a duration longer than nothing"),
        ("grid.lateness", 10, "expected a duration with its unit, such as 60s or 5m, got 10"),
        ("grid.lateness", "-5s", "expected a duration"),
        (
            "detect.scorer",
            "best",
            "expected 'hybrid', 'reconstruction', 'density', 'crps', 'elbo', 'score-norms' or "
            "'flow', got 'best'",
        ),
        ("detect.lag", 2, "expected 0, 3, 7 or 15, got 2"),
        ("detect.adapt", "fast", "expected 'auto', 'none', 'level' or 'full', got 'fast'"),
        ("metrics.listen", "9464", "expected host:port such as 127.0.0.1:9464"),
        ("metrics.listen", "::1:9464", "expected host:port such as 127.0.0.1:9464"),
        ("alerts.m", 4, "expected m <= n, got m: 4 and n: 3"),
        ("alerts.recovery", 1.5, "expected recovery <= trigger, got recovery: 1.5 and trigger: 1"),
        ("alerts.trigger", float("nan"), "got nan"),
        ("alerts.false_alarms_per_entity_week", 0, "greater than 0, got 0"),
        ("grid.stale_after_slots", 2000, "expected stale_after_slots <= entity_ttl_slots"),
        ("outputs.alerts", "tsdiff.scores", "which is outputs.scores as well"),
        ("outputs.scores", "telemetry", "which is input.topic as well"),
        ("grid", "60s", "expected keys below it, got '60s'"),
        ("input.security", ["x"], "expected keys below it, got a list"),
        ("log.level", "x" * 500, "expected 'debug', 'info', 'warning' or 'error', got 'xxx"),
    ],
)
def test_wrong_values_say_key_expected_and_got(key: str, value: object, message: str) -> None:
    text = refusal(None, {**REQUIRED, key: value})
    assert message in text
    assert key.partition(".")[0] in text
    assert len(text) < 300


def test_a_wrong_value_is_placed_in_file_or_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settings_file(
        tmp_path, "model: {path: a}\ninput:\n  topic: t\n  group: [1]\ngrid: {lateness: soon}\n"
    )
    assert refusal(path).startswith(f"{path}:4: input.group: expected a valid string, got a list")
    assert refusal(path).endswith("(and 1 more)")
    monkeypatch.setenv("TSDIFF_INPUT__GROUP", "g")
    assert refusal(path).startswith(f"{path}:5: grid.lateness: expected a duration")
    monkeypatch.setenv("TSDIFF_GRID__LATENESS", "later")
    assert refusal(path).startswith("environment variable TSDIFF_GRID__LATENESS: grid.lateness: ")
    assert refusal(path, {"grid.lateness": "never"}).startswith("option: grid.lateness: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input: [\n", "expected YAML"),
        ("a: b: c\n", ":1: expected YAML"),
        ("- input\n", "expected sections such as input:, got a list"),
        ("input: {topic: t, topic: u}\n", ":1: input.topic: expected once, got it on line 1 too"),
        ("input: !!python/object:os.system {}\n", "expected YAML"),
        ("\0", "expected YAML"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    path = settings_file(tmp_path, text)
    assert message in refusal(path)
    assert str(path) in refusal(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "expected a settings file, got nothing there" in refusal(tmp_path / "none.yaml")
    assert "expected a readable YAML file" in refusal(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xff")
    assert "it is not UTF-8" in refusal(binary)


def sasl(**more: object) -> dict[str, Any]:
    security = {"protocol": "SASL_SSL", "sasl_username": "tsdiff", **more}
    return {"input.topic": "t", "model.path": "b", "input.security": security}


def test_a_password_is_shown_nowhere_but_to_kafka() -> None:
    config = load_config(None, sasl(sasl_password=WORD))
    for text in (repr(config), str(config), config.model_dump_json(), f"{config.input.security}"):
        assert WORD not in text
    logging.getLogger("test").warning("%s", config)
    assert config.input.client_kwargs()["sasl_plain_password"] == WORD
    assert config.input.client_kwargs()["sasl_mechanism"] == "SCRAM-SHA-512"


def test_a_wrong_password_value_is_not_repeated() -> None:
    assert "12345678" not in refusal(None, sasl(sasl_password=12345678))
    assert "a hidden value" in refusal(None, sasl(sasl_password=12345678))


def test_a_password_file_is_read_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("hunter2\n")
    config = load_config(None, sasl(sasl_password_file=str(path)))
    assert config.input.client_kwargs()["sasl_plain_password"] == WORD
    assert WORD not in repr(config)
    path.write_text("\n")
    assert "got an empty file" in refusal(None, sasl(sasl_password_file=str(path)))
    missing = refusal(None, sasl(sasl_password_file=str(tmp_path / "none")))
    assert "input.security.sasl_password_file: expected a file with a secret" in missing


@pytest.mark.parametrize(
    ("security", "message"),
    [
        ({"protocol": "SASL_SSL"}, "got neither"),
        ({"protocol": "SASL_SSL", "sasl_username": "u"}, "got only the user name"),
        ({"protocol": "SASL_SSL", "sasl_password": "hunter2"}, "got only the password"),
        ({"sasl_username": "u", "sasl_password": "hunter2"}, "got PLAINTEXT, which would not use"),
        ({"sasl_password": "hunter2", "sasl_password_file": "f"}, "got both"),
        ({"protocol": "SSL", "ssl_certfile": "c"}, "expected ssl_certfile and ssl_keyfile togethe"),
        ({"ssl_cafile": "c"}, "expected protocol SSL or SASL_SSL beside ssl_* files"),
        ({"protocol": "TLS"}, "expected 'PLAINTEXT', 'SSL', 'SASL_PLAINTEXT' or 'SASL_SSL'"),
    ],
)
def test_security_must_fit_together(security: dict[str, str], message: str) -> None:
    text = refusal(None, {**REQUIRED, "input.security": security})
    assert message in text
    assert WORD not in text


@pytest.mark.parametrize(
    ("security", "message"),
    [
        ({"sasl_mechanism": "OAUTHBEARER"}, "expected sasl_token_file with OAUTHBEARER"),
        ({"sasl_token_file": "t", "sasl_username": "u", "sasl_password": WORD}, "with it"),
        (
            {"sasl_mechanism": "OAUTHBEARER", "sasl_token_file": "t", "sasl_username": "u"},
            "expected no SASL user or password with OAUTHBEARER",
        ),
        ({"sasl_mechanism": "GSSAPI"}, "expected the Python package gssapi for GSSAPI, got none"),
        ({"sasl_mechanism": "AWS_MSK_IAM"}, "expected the Python package botocore"),
        (
            {"sasl_mechanism": "AWS_MSK_IAM", "protocol": "SASL_PLAINTEXT"},
            "expected protocol SASL_SSL with AWS_MSK_IAM",
        ),
        ({"sasl_mechanism": "DIGEST-MD5"}, "'OAUTHBEARER', 'GSSAPI' or 'AWS_MSK_IAM'"),
    ],
)
def test_each_mechanism_has_what_it_needs(
    security: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.config.find_spec", lambda _: None)
    text = refusal(None, {**REQUIRED, "input.security": {"protocol": "SASL_SSL", **security}})
    assert message in text
    assert WORD not in text


def test_mechanisms_become_what_kafka_python_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def client(**security: str) -> dict[str, Any]:
        settings = {"protocol": "SASL_SSL", **security}
        return load_config(None, {**REQUIRED, "input.security": settings}).input.client_kwargs()

    token = tmp_path / "token"
    token.write_text("first\n")
    bearer = client(sasl_mechanism="OAUTHBEARER", sasl_token_file=str(token))
    assert bearer["sasl_oauth_token_provider"].token() == "first"
    token.write_text("second\n")
    assert bearer["sasl_oauth_token_provider"].token() == "second"
    with pytest.raises(ConfigError, match=r"input.security.sasl_token_file: expected a file"):
        client(sasl_mechanism="OAUTHBEARER", sasl_token_file=str(tmp_path / "none"))
    monkeypatch.setattr("stream.config.find_spec", lambda _: object())
    kerberos = client(sasl_mechanism="GSSAPI", sasl_kerberos_service="bus")
    assert kerberos["sasl_kerberos_service_name"] == "bus"
    assert client(sasl_mechanism="AWS_MSK_IAM")["sasl_mechanism"] == "AWS_MSK_IAM"


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"username": "prometheus"}, "expected username (without a colon) and password"),
        ({"password": WORD}, "got one of them"),
        ({"username": "a:b", "password": WORD}, "got a colon"),
        ({"username": "p", "password": WORD, "password_file": "f"}, "got both"),
        ({"tls_certfile": "c"}, "expected tls_certfile and tls_keyfile together"),
        ({"tls_client_cafile": "c"}, "expected tls_certfile and tls_keyfile beside"),
    ],
)
def test_the_guards_of_the_metrics_port_must_fit_together(
    metrics: dict[str, str], message: str
) -> None:
    text = refusal(None, {**REQUIRED, "metrics": metrics})
    assert message in text
    assert WORD not in text


def test_a_password_of_the_metrics_port_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(f"{WORD}\n")
    metrics = {"username": "prometheus", "password_file": str(path)}
    config = load_config(None, {**REQUIRED, "metrics": metrics})
    assert config.metrics.password is not None
    assert config.metrics.password.get_secret_value() == WORD
    assert WORD not in repr(config) + str(config) + config.model_dump_json()


def test_the_schema_tells_of_secrets_and_holds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSDIFF_INPUT__SECURITY__SASL_PASSWORD", WORD)
    monkeypatch.setenv("TSDIFF_METRICS__PASSWORD", WORD)
    assert WORD not in json.dumps(json_schema())
    assert {"input.security.sasl_password", "metrics.password"} == SECRETS


def test_kafka_knows_every_client_argument() -> None:
    from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

    config = load_config(None, sasl(sasl_password=WORD))
    client = config.input.client_kwargs()
    assert set(client) <= set(KafkaAdminClient.DEFAULT_CONFIG)
    consumer = config.input.consumer_kwargs()
    assert set(consumer) <= set(KafkaConsumer.DEFAULT_CONFIG)
    assert consumer["enable_auto_commit"] is False
    assert consumer["heartbeat_interval_ms"] < consumer["session_timeout_ms"]
    producer = config.producer_kwargs("tsdiff-1")
    assert set(producer) <= set(KafkaProducer.DEFAULT_CONFIG)
    assert producer["transactional_id"] == "tsdiff-1"


def test_a_transactional_id_belongs_to_exactly_once() -> None:
    with pytest.raises(ConfigError, match="expected a transactional id"):
        load_config(None, REQUIRED).producer_kwargs(None)
    config = load_config(None, {**REQUIRED, "delivery.mode": "at-least-once"})
    assert "transactional_id" not in config.producer_kwargs(None)


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:9464", ("::1", 9464)), ("host:1", ("host", 1))],
)
def test_parse_listen(text: str, address: tuple[str, int]) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", ":9464", "::1:9464", "a:65536", "a:-1"])
def test_parse_listen_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="expected an address to listen on"):
        parse_listen(text)


def test_json_schema_shows_what_a_user_writes() -> None:
    schema = json_schema()
    json.dumps(schema)
    grid = schema["$defs"]["GridSection"]["properties"]
    assert grid["lateness"]["type"] == "string"
    assert grid["lateness"]["default"] == "10s"
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "input"}
    for definition in schema["$defs"].values():
        for key, field in definition["properties"].items():
            assert field.get("description"), key

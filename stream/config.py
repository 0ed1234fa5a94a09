"""What the service is told: one YAML file, the environment, and the command line's options.

`load_config` is the only place that reads settings files and environment variables; everything
else receives the frozen `ServiceConfig`, or a section of it. Durations are written with their unit
("60s", "5m") and held in milliseconds, under the name of the key with `_ms`.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, Self

from kafka.net.sasl.oauth import AbstractTokenProvider
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from stream._fields import (
    DurationMs,
    Names,
    OptionalDurationMs,
    PositiveDurationMs,
    Servers,
    TopicName,
    split_host_port,
)
from stream._layers import (
    Layer,
    describe_problem,
    environment_layer,
    merge,
    overrides_layer,
    read_secret_file,
    secret_keys,
    yaml_layer,
)
from stream.tls import client_context
from tsdiff.config import Adapt, Scorer
from tsdiff.errors import ConfigError

_MIB = 1024 * 1024


def _duration(alias: str, default: str | None, description: str) -> Any:  # noqa: ANN401
    # Any, because the default is the text that the validator turns into milliseconds, so that the
    # JSON Schema and the table in the README show what a user would write.
    return Field(default=default, alias=alias, description=description)


def parse_listen(text: str) -> tuple[str, int]:
    """Read "host:port" ("[::1]:9464" for IPv6; port 0 = any free one) as (host, port).

    Raises:
        ConfigError: it is not of that form.

    """
    try:
        return split_host_port(text)
    except ValueError:
        raise ConfigError(
            f"expected an address to listen on such as 127.0.0.1:9464 or [::1]:9464, got {text!r}"
        ) from None


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_none(cls, data: object) -> object:
        """Read an empty string as "unset" where that is allowed: compose files make such."""
        if not isinstance(data, dict):
            return data
        unset = {
            field.alias or name for name, field in cls.model_fields.items() if field.default is None
        }
        return {k: None if v == "" and k in unset else v for k, v in data.items()}


class ModelSection(_Section):
    """Which model scores."""

    path: Path = Field(
        description="Folder of the bundle that `tsdiff train` wrote; relative to where the service "
        "is started"
    )


class DetectSection(_Section):
    """How windows are read."""

    scorer: Scorer = Field(
        default="hybrid",
        description="The reading of the model: what it cannot reconstruct or forecast, how seldom "
        "normal data are like this, or both; crps, elbo, score-norms and flow are slow, and need a "
        "bundle of `tsdiff train --scorer`",
    )
    lag: Literal[0, 3, 7, 15] = Field(
        default=0,
        description="Slots that must follow a slot before it is scored: later, and more accurate",
    )
    adapt: Adapt = Field(
        default="auto",
        description="What entities go on learning from their normal readings: their levels, or all "
        "the model knows (full: 470 KB an entity at 38 channels, and only those of the training); "
        "auto is full for up to 1000 entities in training, else level",
    )
    warmup_slots: int = Field(
        default=256,
        ge=1,
        description="Slots over which an entity never seen in training collects its statistics "
        "before it is scored; 256 slots hold each channel's spread to about 5 %",
    )


class SecuritySection(_Section):
    """How to be let in by the brokers."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        default="PLAINTEXT", description="As the brokers' listener has it"
    )
    ssl_cafile: Path | None = Field(
        default=None, description="Certificates to trust (PEM); unset = those of the system"
    )
    ssl_certfile: Path | None = Field(
        default=None, description="Client certificate (PEM), for mutual TLS"
    )
    ssl_keyfile: Path | None = Field(
        default=None, description="Key of the client certificate (PEM, without a passphrase)"
    )
    sasl_mechanism: Literal[
        "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "GSSAPI", "AWS_MSK_IAM"
    ] = Field(
        default="SCRAM-SHA-512",
        description="Used with the SASL protocols; the default never sends the password itself. "
        "GSSAPI (Kerberos) needs the package gssapi, AWS_MSK_IAM needs botocore and takes its "
        "credentials from AWS' own environment",
    )
    sasl_username: str | None = Field(
        default=None, description="User name for PLAIN and SCRAM-SHA-*"
    )
    sasl_password: SecretStr | None = Field(
        default=None,
        description="Password for PLAIN and SCRAM-SHA-*; better given by environment or "
        "sasl_password_file, and not taken from --set",
    )
    sasl_password_file: Path | None = Field(
        default=None, description="File that holds the password for SASL, such as a mounted secret"
    )
    sasl_token_file: Path | None = Field(
        default=None,
        description="File that holds the token for OAUTHBEARER; read at every connection, since "
        "whoever writes it renews it",
    )
    sasl_kerberos_service: str = Field(
        default="kafka", min_length=1, description="The brokers' service name for GSSAPI"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        uses_sasl = self.protocol.startswith("SASL_")
        given = self.sasl_password is not None or self.sasl_password_file is not None
        if self.sasl_password is not None and self.sasl_password_file is not None:
            raise ValueError("expected sasl_password or sasl_password_file, got both")
        if not uses_sasl and (self.sasl_username or given or self.sasl_token_file):
            raise ValueError(
                f"expected protocol SASL_SSL or SASL_PLAINTEXT beside a SASL user, password or "
                f"token, got {self.protocol}, which would not use them"
            )
        if uses_sasl:
            self._mechanism_complete(given)
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("expected ssl_certfile and ssl_keyfile together, got one of them")
        if not self.uses_tls and (self.ssl_cafile or self.ssl_certfile):
            raise ValueError(
                f"expected protocol SSL or SASL_SSL beside ssl_* files, got {self.protocol}, "
                "which would not use them"
            )
        return self

    def _mechanism_complete(self, given: bool) -> None:
        mechanism = self.sasl_mechanism
        if mechanism == "PLAIN" or mechanism.startswith("SCRAM-"):
            if not self.sasl_username or not given:
                came = "only the password" if given else "only the user name"
                raise ValueError(
                    f"expected sasl_username and sasl_password (or sasl_password_file) with "
                    f"protocol {self.protocol}, got "
                    f"{came if given or self.sasl_username else 'neither'}"
                )
        elif self.sasl_username or given:
            raise ValueError(
                f"expected no SASL user or password with {mechanism}, which would not use them, "
                "got one"
            )
        if (mechanism == "OAUTHBEARER") != (self.sasl_token_file is not None):
            raise ValueError(
                f"expected sasl_token_file with OAUTHBEARER and with nothing else, got {mechanism} "
                f"{'without' if self.sasl_token_file is None else 'with'} it"
            )
        if mechanism == "AWS_MSK_IAM" and self.protocol != "SASL_SSL":
            raise ValueError(f"expected protocol SASL_SSL with AWS_MSK_IAM, got {self.protocol}")
        package = {"GSSAPI": "gssapi", "AWS_MSK_IAM": "botocore"}.get(mechanism)
        if package is not None and find_spec(package) is None:
            raise ValueError(
                f"expected the Python package {package} for {mechanism}, got none; install it "
                "beside tsdiff"
            )

    @property
    def uses_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.protocol in {"SSL", "SASL_SSL"}

    def client_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for any kafka-python client; they hold the password in the clear.

        Raises:
            ConfigError: a certificate, key or token cannot be read.

        """
        kwargs: dict[str, Any] = {"security_protocol": self.protocol}
        if self.uses_tls:
            kwargs["ssl_context"] = client_context(
                "input.security", self.ssl_cafile, self.ssl_certfile, self.ssl_keyfile
            )
        if not self.protocol.startswith("SASL_"):
            return kwargs
        kwargs["sasl_mechanism"] = self.sasl_mechanism
        if self.sasl_username is not None and self.sasl_password is not None:
            kwargs["sasl_plain_username"] = self.sasl_username
            kwargs["sasl_plain_password"] = self.sasl_password.get_secret_value()
        elif self.sasl_token_file is not None:
            kwargs["sasl_oauth_token_provider"] = _FileToken(self.sasl_token_file)
        elif self.sasl_mechanism == "GSSAPI":
            kwargs["sasl_kerberos_service_name"] = self.sasl_kerberos_service
        return kwargs


class _FileToken(AbstractTokenProvider):  # type: ignore[misc]
    """Gives kafka-python the token that is in a file now."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.token()

    def token(self) -> str:
        return read_secret_file(self._path, "input.security.sasl_token_file")


class InputSection(_Section):
    """Where readings come from."""

    bootstrap_servers: Servers = Field(
        default=("localhost:9092",),
        description="Brokers to ask first, host:port; a list, or one string with commas between",
    )
    topic: TopicName = Field(description="Topic that holds the readings")
    group: str = Field(
        default="tsdiff",
        min_length=1,
        description="Consumer group: services of one group share the partitions",
    )
    format: Literal[
        "native",
        "telegraf-influx",
        "telegraf-json",
        "otlp-json",
        "otlp-proto",
        "prometheus-json",
        "connect-json",
    ] = Field(default="native", description="How a message is written")
    entity: Names | None = Field(
        default=None,
        description="Labels (tags, resource attributes, fields) that may name the entity; the "
        "first that a reading has does; a list, or one string with commas between. Unset = the "
        "format's own",
    )
    labels: Names | None = Field(
        default=None,
        description="Labels that are part of a channel's name; unset = all but those of entity "
        "(connect-json: none)",
    )
    timestamp: str | None = Field(
        default=None,
        min_length=1,
        description="Field that holds the time (connect-json only); unset = timestamp",
    )
    rate: Names = Field(
        default=(),
        description="Channels (patterns such as net.*) that are counters: they are scored as rates "
        "per second, from one slot's last reading to the next one's; a counter that falls has "
        "begun again at 0",
    )
    auto_offset_reset: Literal["earliest", "latest"] = Field(
        default="earliest",
        description="Where to begin in a partition without a commit; earliest, so that nothing "
        "is passed over while the service is new",
    )
    instance_id: str | None = Field(
        default=None,
        min_length=1,
        description="A name that this service keeps across restarts (a pod's name): a restart "
        "within session_timeout then moves no partition, and its transactional id is stable",
    )
    session_timeout_ms: PositiveDurationMs = _duration(
        "session_timeout",
        "10s",
        "A service silent for so long loses its partitions to the others; 10 s is recovery in "
        "seconds without mistaking a long garbage collection or compilation for death (brokers "
        "allow 6 s to 30 m)",
    )
    max_poll_records: int = Field(
        default=5000,
        ge=1,
        description="Most messages taken at once; half a second of work at 10,000 readings/s",
    )
    max_message_bytes: int = Field(
        default=_MIB,
        ge=1024,
        description="Bytes of the largest message that is read; a larger one is dead-lettered. "
        "1 MiB is the most that a broker accepts by default",
    )
    stall_after_ms: PositiveDurationMs = _duration(
        "stall_after",
        "2m",
        "A partition that is not read on for so long, while it grows, is begun again from the "
        "last commit, and at the second time ends the service with exit status 1",
    )
    security: SecuritySection = Field(
        default_factory=SecuritySection,
        description="How to be let in by the brokers",
    )

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.format == "native" and (self.entity or self.labels):
            raise ValueError(
                "expected entity and labels only beside another format than native, whose "
                "messages name everything themselves"
            )
        if self.format != "connect-json" and self.timestamp:
            raise ValueError("expected timestamp only beside format connect-json")
        return self

    def client_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for any kafka-python client: admin, producer or consumer."""
        return {
            "bootstrap_servers": list(self.bootstrap_servers),
            # A broker that is back is found within two seconds, and one that is away given up after
            # five: both are thirty in kafka-python, and who is asked to stop waits for that.
            "reconnect_backoff_max_ms": 2_000,
            "bootstrap_timeout_ms": 5_000,
            **self.security.client_kwargs(),
        }

    def consumer_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `kafka.KafkaConsumer`; the assignor is the loop's own choice.

        Offsets are committed by the loop only, and what an aborted transaction wrote is not read.
        """
        return {
            **self.client_kwargs(),
            "group_id": self.group,
            "group_instance_id": self.instance_id,
            "session_timeout_ms": self.session_timeout_ms,
            # A third, as Kafka advises: two heartbeats may be lost before the session is.
            "heartbeat_interval_ms": max(1, self.session_timeout_ms // 3),
            "max_poll_records": self.max_poll_records,
            # Below the broker's own limit this would only make small fetches.
            "max_partition_fetch_bytes": max(4 * _MIB, self.max_message_bytes),
            # Never behind our back: the source says where to begin, and counts what is gone.
            "auto_offset_reset": "none",
            "enable_auto_commit": False,
            "isolation_level": "read_committed",
            "allow_auto_create_topics": False,
        }


class GridSection(_Section):
    """How readings become slots."""

    period_ms: OptionalDurationMs = _duration(
        "period", None, "Length of a slot; unset = the bundle's, and nothing else fits it"
    )
    lateness_ms: DurationMs = _duration(
        "lateness",
        "10s",
        "How far behind the newest reading of its partition a reading may come and still count. "
        "Agents such as Telegraf write every 10 s, each at its own moment, so with less than that "
        "the first host to report a new slot would close the old one for the others; it delays "
        "the scores of incomplete slots by as much. 0s where all readings of a partition come in "
        "order",
    )
    close_complete: bool = Field(
        default=True,
        description="Score a slot as soon as it is complete, that is, has a reading of every "
        "channel that training saw of this entity, instead of when its time and the lateness are "
        "over; what comes for it later is a duplicate. false where a slot's last reading is the "
        "one that counts, or readings are corrected",
    )
    max_ahead_ms: PositiveDurationMs = _duration(
        "max_ahead",
        "5m",
        "A reading further in the future than this (or than a period, if that is longer), by its "
        "message's Kafka timestamp or our own clock, whichever is earlier, is dead-lettered: one "
        "wrong clock would otherwise close the slots of all",
    )
    idle_after_ms: PositiveDurationMs = _duration(
        "idle_after",
        "5m",
        "A partition without readings for so long, by wall clock, is reported as silent; longer "
        "than a broker's or an agent's restart",
    )
    stale_after_slots: int = Field(
        default=5,
        ge=1,
        description="An entity without readings for so many slots is stale; five is what "
        "Prometheus' own five minutes are at a period of 60 s",
    )
    entity_ttl_slots: int = Field(
        default=1440,
        ge=1,
        description="An entity without readings for so many slots is forgotten; a day at a "
        "period of 60 s",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.stale_after_slots > self.entity_ttl_slots:
            raise ValueError(
                f"expected stale_after_slots <= entity_ttl_slots, got {self.stale_after_slots} "
                f"and {self.entity_ttl_slots}"
            )
        return self


class AlertsSection(_Section):
    """When somebody is to be woken."""

    false_alarms_per_entity_week: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="False alarms an entity may raise a week, on average: an anomaly_score of 1 "
        "is as rare as that",
    )
    trigger: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="A slot counts towards an alert when its anomaly_score is above this; 1 is "
        "the rate asked for",
    )
    recovery: float = Field(
        default=0.7,
        gt=0,
        allow_inf_nan=False,
        description="A slot counts as calm when its anomaly_score is below this; lower than "
        "trigger, so that an alert does not flap around one line",
    )
    m: int = Field(
        default=2, ge=1, description="So many slots of the last n must count before it fires"
    )
    n: int = Field(
        default=3,
        ge=1,
        description="Slots looked back on; 2 of 3 ignores a lone spike and costs one slot of delay",
    )
    recovery_slots: int = Field(
        default=5, ge=1, description="Calm slots in a row after which an alert is over"
    )
    minimum_slots: int = Field(
        default=3, ge=1, description="Slots for which an alert stays firing at the least"
    )
    minimum_deviation: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Least distance of a reading from what was expected, in half widths of the "
        "90 % band, for its slot to count; 0 = not asked",
    )
    direction: Literal["both", "up", "down"] = Field(
        default="both", description="Which side of what was expected counts"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.m > self.n:
            raise ValueError(f"expected m <= n, got m: {self.m} and n: {self.n}")
        if self.recovery > self.trigger:
            raise ValueError(
                f"expected recovery <= trigger, got recovery: {self.recovery:g} and "
                f"trigger: {self.trigger:g}"
            )
        return self


class OutputsSection(_Section):
    """Where scores and alerts go."""

    scores: TopicName = Field(default="tsdiff.scores", description="Topic of the scores")
    alerts: TopicName = Field(
        default="tsdiff.alerts", description="Topic of the alerts' changes (compacted)"
    )
    dead_letters: TopicName = Field(
        default="tsdiff.dead-letters",
        description="Topic of the messages that could not be read, unchanged",
    )
    state: TopicName = Field(
        default="tsdiff.state", description="Topic of the state that outlives a window (compacted)"
    )
    channels: Literal["top", "all", "alerting"] = Field(
        default="top",
        description="Channels told with a score: those that contribute most (all while the entity "
        "is not ok), always all, or none until the entity is not ok",
    )
    create_topics: bool = Field(
        default=True, description="Create the output topics that are missing"
    )
    replication_factor: int | None = Field(
        default=None,
        ge=1,
        description="Replicas of the topics it creates; unset = the brokers' default",
    )


class DeliverySection(_Section):
    """What a crash may cost."""

    mode: Literal["exactly-once", "at-least-once"] = Field(
        default="exactly-once",
        description="exactly-once: scores, alerts and offsets in one Kafka transaction; "
        "at-least-once: a crash may repeat the last batch, and brokers need no transactions",
    )
    transaction_timeout_ms: PositiveDurationMs = _duration(
        "transaction_timeout",
        "15s",
        "The broker ends a transaction left open for so long; readers of the scores wait no "
        "longer than this for a service that was killed",
    )


class MetricsSection(_Section):
    """What Prometheus sees."""

    listen: str = Field(
        default="127.0.0.1:9464",
        description="Address of /metrics, host:port; empty = off. Loopback, since it names every "
        "entity; 9464 is the port that OpenTelemetry's exporters use",
    )
    max_entities: int = Field(
        default=1000,
        ge=0,
        description="Entities with series of their own; the others keep their scores in Kafka",
    )
    top_channels: int = Field(
        default=5, ge=0, description="Channels told for each entity, those that contribute most"
    )
    entity_ttl_ms: PositiveDurationMs = _duration(
        "entity_ttl",
        "15m",
        "An entity without a score for so long, by wall clock, loses its series",
    )

    tls_certfile: Path | None = Field(
        default=None, description="Certificate (PEM) of the metrics port; unset = no TLS"
    )
    tls_keyfile: Path | None = Field(
        default=None, description="Key of that certificate (PEM, without a passphrase)"
    )
    tls_client_cafile: Path | None = Field(
        default=None,
        description="Only who shows a certificate signed by one of these (PEM) is answered",
    )
    username: str | None = Field(
        default=None, description="User name that the metrics port asks for (basic authentication)"
    )
    password: SecretStr | None = Field(
        default=None,
        description="Its password; better given by environment or password_file, and not taken "
        "from --set",
    )
    password_file: Path | None = Field(
        default=None, description="File that holds the password of the metrics port"
    )

    page: bool = Field(
        default=True,
        description="Whether browsers get a page of entities and their channels at /; its history "
        "takes some 2 KB of memory for each of max_entities, and at most 32 MiB for channels",
    )
    reload: bool = Field(
        default=False,
        description="Whether a POST to /-/reload reads the settings and the bundle again, as "
        "SIGHUP always does; off, since whoever reaches the port could ask for it",
    )

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.password is not None and self.password_file is not None:
            raise ValueError("expected password or password_file, got both")
        given = self.password is not None or self.password_file is not None
        if (self.username is not None) != given or ":" in (self.username or ""):
            raise ValueError(
                "expected username (without a colon) and password (or password_file) together, "
                f"got {'a colon' if given and self.username else 'one of them'}"
            )
        if (self.tls_certfile is None) != (self.tls_keyfile is None):
            raise ValueError("expected tls_certfile and tls_keyfile together, got one of them")
        if self.tls_client_cafile is not None and self.tls_certfile is None:
            raise ValueError(
                "expected tls_certfile and tls_keyfile beside tls_client_cafile, got neither"
            )
        return self

    @field_validator("listen")
    @classmethod
    def _address(cls, listen: str) -> str:
        if listen:
            try:
                split_host_port(listen)
            except ValueError:
                raise ValueError(
                    "expected host:port such as 127.0.0.1:9464, or nothing for off"
                ) from None
        return listen


class LogSection(_Section):
    """What is written to stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least important that is written"
    )
    format: Literal["console", "json"] = Field(
        default="console", description="console for people, json for log collectors"
    )


class ServiceConfig(BaseSettings):
    """All that the service is told; frozen, and checked as it is built."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        hide_input_in_errors=True,
        env_prefix="TSDIFF_",
        env_nested_delimiter="__",
        title="tsdiff.yaml",
    )

    model: ModelSection
    detect: DetectSection = Field(default_factory=DetectSection)
    input: InputSection
    grid: GridSection = Field(default_factory=GridSection)
    alerts: AlertsSection = Field(default_factory=AlertsSection)
    outputs: OutputsSection = Field(default_factory=OutputsSection)
    delivery: DeliverySection = Field(default_factory=DeliverySection)
    metrics: MetricsSection = Field(default_factory=MetricsSection)
    log: LogSection = Field(default_factory=LogSection)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what it is given: `load_config` puts the layers together, in sight."""
        return (init_settings,)

    @model_validator(mode="after")
    def _topics_differ(self) -> Self:
        names = {"input.topic": self.input.topic}
        for key in ("scores", "alerts", "dead_letters", "state"):
            name = getattr(self.outputs, key)
            for other, taken in names.items():
                if name == taken:
                    raise ValueError(
                        f"expected a topic of its own for outputs.{key}, got {name}, which is "
                        f"{other} as well"
                    )
            names[f"outputs.{key}"] = name
        return self

    def producer_kwargs(self, transactional_id: str | None) -> dict[str, Any]:
        """Keyword arguments for `kafka.KafkaProducer`; the id is used where delivery asks for it.

        Raises:
            ConfigError: delivery is exactly-once and there is no id.

        """
        kwargs = {
            **self.input.client_kwargs(),
            "acks": "all",
            "enable_idempotence": True,
            # A dead letter is a message of the input and its headers.
            "max_request_size": self.input.max_message_bytes + 64 * 1024,
            "allow_auto_create_topics": False,
        }
        if self.delivery.mode == "exactly-once":
            if not transactional_id:
                raise ConfigError("expected a transactional id for exactly-once delivery, got none")
            kwargs["transactional_id"] = transactional_id
            kwargs["transaction_timeout_ms"] = self.delivery.transaction_timeout_ms
        return kwargs


SECRETS: Final = frozenset(secret_keys(ServiceConfig))
"""Keys whose values are shown nowhere, and are not taken from a command line."""


def load_config(
    path: Path | str | None = None, overrides: Mapping[str, Any] | None = None
) -> ServiceConfig:
    """Read a settings file, then the environment over it, then `overrides` over both.

    Args:
        path: a YAML file, or None for none.
        overrides: dotted keys ("input.topic") or nested mappings; None means "not given", so the
            options of a command can be passed as they came.

    Raises:
        ConfigError: one line that names the file or variable, the key, what was expected and what
            came.

    """
    layers: list[Layer] = []
    if path is not None:
        layers.append(yaml_layer(Path(path), ServiceConfig))
    layers.append(environment_layer(ServiceConfig))
    layers.append(overrides_layer(overrides or {}))
    merged = merge(layers)
    try:
        config = ServiceConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(describe_problem(error, layers, ServiceConfig)) from None
    return _with_secrets(config)


def _with_secrets(config: ServiceConfig) -> ServiceConfig:
    """Read the passwords that are in files."""
    security, metrics = config.input.security, config.metrics
    if security.sasl_password_file is not None:
        secret = read_secret_file(security.sasl_password_file, "input.security.sasl_password_file")
        security = security.model_copy(update={"sasl_password": SecretStr(secret)})
    if metrics.password_file is not None:
        secret = read_secret_file(metrics.password_file, "metrics.password_file")
        metrics = metrics.model_copy(update={"password": SecretStr(secret)})
    section = config.input.model_copy(update={"security": security})
    return config.model_copy(update={"input": section, "metrics": metrics})


def json_schema() -> dict[str, Any]:
    """JSON Schema of the settings file, for editors and for `tsdiff run --print-schema`."""
    schema = ServiceConfig.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

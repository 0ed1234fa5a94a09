"""The commands of `stream`, from `tsdiff run` to `tsdiff doctor`: parse, build, call, print."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tsdiff.durations import parse_duration_ms
from tsdiff.errors import ConfigError

if TYPE_CHECKING:
    from stream.grid import Grid

_err: Final = Console(stderr=True)


def _bar(total: int, what: str) -> tuple[Progress, Any]:
    progress = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=_err,
        # In a pipe there is nothing to redraw; the closing line says it all.
        disable=not _err.is_terminal,
    )
    return progress, progress.add_task(what, total=total)


def _warn(text: str) -> None:
    """One line, whatever its length and whatever brackets are in it."""
    _err.print("[yellow]warning:[/]", escape(text), highlight=False, soft_wrap=True)


def _overrides(settings: list[str]) -> dict[str, Any]:
    """Read `--set section.key=value` pairs."""
    from stream.config import SECRETS  # noqa: PLC0415

    pairs = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise ConfigError(f"expected --set section.key=value, got {setting!r}")
        if key.strip() in SECRETS:
            raise ConfigError(
                f"expected {key.strip()} from the environment or from {key.strip()}_file: what is "
                "on a command line is seen by all users of the machine"
            )
        pairs[key.strip()] = value.strip()
    return pairs


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Settings file (YAML); README lists the keys."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, section.key=value; may be repeated."),
]


def run(
    config: ConfigOption = None,
    settings: SetOption = None,
    print_schema: Annotated[
        bool, typer.Option("--print-schema", help="Print the settings' JSON Schema and end.")
    ] = False,
) -> None:
    """Watch a Kafka topic: score every entity, tell Prometheus and Kafka, until stopped.

    SIGTERM and Ctrl-C finish what was begun, commit it and leave the consumer group. SIGHUP reads
    the settings and the bundle again.

    Examples:

        tsdiff run -c tsdiff.yaml

        tsdiff run --set model.path=bundle --set input.topic=telemetry

        TSDIFF_INPUT__BOOTSTRAP_SERVERS=kafka:9092 tsdiff run -c tsdiff.yaml
    """
    from stream.config import json_schema, load_config  # noqa: PLC0415

    if print_schema:
        typer.echo(json.dumps(json_schema(), indent=2))
        return
    loaded = load_config(config, _overrides(settings or []))
    from stream.compose import load_model, run_service  # noqa: PLC0415
    from stream.logs import configure_logging  # noqa: PLC0415
    from stream.reload import Wish  # noqa: PLC0415
    from stream.stop import Stop  # noqa: PLC0415

    configure_logging(loaded.log.level, loaded.log.format)
    stop, wish = Stop(at_once=True), Wish()
    with stop.on_signals(), wish.on_signal():
        run_service(
            loaded,
            load_model(loaded.model.path, detect=loaded.detect),
            stop,
            wish=wish,
            read=lambda: load_config(config, _overrides(settings or [])),
        )


def backfill(
    data: Annotated[
        Path, typer.Argument(help="Parquet file, or a folder of entities, with the history.")
    ],
    model: Annotated[Path, typer.Option("--model", "-m", help="Bundle that `tsdiff train` made.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Parquet file for the scores.")
    ] = None,
    openmetrics: Annotated[
        Path | None,
        typer.Option(help="OpenMetrics file for `promtool tsdb create-blocks-from openmetrics`."),
    ] = None,
    remote_write: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where to send series by Prometheus' remote write 1.0."),
    ] = None,
    remote_write_user: Annotated[
        str | None, typer.Option(help="User to name there (basic authentication).")
    ] = None,
    remote_write_password_file: Annotated[
        Path | None, typer.Option(help="File that holds the user's password.")
    ] = None,
    remote_write_token_file: Annotated[
        Path | None, typer.Option(help="File that holds a bearer token, in place of a user.")
    ] = None,
    remote_write_ca_file: Annotated[
        Path | None, typer.Option(help="Certificates (PEM) to trust there, not the system's.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Label of all series for Prometheus, such as instance=...; may be repeated. "
            "job=tsdiff is there by itself; an empty value takes it away.",
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Write slots from here on: RFC 3339 or epoch.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Write slots before this: RFC 3339 or epoch.")
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    part: Annotated[
        str, typer.Option(help="In folders <entity>/{train,test}.parquet: which of them.")
    ] = "test",
) -> None:
    """Score history through the same loop as live: to Parquet, to Prometheus, or both.

    A slot is scored, as live, once it is complete or a reading beyond its end and grid.lateness
    shows that it is over; what is incomplete of the newest stays open. Series for Prometheus are
    those of the service's /metrics, each sample with the time of its slot.

    Examples:

        tsdiff backfill history/ -m bundle -o scores.parquet

        tsdiff backfill web-17.parquet -m bundle -o scores.parquet --set outputs.channels=all

        tsdiff backfill history/ -m bundle --openmetrics scores.om --until 2026-11-23T12:00:00Z

        tsdiff backfill history/ -m bundle --remote-write http://localhost:9090/api/v1/write
    """
    from stream.backfill import Output, Span, refuse_recent  # noqa: PLC0415
    from stream.backfill import backfill as score_history  # noqa: PLC0415
    from stream.compose import grid_of, load_model  # noqa: PLC0415
    from stream.config import load_config  # noqa: PLC0415
    from stream.logs import configure_logging  # noqa: PLC0415
    from stream.openmetrics import OpenMetricsSink  # noqa: PLC0415
    from stream.series import external_labels  # noqa: PLC0415
    from tsdiff.detector import HISTORY_SHAPES  # noqa: PLC0415
    from tsdiff.history import load_history  # noqa: PLC0415

    files = {"--output": output, "--openmetrics": openmetrics}
    _expect_outputs(data, files, remote_write)
    client = _remote_write_client(
        remote_write,
        remote_write_user,
        remote_write_password_file,
        remote_write_token_file,
        remote_write_ca_file,
    )
    if label and openmetrics is None and client is None:
        raise ConfigError("expected --label with --openmetrics or --remote-write, got it alone")
    labels, span = external_labels(label or []), Span.parse(since, until)
    # History has no topic; the key is there because live settings files have it.
    overrides = {"model.path": str(model), "input.topic": "history", **_overrides(settings or [])}
    loaded = load_config(config, overrides)
    configure_logging("warning", loaded.log.format)
    built = load_model(model, HISTORY_SHAPES, loaded.detect)
    history = load_history(
        data,
        period_ms=built.detector.period_ms,
        channels=built.detector.channels,
        part=part,
        rate=loaded.input.rate,
    )
    for warning in history.warnings:
        _warn(warning)
    if openmetrics is not None:
        refuse_recent(history, grid_of(built, loaded), span, time.time() * 1000)
    total = sum(len(e.timestamps_ms) for e in history.entities)
    top = loaded.metrics.top_channels
    others: list[Output] = []
    remote = None
    if client is not None:
        from stream.remote_write import RemoteWriteSink  # noqa: PLC0415

        # First, so that files get their names only when the server has taken everything.
        remote = RemoteWriteSink(client, labels, top_channels=top)
        others.append(remote)
    if openmetrics is not None:
        others.append(OpenMetricsSink(openmetrics, labels, top_channels=top))
    progress, task = _bar(total, "scoring")
    try:
        with progress:
            summary = score_history(
                history,
                built,
                loaded,
                output,
                lambda done: progress.update(task, completed=done),
                others=others,
                span=span,
            )
            progress.update(task, completed=total)
    except BaseException:
        if remote is not None:
            _warn(remote.told())
        raise
    _warn_of_warming(summary.warming, grid_of(built, loaded))
    firing = [a for a in summary.alerts if a.state == "firing" != a.previous]
    places = [str(place) for place in (output, openmetrics, remote_write) if place is not None]
    typer.echo(
        f"{summary.readings} readings of {len(history.entities)} entities, {summary.scores} scores "
        f"and {len(firing)} alerts -> {', '.join(places)}"
    )


def _warn_of_warming(entities: Sequence[str], grid: "Grid") -> None:
    if entities:
        _warn(
            f"no score for {', '.join(entities[:5])}"
            f"{' and others' if len(entities) > 5 else ''}: their history is shorter than "
            f"the warm-up of {grid.warmup_slots} slots ({grid.newcomer_slots} for an entity never "
            "seen in training, detect.warmup_slots)"
        )


def _expect_outputs(data: Path, files: dict[str, Path | None], url: str | None) -> None:
    """See that there is somewhere to write to, and that no file is written twice or over."""
    given = {name: path for name, path in files.items() if path is not None}
    if not given and url is None:
        raise ConfigError(
            "expected at least one of --output, --openmetrics and --remote-write, got none; see "
            "tsdiff backfill --help"
        )
    if len({path.resolve() for path in given.values()}) < len(given):
        raise ConfigError("expected another file for --openmetrics than for --output")
    for name, path in given.items():
        if path.exists() and data.exists() and path.samefile(data):
            raise ConfigError(f"expected another file for {name} than the history {data} itself")


def _remote_write_client(
    url: str | None,
    user: str | None,
    password_file: Path | None,
    token_file: Path | None,
    ca_file: Path | None,
) -> Any:  # noqa: ANN401 - its packages are imported only where it is asked for
    """The client of a server, or `None` where none is named."""
    if url is None:
        access = {"user": user, "password": password_file, "token": token_file, "ca": ca_file}
        for name, value in access.items():
            if value is not None:
                file = "" if name == "user" else "-file"
                raise ConfigError(f"expected --remote-write with --remote-write-{name}{file}")
        return None
    from stream._layers import read_secret_file  # noqa: PLC0415
    from stream.remote_write import Client, Endpoint  # noqa: PLC0415
    from stream.tls import trusting  # noqa: PLC0415

    def secret(file: Path | None, option: str) -> str | None:
        return None if file is None else read_secret_file(file, option)

    password = secret(password_file, "--remote-write-password-file")
    token = secret(token_file, "--remote-write-token-file")
    tls = trusting("--remote-write-ca-file", ca_file) if url.startswith("https:") else None
    if ca_file is not None and tls is None:
        raise ConfigError(f"expected --remote-write https://... with a ca file, got {url!r}")
    return Client(Endpoint(url, user, password, token, tls))


def replay(
    data: Annotated[
        Path | None,
        typer.Argument(help="Parquet file, or a folder of entities, with the history."),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="Topic to write to; it must exist.")
    ] = None,
    dead_letters: Annotated[
        bool,
        typer.Option("--dead-letters", help="Send again what could not be read, to where it was."),
    ] = False,
    bootstrap_servers: Annotated[
        str, typer.Option("--bootstrap-servers", "-b", help="Brokers, host:port with commas.")
    ] = "localhost:9092",
    period: Annotated[
        str, typer.Option(help="Length of a step where timestamps are step numbers.")
    ] = "60s",
    speed: Annotated[
        float | None,
        typer.Option(help="1 = real time, 600 = ten minutes a second; unset = at full speed."),
    ] = None,
    start_at: Annotated[
        str, typer.Option(help="`original` timestamps, or shifted so that the first is `now`.")
    ] = "original",
    part: Annotated[
        str, typer.Option(help="In folders <entity>/{train,test}.parquet: which of them.")
    ] = "test",
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Write history to a Kafka topic, keyed by entity: for drills, tests and demos.

    With --dead-letters and the settings of the service: send each message of the dead-letter topic
    again as it was, to the topic and partition that it came from; each one once.

    Examples:

        tsdiff replay history/ --to telemetry

        tsdiff replay history/ --to telemetry --speed 600 --start-at now

        tsdiff replay --dead-letters -c tsdiff.yaml
    """
    from kafka import KafkaProducer  # noqa: PLC0415
    from kafka.errors import KafkaError  # noqa: PLC0415

    from stream.config import load_config  # noqa: PLC0415
    from stream.errors import StreamError  # noqa: PLC0415
    from stream.logs import configure_logging  # noqa: PLC0415
    from stream.replay import PRODUCER_KWARGS  # noqa: PLC0415
    from stream.replay import replay as write  # noqa: PLC0415
    from stream.topics import expect_topic  # noqa: PLC0415
    from tsdiff.history import load_history  # noqa: PLC0415

    if dead_letters:
        if data is not None or to is not None:
            raise ConfigError("expected --dead-letters alone, got a history or --to beside it")
        _send_again(config, settings)
        return
    if data is None or to is None:
        raise ConfigError("expected a history and --to TOPIC, or --dead-letters; see --help")
    if speed is not None and speed <= 0:
        raise ConfigError(f"expected --speed above 0, got {speed:g}; leave it out for full speed")
    if start_at not in {"original", "now"}:
        raise ConfigError(f"expected --start-at original or now, got {start_at!r}")
    configure_logging("warning", "console")
    # What goes wrong is said in one line below.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    history = load_history(data, period_ms=parse_duration_ms(period), part=part)
    for warning in history.warnings:
        _warn(warning)
    if config is None:
        client: dict[str, Any] = {"bootstrap_servers": bootstrap_servers.split(",")}
    else:
        loaded = load_config(config, _overrides(settings or []))
        client = loaded.input.client_kwargs()
    expect_topic(client, to)
    total = sum(len(e.timestamps_ms) for e in history.entities)
    progress, task = _bar(total, "replaying")
    try:
        with (
            progress,
            KafkaProducer(**client, **PRODUCER_KWARGS, allow_auto_create_topics=False) as producer,
        ):
            summary = write(
                history,
                producer,
                to,
                period_ms=parse_duration_ms(period),
                speed=speed,
                start_at="now" if start_at == "now" else "original",
                progress=lambda at: progress.update(task, completed=at.sent),
            )
    except KafkaError as error:
        raise StreamError(
            f"writing to topic {to} at {','.join(client['bootstrap_servers'])} failed: {error!r}; "
            "what was sent so far stays there"
        ) from error
    typer.echo(f"{summary.messages} readings of {len(history.entities)} entities -> {to}")


def _send_again(config: Path | None, settings: list[str] | None) -> None:
    from stream.config import load_config  # noqa: PLC0415
    from stream.dead_letters import resend  # noqa: PLC0415
    from stream.logs import configure_logging  # noqa: PLC0415

    loaded = load_config(config, _overrides(settings or []))
    configure_logging("warning", loaded.log.format)
    progress, task = _bar(0, "sending again")
    with progress:
        summary = resend(
            loaded, lambda done, total: progress.update(task, completed=done, total=total)
        )
    if summary.left:
        _warn(f"{summary.left} stay where they are: cut short, or not written by tsdiff")
    typer.echo(f"{summary.sent} dead letters of {loaded.outputs.dead_letters} sent again")


def doctor(
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON, for machines.")
    ] = False,
) -> None:
    """Try everything before it is needed: settings, bundle, broker, topics, and what arrives.

    Looks at the newest messages of every partition: can they be read, is one entity spread over
    partitions, do clocks agree, do the bundle's channels arrive in its period. Writes nothing.
    Exit status 1 if anything is wrong.

    Examples:

        tsdiff doctor -c tsdiff.yaml

        tsdiff doctor -c tsdiff.yaml --json
    """
    from stream.doctor import as_dict, examine  # noqa: PLC0415
    from stream.logs import configure_logging  # noqa: PLC0415

    configure_logging("error", "console")
    # What goes wrong is said below.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    found = examine(config, _overrides(settings or []))
    if as_json:
        typer.echo(json.dumps(as_dict(found)))
    else:
        marks = {"ok": "ok   ", "wrong": "WRONG", "skipped": "-    "}
        for finding in found:
            typer.echo(f"{marks[finding.status]} {finding.check}: {finding.said}")
            if finding.status == "wrong" and finding.mend:
                typer.echo(f"      to mend it: {finding.mend}")
    if any(finding.status == "wrong" for finding in found):
        raise typer.Exit(1)


def rekey(
    to: Annotated[str, typer.Option("--to", help="Topic to write to; it must exist.")],
    config: ConfigOption = None,
    settings: SetOption = None,
    until_end: Annotated[
        bool, typer.Option("--until-end", help="End once all that is there now is written.")
    ] = False,
) -> None:
    """Write the input topic's messages to another topic, unchanged, but keyed by entity.

    For producers that spread an entity over partitions. One process, exactly-once, in the order of
    event time; it goes on where it ended. Then have input.topic name the new topic.

    Examples:

        tsdiff rekey -c tsdiff.yaml --to telemetry-keyed

        tsdiff rekey -c tsdiff.yaml --to telemetry-keyed --until-end
    """
    from stream.config import load_config  # noqa: PLC0415
    from stream.logs import configure_logging  # noqa: PLC0415
    from stream.rekey import rekey as write  # noqa: PLC0415
    from stream.stop import Stop  # noqa: PLC0415
    from stream.topics import expect_topic  # noqa: PLC0415

    # It needs no bundle; the key is there because live settings files have it.
    loaded = load_config(config, {"model.path": "none", **_overrides(settings or [])})
    if to == loaded.input.topic:
        raise ConfigError(f"expected another topic for --to than input.topic itself, got {to}")
    configure_logging(loaded.log.level, loaded.log.format)
    for topic in (loaded.input.topic, to):
        expect_topic(loaded.input.client_kwargs(), topic)
    stop = Stop()
    with stop.on_signals():
        done = write(loaded, to, stopping=stop, until_end=until_end)
    typer.echo(
        f"{done.messages} messages -> {to}; of these {done.unread} could not be read and "
        f"{done.mixed} hold several entities: they keep the key they had"
    )


def demo(
    context: typer.Context,
    host: Annotated[
        bool, typer.Option("--host", help="Watch this machine (psutil) until Ctrl-C instead.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one line of JSON, for machines.")
    ] = False,
    learn: Annotated[
        str, typer.Option(help="With --host: how long to learn from this machine first.")
    ] = "5m",
    seed: Annotated[
        int, typer.Option(min=0, help="Another seed is another fleet and other faults.")
    ] = 0,
    entities: Annotated[int, typer.Option(min=8, help="Size of the simulated fleet.")] = 8,
    listen: Annotated[
        str, typer.Option(help="Address of /metrics while it runs; empty = off.")
    ] = "127.0.0.1:9464",
) -> None:
    """Show everything in one process: fleet, faults, broker, training, live scores, a summary.

    Nothing to install or to start besides `pip install 'tsdiff[demo]'`; about three minutes.

    Examples:

        tsdiff demo

        tsdiff demo --json | tail -n 1

        tsdiff demo --host

        tsdiff demo --host --learn 10m
    """
    console = Console(stderr=as_json)
    if host:
        from stream.host import run_host  # noqa: PLC0415

        learn_ms = parse_duration_ms(learn, name="--learn")
        run_host(context.obj.train, listen=listen, learn_ms=learn_ms, console=console)
        return
    from stream.demo import process_started_at, run_demo  # noqa: PLC0415

    summary = run_demo(
        context.obj.train,
        seed=seed,
        entities=entities,
        listen=listen,
        console=console,
        started_at=process_started_at(),
    )
    if as_json:
        sys.stdout.write(json.dumps(summary) + "\n")


def bench(
    context: typer.Context,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", help="Bundle to measure; without it a tiny one is trained here."
        ),
    ] = None,
    channels: Annotated[int, typer.Option(help="Channels of the tiny bundle.")] = 38,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON, for machines.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="Time for measuring windows/s, in all, or for the steady --rate.")
    ] = 10.0,
    kafka: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Measure the service on this broker, in topics of its own."
        ),
    ] = None,
    services: Annotated[
        int, typer.Option(help="Services that share the work, a process each (--kafka).")
    ] = 1,
    entities: Annotated[int, typer.Option(help="Entities that send readings (--kafka).")] = 1000,
    backlog: Annotated[
        int, typer.Option(help="Readings that wait when it starts (--kafka).")
    ] = 100_000,
    rate: Annotated[
        float, typer.Option(help="Readings a second afterwards, for --seconds (--kafka).")
    ] = 5_000.0,
) -> None:
    """Measure scoring on this machine: windows/s on one core, compilation, memory, cold start.

    Rates are wall time, the median of several repetitions, pinned to one core where the system
    allows it. With --kafka it is the service that is measured instead, from the topic to its
    metrics: readings/s of a backlog, latency at a steady rate, memory. What was not measured is
    null in the JSON.

    Examples:

        tsdiff bench

        tsdiff bench -m bundle --seconds 30

        tsdiff bench --channels 12 --json

        tsdiff bench --kafka localhost:9092 --entities 100000 --rate 2000
    """
    from stream.bench import as_text, run_bench, run_service_bench, service_text  # noqa: PLC0415

    def say(text: str) -> None:
        _err.print(text, highlight=False, markup=False, soft_wrap=True)

    train = context.obj.train
    if kafka is None:
        found = run_bench(train, model, channels=channels, seconds=seconds, say=say)
        typer.echo(json.dumps(found) if as_json else as_text(found))
        return
    found = run_service_bench(
        train,
        model,
        kafka,
        channels=channels,
        services=services,
        entities=entities,
        backlog=backlog,
        rate=rate,
        seconds=seconds,
        say=say,
    )
    typer.echo(json.dumps(found) if as_json else service_text(found))

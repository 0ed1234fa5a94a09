"""The commands `tsdiff train` and `tsdiff inspect`."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from train.config import TrainConfig
from train.picture import SUFFIXES, require_matplotlib, save_picture
from tsdiff.bundle import Bundle, load_bundle, save_bundle
from tsdiff.config import ModelConfig, NetworkConfig
from tsdiff.durations import parse_duration_ms
from tsdiff.errors import ConfigError
from tsdiff.history import load_history, with_rates

if TYPE_CHECKING:
    from train.loop import Progress as State

_LINE_EVERY = 100  # steps, where there is no terminal


def train(
    data: Annotated[Path, typer.Argument(help="Parquet file or folder.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Bundle folder to write.", show_default=False)
    ],
    period: Annotated[
        str, typer.Option(help="Time from slot to slot, as 60s or 5m.", show_default=False)
    ],
    name: Annotated[str, typer.Option(help="Name of the model.")] = "tsdiff",
    seed: Annotated[int, typer.Option(help="Same data, options and seed: same bundle.")] = 0,
    window: Annotated[int, typer.Option(help="Slots of context.")] = ModelConfig.window,
    steps: Annotated[int, typer.Option(help="Most steps of the network.")] = TrainConfig.steps,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop the network's training after this long.")
    ] = None,
    network: Annotated[
        bool, typer.Option("--network/--no-network", help="Train a network beside the anchor.")
    ] = True,
    rate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Channels that are counters, as input.rate; repeatable.",
        ),
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="A slow scorer to calibrate for, too: crps, elbo, score-norms or flow; repeatable."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")
    ] = False,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Checkpoints.  [default: OUTPUT.checkpoints]")
    ] = None,
    part: Annotated[
        str, typer.Option(help="Which of ENTITY/{train,test}.parquet to read.")
    ] = "train",
) -> None:
    """Learn a model bundle from history.

    DATA is one Parquet file, a folder of them, or a folder of ENTITY/train.parquet. Every
    numeric column besides `timestamp` is a channel; the last 15 % of every entity's rows are held
    out to calibrate the model. History should be mostly normal.

    Examples:

      tsdiff train history/ --period 60s -o bundle

      tsdiff train history/ --period 5m -o bundle --resume

      tsdiff train one-host.parquet --period 10s -o bundle --no-network

      tsdiff train history/ --period 60s -o bundle --rate 'net.*' --rate 'disk.*_bytes'

      tsdiff train history/ --period 60s -o bundle --scorer elbo
    """
    from train.loop import train as run  # noqa: PLC0415  (JAX is slow to import; --help is not)

    period_ms = parse_duration_ms(period)
    config = TrainConfig(
        name=name,
        seed=seed,
        model=ModelConfig(window=window),
        network=NetworkConfig() if network else None,
        steps=steps,
        max_minutes=max_minutes,
        slow_scorers=tuple(scorer or ()),
    )
    console = Console(stderr=True)
    history = load_history(data, period_ms=period_ms, part=part, rate=tuple(rate or ()))
    if rate:
        history = with_rates(history, rate, period_ms)
    for warning in history.warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    folder = checkpoint_dir or output.with_name(output.name + ".checkpoints")
    with _progress(console) as report:
        bundle = run(
            history,
            config,
            period_ms=period_ms,
            checkpoints=folder if network else None,
            resume=resume,
            report=report,
        )
    version = save_bundle(bundle, output)
    _remove(folder)
    typer.echo(f"{output}: {version}")


def _remove(folder: Path) -> None:
    """The bundle is written: nothing will be resumed."""
    if folder.exists():
        from train.state import remove_checkpoints  # noqa: PLC0415

        remove_checkpoints(folder)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[["State"], None]]:
    """Report as a bar on a terminal, as plain lines in a pipe."""
    if not sys.stderr.isatty():

        def line(state: "State") -> None:
            if state.step % _LINE_EVERY == 0 or state.step == state.steps:
                console.print(_describe(state), highlight=False, soft_wrap=True)

        yield line
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=None)

        def draw(state: "State") -> None:
            bar.update(task, total=state.steps, completed=state.step, description=_describe(state))

        yield draw


def _describe(state: "State") -> str:
    text = f"step {state.step}/{state.steps} loss {state.loss:.3f}"
    if state.held_out is not None and state.anchor is not None:
        text += f" held-out {state.held_out:.3f} (anchor {state.anchor:.3f})"
    return text


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(help="Parquet file or folder: history to look into.", show_default=False),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            help="The moment: RFC 3339, epoch ms, or a step index where timestamps are steps.",
            show_default=False,
        ),
    ] = None,
    entity: Annotated[
        str | None, typer.Option(help="Which entity, where there are several.", show_default=False)
    ] = None,
    around: Annotated[
        str | None,
        typer.Option(help="Time drawn on each side, as 30m.  [default: what fits the anomaly]"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="PNG to draw.  [default: ENTITY-TIME.png]"),
    ] = None,
    channels: Annotated[int, typer.Option(min=1, help="Channels drawn, the guiltiest.")] = 4,
    part: Annotated[
        str, typer.Option(help="In folders ENTITY/{train,test}.parquet: which of them.")
    ] = "test",
) -> None:
    """Describe a model bundle; with --data, say and draw what happened at a moment of history.

    The picture (needs tsdiff[eval]) has a panel for each of the channels that deviate most,
    with what was observed, what was expected and the 90 % band, and below them the anomaly
    score. "Usual error" in the text is half the width of that band.

    Examples:

      tsdiff inspect bundle

      tsdiff inspect bundle --data history/ --entity web-17 --at 2026-11-23T12:04:00Z

      tsdiff inspect bundle --data web-17.parquet --at 2092 --around 2h -o what.png
    """
    loaded = load_bundle(bundle)
    if data is None:
        given = {"--at": at, "--entity": entity, "--around": around, "--output": output}
        needless = [name for name, value in given.items() if value is not None]
        if needless:
            raise ConfigError(f"expected --data with {needless[0]}; say which history to look into")
        typer.echo(describe(loaded))
        return
    if at is None:
        raise ConfigError("expected --at with --data; say which moment to look at")
    if output is not None and output.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"expected --output to end in {', '.join(SUFFIXES)}, got {output}")
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"expected --output in a folder that exists, got {output}")
    require_matplotlib()
    from train.inspection import (  # noqa: PLC0415  (JAX is slow to import; --help is not)
        choose_entity,
        inspect_moment,
        parse_moment,
    )
    from tsdiff.detector import Detector  # noqa: PLC0415
    from tsdiff.series import SHAPES  # noqa: PLC0415

    period_ms = loaded.period_ms
    at_ms = parse_moment(at, period_ms)
    around_ms = None if around is None else parse_duration_ms(around, name="--around")
    history = load_history(data, period_ms=period_ms, channels=loaded.channels, part=part)
    console = Console(stderr=True)
    for warning in history.warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    chosen = choose_entity(history, entity)
    detector = Detector(loaded, shapes=SHAPES, adapt="auto")
    found = inspect_moment(detector, loaded, chosen, at_ms, around_ms=around_ms, channels=channels)
    path = output or Path(_file_name(chosen.entity, at))
    save_picture(found.picture, path)
    typer.echo(found.text)
    typer.echo(f"-> {path}")


def _file_name(entity: str, at: str) -> str:
    """Return `web-17-20261123T120400Z.png`, whatever is in an entity's name."""
    moment = re.sub(r"[^0-9TZ]", "", at.strip().partition(".")[0])
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', entity)}-{moment}.png"


def describe(bundle: Bundle) -> str:
    """Return what a bundle is, one fact a line."""
    manifest = bundle.manifest
    size = sum(array.nbytes for array in bundle.arrays.values())
    metrics = manifest.metrics
    model = manifest.model
    if manifest.network is None:
        reading = "Gaussian anchor alone"
        if "imputation_loss_network" in metrics:
            reading += " (the network was no better on held-out data and was dropped)"
    else:
        reading = (
            f"Gaussian anchor and network (weight {manifest.network_weight:g}; loss per held-out "
            f"cell {metrics['imputation_loss_network']:.3f}, anchor "
            f"{metrics['imputation_loss_anchor']:.3f} nats)"
        )
    season = bundle.arrays["season"]
    daily = tuple(name for i, name in enumerate(bundle.channels) if season[..., i].any())
    flags = manifest.flags
    lines = {
        "model": bundle.version,
        "period": f"{bundle.period_ms / 1000:g} s",
        "window": f"{model.window} slots",
        "smoothing": f"half-life of {model.smoothing_half_life:g} slots",
        "channels": f"{len(bundle.channels)}: {_some(bundle.channels)}",
        "entities": f"{len(bundle.entities)}: {_some(bundle.entities)}",
        "detector": reading,
        "scorers": ", ".join(manifest.scorers),
        "daily": f"{len(daily)}: {_some(daily)}"
        if daily
        else "no channel goes with the hour of day",
        "on or off": f"{len(flags)}: {_some(flags)}; together they count as one channel"
        if flags
        else "no channel is just on or off",
        "held out": f"{metrics['held_out_slots']:.0f} slots; {metrics['band_coverage']:.1%} of "
        f"readings in the 90 % band; {metrics['share_above_evidence_3']:.3%} of slots beyond "
        f"evidence 3 (0.1 % expected); alarms at {metrics['alarms_per_entity_week']:.2g} an entity "
        "and week (1 asked for)",
        "size": f"{size / 1e6:.1f} MB",
        "data": manifest.fingerprint[:12],
    }
    width = max(len(name) for name in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _some(names: tuple[str, ...], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"

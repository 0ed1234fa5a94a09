"""The composition root: settings and a bundle become a running service."""

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import structlog
from prometheus_client import REGISTRY, CollectorRegistry

from stream.config import DetectSection, ServiceConfig
from stream.decide import AlertPolicy
from stream.errors import RetryableError, StreamError
from stream.formats import Decoder, make_decoder
from stream.grid import Grid
from stream.http import Guard, Health, MetricsServer, Site
from stream.logs import configure_logging
from stream.metrics import ServiceMetrics
from stream.recent import Layout, Recent
from stream.reload import Reloader, Wish, changed_keys
from stream.scoring import ScoringConfig
from stream.service import Service
from stream.sinks import KafkaSink
from stream.sources import RETRY_SECONDS, KafkaSource
from stream.stop import Stop
from stream.tls import server_context
from stream.topics import prepare_topics
from stream.web import Page
from tsdiff.bundle import Bundle, load_bundle
from tsdiff.detector import SHAPES, Detector
from tsdiff.errors import BundleError, ConfigError
from tsdiff.history import rate_channels

_log = structlog.get_logger("tsdiff.run")

# Records are at most 1 MB in brokers' and clients' default settings; states are written in base64.
_MOST_STATE_BYTES = 700_000


@dataclass(frozen=True)
class Model:
    """A loaded bundle, ready to score."""

    bundle: Bundle
    detector: Detector


def load_model(
    path: Path,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    detect: DetectSection | None = None,
) -> Model:
    """Load a bundle and compile it (from the compilation cache where that is warm).

    Raises:
        BundleError: it cannot be used; the message says why.

    """
    enable_compilation_cache()
    bundle = load_bundle(path)
    how = detect or DetectSection()
    detector = Detector(bundle, shapes=shapes, scorer=how.scorer, lag=how.lag, adapt=how.adapt)
    return Model(bundle, detector)


def enable_compilation_cache() -> None:
    """Keep compiled code across restarts, in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tsdiff" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))  # type: ignore[no-untyped-call]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # type: ignore[no-untyped-call]


def grid_of(model: Model, config: ServiceConfig) -> Grid:
    """The grid that fits both the model and the settings.

    Raises:
        BundleError: the settings ask for another period than the model was trained with.

    """
    detector = model.detector
    period_ms = config.grid.period_ms or detector.period_ms
    if period_ms != detector.period_ms:
        raise BundleError(
            f"expected grid.period of {detector.period_ms / 1000:g}s, the period of bundle "
            f"{model.bundle.version}, got {period_ms / 1000:g}s; train a bundle with that period"
        )
    policy = policy_of(config)
    learner = detector.adaptation
    if learner is not None and 4 * learner.size > _MOST_STATE_BYTES:
        raise ConfigError(
            f"detect.adapt: full keeps {4 * learner.size // 1000} KB an entity with "
            f"{len(detector.channels)} channels, expected at most {_MOST_STATE_BYTES // 1000} KB, "
            "what fits into a record of the state topic; choose level or none"
        )
    grid = Grid(
        period_ms=period_ms,
        channels=len(detector.channels),
        window=detector.window,
        history=detector.history,
        streams=detector.streams,
        lateness_ms=config.grid.lateness_ms,
        warmup_slots=model.bundle.manifest.model.window,
        newcomer_slots=config.detect.warmup_slots,
        stale_after_slots=config.grid.stale_after_slots,
        ttl_slots=config.grid.entity_ttl_slots,
        decision_slots=policy.memory_slots,
        # The model's longest span: live a short one, since the ring holds as many slots beside the
        # window of every entity.
        span=detector.longest_span,
        lag=detector.lag,
        block=0 if learner is None else learner.block,
        context=0 if learner is None else learner.context,
        counters=rate_channels(detector.channels, config.input.rate),
        close_complete=config.grid.close_complete,
    )
    if grid.ttl_slots < grid.replay_slots:
        # A forgotten entity that comes back must not find its earlier life in the replayed log.
        raise ConfigError(
            f"expected grid.entity_ttl_slots of at least {grid.replay_slots} for this model and "
            f"these alerts, got {grid.ttl_slots}"
        )
    return grid


def policy_of(config: ServiceConfig) -> AlertPolicy:
    """The alert rule of the settings."""
    alerts = config.alerts
    return AlertPolicy(
        trigger=alerts.trigger,
        recovery=alerts.recovery,
        m=alerts.m,
        n=alerts.n,
        recovery_slots=alerts.recovery_slots,
        minimum_slots=alerts.minimum_slots,
        stale_after_slots=config.grid.stale_after_slots,
    )


def scoring_of(model: Model, config: ServiceConfig) -> ScoringConfig:
    """How the settings turn evidence into verdicts."""
    return ScoringConfig(
        model=model.bundle.version,
        period_ms=model.detector.period_ms,
        threshold=model.detector.threshold(config.alerts.false_alarms_per_entity_week),
        policy=policy_of(config),
        slots_per_alarm=model.detector.slots_per_alarm,
        minimum_deviation=config.alerts.minimum_deviation,
        direction=config.alerts.direction,
        channels=config.outputs.channels,
        top_channels=config.metrics.top_channels,
    )


def recent_of(model: Model, config: ServiceConfig) -> Recent | None:
    """What the page shows of the last hours; `None` where there is no page."""
    metrics, detector = config.metrics, model.detector
    if not metrics.listen or not metrics.page:
        return None
    layout = Layout(
        detector.channels,
        model.bundle.units,
        detector.period_ms,
        settle_slots=detector.window - 1 + detector.history,
    )
    return Recent(
        layout,
        policy_of(config),
        max_entities=metrics.max_entities,
        ttl_s=metrics.entity_ttl_ms / 1000,
        slots_per_alarm=detector.slots_per_alarm,
    )


def decoder_of(config: ServiceConfig) -> Decoder:
    """The decoder of the settings' input format.

    Raises:
        StreamError: a package that the format needs is not installed.

    """
    given = config.input
    return make_decoder(given.format, given.entity, given.labels, given.timestamp)


def guard_of(config: ServiceConfig) -> Guard:
    """Who may ask the metrics port.

    Raises:
        ConfigError: a certificate or key cannot be used.

    """
    metrics, tls = config.metrics, None
    if metrics.tls_certfile is not None and metrics.tls_keyfile is not None:
        tls = server_context(
            "metrics", metrics.tls_certfile, metrics.tls_keyfile, metrics.tls_client_cafile
        )
    if metrics.username is None or metrics.password is None:
        return Guard(tls)
    return Guard(tls, metrics.username, metrics.password.get_secret_value())


def run_service(
    config: ServiceConfig,
    model: Model,
    stop: Stop,
    *,
    registry: CollectorRegistry = REGISTRY,
    client_options: Mapping[str, Any] | None = None,
    wish: Wish | None = None,
    read: Callable[[], ServiceConfig] | None = None,
    on_listening: Callable[[str], None] = lambda _: None,
) -> None:
    """Run until asked to stop; wait for a broker or topic that is not there yet.

    With `read`, which reads the settings again, a `wish` changes what can change meanwhile.

    Raises:
        StreamError: the settings or the broker's rights do not allow it.
        ConfigError: the settings do not fit the model, or a file they name cannot be used.

    """
    # Before the minutes of compiling: certificates that cannot be read.
    config.input.client_kwargs()
    grid, decoder = grid_of(model, config), decoder_of(config)
    metrics = ServiceMetrics(
        registry,
        channels=model.detector.channels,
        max_entities=config.metrics.max_entities,
        top_channels=config.metrics.top_channels,
        entity_ttl_s=config.metrics.entity_ttl_ms / 1000,
    )
    metrics.model_info(model.bundle.version, period_ms=grid.period_ms, window=model.detector.window)
    health = Health()
    health.set_ready("starting")
    metrics.readiness(lambda: health.unready() is None and health.unhealthy() is None)
    wish = wish or Wish()
    reload = wish.ask if config.metrics.reload and read else None
    recent = recent_of(model, config)
    site = None if recent is None else Page(recent, metrics, health)
    with _listening(config, registry, health, reload, site) as address:
        on_listening(address)
        began = time.monotonic()
        health.set_ready("the model is being compiled")
        model.detector.warm_up()
        health.beat()
        _log.info("model ready", model=model.bundle.version, seconds=_since(began))
        _spare_the_collector()
        stop.at_once = False  # from here on there is something to finish
        parts = _connect(config, model, grid, decoder, health, stop, dict(client_options or {}))
        if parts is None:
            return
        source, sink = parts
        service = Service(
            source,
            sink,
            model.detector,
            grid,
            scoring_of(model, config),
            metrics,
            health,
            recent=recent,
            idle_after_s=config.grid.idle_after_ms / 1000,
        )
        first = Running(config, model)
        reloader = reloader_of(first, service, metrics, wish, read or (lambda: config), recent)
        try:
            whole = service.run(stop, reloader.turn)
        finally:
            # Leave the group first: the others may go on while we close the rest.
            source.close()
            sink.close()
            reloader.close()
        _log.info(
            "stopped; everything is committed"
            if whole
            else "stopped; the last round is not committed, and will be done again"
        )


def _spare_the_collector() -> None:
    """Have Python's cyclic collector look at less, and less often.

    A round makes tens of thousands of records, all freed by counting references. By default the
    collector would start hundreds of times meanwhile, and now and then walk through all of JAX: a
    third of a round's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@dataclass(frozen=True)
class Running:
    """What is in force, or is to be."""

    config: ServiceConfig
    model: Model
    changed: tuple[str, ...] = ()


def prepare(
    running: Running,
    wanted: ServiceConfig,
    load: Callable[[ServiceConfig], Model] = lambda c: load_model(c.model.path, detect=c.detect),
) -> Running:
    """Check settings that are to follow those that run, and compile their bundle where it differs.

    Raises:
        ConfigError: something changed that needs a restart, or does not fit the model.
        BundleError: the bundle cannot be used.

    """
    changed = changed_keys(running.config, wanted)
    model, old = running.model, running.model.bundle
    new = load_bundle(wanted.model.path)
    if new.version != old.version:
        for what in ("channels", "period_ms"):
            if getattr(new, what) != getattr(old, what):
                raise ConfigError(
                    f"needs a restart: bundle {new.version} has other {what} than {old.version}"
                )
        model = load(wanted)
        changed = [*(key for key in changed if key != "model.path"), "model.path"]
    grid_of(model, wanted)
    if model is not running.model:
        model.detector.warm_up()
    return Running(wanted, model, tuple(changed))


def reloader_of(
    first: Running,
    service: Service,
    metrics: ServiceMetrics,
    wish: Wish,
    read: Callable[[], ServiceConfig],
    recent: Recent | None = None,
) -> Reloader[Running]:
    """Put together what reloads this service."""
    current = [first]

    def swap(new: Running) -> None:
        config, model, detector = new.config, new.model, new.model.detector
        grid = grid_of(model, config)
        service.swap(detector, grid, scoring_of(model, config))
        metrics.budget(
            max_entities=config.metrics.max_entities, top_channels=config.metrics.top_channels
        )
        if recent is not None:
            recent.policy, recent.slots_per_alarm = policy_of(config), detector.slots_per_alarm
            recent.budget(config.metrics.max_entities)
        metrics.model_info(model.bundle.version, period_ms=grid.period_ms, window=detector.window)
        if "log.level" in new.changed:
            configure_logging(config.log.level, config.log.format)
        current[0] = new
        _log.info("reloaded", changed=list(new.changed), model=model.bundle.version)

    return Reloader(wish, lambda: prepare(current[0], read()), swap, metrics)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 2)


@contextmanager
def _listening(
    config: ServiceConfig,
    registry: CollectorRegistry,
    health: Health,
    reload: Callable[[], None] | None = None,
    site: Site | None = None,
) -> Iterator[str]:
    if not config.metrics.listen:
        yield ""
        return
    listen, guard = config.metrics.listen, guard_of(config)
    with MetricsServer(listen, registry, health, guard, reload, site) as server:
        _log.info("metrics", url=server.url)
        if server.exposed:
            _log.warning(
                "the metrics port names every entity to whoever asks: other machines reach it, and "
                "it asks for no password (metrics.username) and no certificate "
                "(metrics.tls_client_cafile)",
                listen=config.metrics.listen,
            )
        yield server.url


def _connect(
    config: ServiceConfig,
    model: Model,
    grid: Grid,
    decoder: Decoder,
    health: Health,
    stop: Stop,
    options: dict[str, Any],
) -> tuple[KafkaSource, KafkaSink] | None:
    """Build source and sink as soon as the broker allows it; `None` if asked to stop before."""
    source: KafkaSource | None = None
    while not stop():
        health.beat()
        try:
            largest = prepare_topics(config, options)
            source = KafkaSource(
                config,
                model.detector.channels,
                decoder,
                grid,
                client_options=options,
                beat=health.beat,
                stopping=stop,
            )
            return source, KafkaSink(
                config, source.consumer, largest_dead_letter=largest, client_options=options
            )
        except RetryableError as error:
            if source is not None:
                source.close()
            _log.warning("waiting", error=str(error))
            health.set_ready(str(error))
            time.sleep(RETRY_SECONDS)
        except StreamError:
            if source is not None:
                source.close()
            raise
    return None

"""`tsdiff bench`: how fast, how large, how soon; measured here, on this machine.

Everything that is timed runs in a process of its own: rates on one core (XLA's threads off, pinned
where the system can do that), the start as the service starts. What this file prints is wall time,
the median of several repetitions; on a busy machine it is less, and `core_share` says so.

    bundle (given, or tiny and trained here)
      -> process, one core: matmul peak, compilation, windows/s, research way, bytes per entity
      -> process, all cores, twice: start to first score without and with the compilation cache
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from stream import memory
from stream.learning import Learner
from stream.simulate import CHANNELS, simulate_fleet
from tsdiff.bundle import Bundle, load_bundle, save_bundle
from tsdiff.config import SLOW_SCORERS
from tsdiff.errors import ConfigError, TsdiffError
from tsdiff.history import EntityHistory, History
from tsdiff.runs import Counts

Record = dict[str, Any]

KEYS: Final = (
    "channels",
    "windows_per_second_per_core",
    "matmul_peak_share",
    "readings_per_second",
    "latency_p50_seconds",
    "latency_p99_seconds",
    "compilations_after_warmup",
    "bytes_per_entity",
    "peak_memory_bytes",
    "seconds_to_first_score",
)
"""What is promised to whoever reads the JSON; null where a part was not run. There is more."""

MISSING: Final = ("complete", "few missing", "many missing")
# (name, entities, slots of each): a round of the service, its catching up, and backfill.
WORKLOADS: Final = (("live", 1024, 1), ("catching up", 64, 16), ("history", 4, 512))
_SLOW: Final = (64, 1)  # entities and slots of each, for slow scorers: a call, too
_REPEATS = 5
_PERIOD_MS = 60_000
_RESEARCH_STEPS, _RESEARCH_SAMPLES = 50, 10
# The largest matrices whose product takes tens of milliseconds, and so leave the cache.
_MATMUL_SIZE = 1024
# Capacities that the buffer's doubling fills to the last row.
_ENTITIES = (1024, 2048)


class Train(Protocol):
    """Training, handed in by the console script: `stream` does not import `train`."""

    def __call__(self, history: History, *, period_ms: int, **settings: Any) -> Bundle:  # noqa: ANN401
        """Make a bundle; `settings` are the fields of `train.config.TrainConfig`."""
        ...


# -- the command -------------------------------------------------------------------------------


def run_bench(
    train: Train,
    model: Path | None,
    *,
    channels: int = 38,
    seconds: float = 10.0,
    say: Callable[[str], None] = lambda _: None,
) -> Record:
    """Measure a bundle, or a tiny one trained here; `seconds` go to measuring windows/s.

    Raises:
        ConfigError: an option is out of its range.
        TsdiffError: the bundle cannot be used, or a measuring process failed.

    """
    if channels < 1 or seconds <= 0:
        raise ConfigError(
            f"expected --channels of at least 1 and --seconds above 0, got {channels} and "
            f"{seconds:g}"
        )
    with tempfile.TemporaryDirectory(prefix="tsdiff-bench-") as folder:
        slow = partial(train, slow_scorers=SLOW_SCORERS)
        model, bundle = _model_of(slow, model, channels, Path(folder), say)
        say(f"measuring {bundle.version} on one core")
        found: Record = {"model": bundle.version, "channels": len(bundle.channels)}
        found |= in_process(task("measure", model, str(seconds)), one_core())
        cache = {"XDG_CACHE_HOME": folder}
        say("starting without a compilation cache")
        cold = in_process(task("start", model), cache)
        say("starting with one")
        warm = in_process(task("start", model), cache)
    del found["seconds"]  # of measuring: nobody's business
    found["peak_memory_bytes"] = cold["peak_memory_bytes"]
    found["seconds_to_first_score"] = cold["seconds"]
    found["seconds_to_first_score_cached"] = warm["seconds"]
    return _answer(found)


def run_service_bench(
    train: Train,
    model: Path | None,
    servers: str,
    *,
    channels: int = 38,
    services: int = 1,
    entities: int = 1000,
    backlog: int = 100_000,
    rate: float = 5_000.0,
    seconds: float = 30.0,
    say: Callable[[str], None] = lambda _: None,
) -> Record:
    """Measure one or more services on a real broker, with a bundle or a tiny one trained here.

    Raises:
        ConfigError: an option is out of its range.
        TsdiffError: see `stream.bench_kafka.run_kafka_bench`.

    """
    from stream.bench_kafka import run_kafka_bench  # noqa: PLC0415 - loads kafka-python

    if min(channels, services, entities, backlog) < 1 or min(rate, seconds) <= 0:
        raise ConfigError(
            "expected --channels, --services, --entities and --backlog of at least 1, --rate and "
            f"--seconds above 0, got {channels}, {services}, {entities}, {backlog}, {rate:g} and "
            f"{seconds:g}"
        )
    with tempfile.TemporaryDirectory(prefix="tsdiff-bench-") as folder:
        model, bundle = _model_of(train, model, channels, Path(folder), say)
        found: Record = {"model": bundle.version, "channels": len(bundle.channels)}
        found |= run_kafka_bench(
            model,
            servers,
            services=services,
            entities=entities,
            backlog=backlog,
            rate=rate,
            seconds=seconds,
            say=say,
        )
    return _answer(found)


def _model_of(
    train: Train, model: Path | None, channels: int, folder: Path, say: Callable[[str], None]
) -> tuple[Path, Bundle]:
    """Return what was given, or a tiny bundle of that many channels."""
    if model is None:
        say(f"training a tiny model of {channels} channels")
        model = folder / "bundle"
        save_bundle(tiny_bundle(train, channels), model)
    return model, load_bundle(model)  # one that cannot be used is said here, in one line


def _answer(found: Record) -> Record:
    """What is promised first, null where it was not measured; then all the rest."""
    found |= {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    return {key: found.pop(key, None) for key in KEYS} | found


def tiny_bundle(train: Train, channels: int) -> Bundle:
    """Train on a few simulated servers; the network is kept however good it is.

    What is measured depends on shapes alone. More channels than the simulator has are those of
    further fleets.
    """
    fleets = [
        simulate_fleet(4, min(channels - start, len(CHANNELS)), slots=1500, seed=start)
        for start in range(0, channels, len(CHANNELS))
    ]
    values = np.concatenate([fleet.values for fleet in fleets], axis=2)
    names = tuple(f"{name}_{i}" for i, fleet in enumerate(fleets) for name in fleet.channels)
    first = fleets[0]
    entities = tuple(
        EntityHistory(entity, first.timestamps_ms, readings)
        for entity, readings in zip(first.entities, values, strict=True)
    )
    settings = {"name": "bench", "steps": 20, "evaluate_every": 20, "network_weight": 0.5}
    return train(History(names, entities, ()), period_ms=_PERIOD_MS, **settings)


def one_core() -> dict[str, str]:
    """Environment in which neither XLA nor BLAS starts threads."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    threads = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **dict.fromkeys(threads, "1")}


def task(name: str, bundle: Path, *arguments: str) -> list[str]:
    """Return the command of a task of this module."""
    return [sys.executable, "-m", "stream.bench", name, str(bundle.resolve()), *arguments]


def in_process(command: Sequence[str], environment: Mapping[str, str]) -> Record:
    """Run a command that answers with one line of JSON.

    `seconds` in the answer is the time from the start of the process to that line.

    Raises:
        TsdiffError: it ended without an answer.

    """
    begun = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603 - ourselves
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None  # noqa: S101 - for mypy: it is a pipe
        line = process.stdout.readline()
        seconds = time.perf_counter() - begun
        _, error = process.communicate()
    finally:
        process.kill()
    if process.returncode != 0 or not line:
        last = (error.strip().splitlines() or ["it said nothing"])[-1]
        raise TsdiffError(
            "expected an answer from a measuring process, it ended with status "
            f"{process.returncode}: {last}"
        )
    return {"seconds": seconds, **json.loads(line)}


def cpu_name() -> str:
    """Return what the system calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# -- in the measuring process ------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Run `measure BUNDLE SECONDS` or `start BUNDLE`, and print one line of JSON."""
    name, bundle, *rest = arguments
    if name == "measure":
        pin_to_one_core()
        answer = measure(load_bundle(bundle), float(rest[0]))
    else:
        answer = start(Path(bundle))
    print(json.dumps(answer), flush=True)
    return 0


def pin_to_one_core() -> None:
    """Stay on one core, where the system lets a process choose (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def start(path: Path) -> Record:
    """Do what `tsdiff run` does before its first score, but for the broker."""
    from stream.compose import load_model  # noqa: PLC0415 - its import is part of the start

    detector = load_model(path).detector
    detector.warm_up()
    detector.detect(**workload(detector, 1, 1, "complete"))
    return {"peak_memory_bytes": peak_memory_bytes()}


def peak_memory_bytes() -> int:
    """Return the most memory that this process ever held."""
    held = memory.peak_memory_bytes()
    if held is not None:
        return held
    import resource  # noqa: PLC0415 - not everywhere; counts what the parent held, too

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(bundle: Bundle, seconds: float) -> Record:
    """Measure all that is measured on one core."""
    peak = matmul_flops_per_second()
    begun = time.perf_counter()
    detectors = dict(detectors_of(bundle))
    live = detectors["default"]
    live.warm_up()
    compile_seconds = time.perf_counter() - begun
    compilations = live.compilations
    drift = compilations_while_shapes_change(live)
    wall, cpu = time.perf_counter(), time.process_time()
    rates = windows_per_second(bundle, detectors, seconds) + slow_windows_per_second(bundle)
    core_share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    learning = learning_seconds_per_slot(live)
    headline = 1.0 / (1.0 / rates[0]["windows_per_second"] + learning)
    flops = flops_per_window(live)
    return {
        "windows_per_second_per_core": headline,
        "matmul_peak_share": None if flops is None else headline * flops / peak,
        "flops_per_window": flops,
        "matmul_gflops": peak / 1e9,
        "rates": rates,
        "core_share": min(core_share, 1.0),
        "compilations": compilations,
        "compile_seconds": compile_seconds,
        "compilations_after_warmup": drift,
        "learning_seconds_per_slot": learning,
        "bytes_per_entity": bytes_per_entity(bundle, detectors["level"]),
        "bytes_per_entity_default": bytes_per_entity(bundle, live),
        "research_windows_per_second": research_windows_per_second(bundle),
    }


class Scorer(Protocol):
    """What is measured of `tsdiff.detector.Detector`."""

    window: int
    history: int
    streams: int
    compilations: int
    channels: tuple[str, ...]

    @property
    def adaptation(self) -> Learner | None: ...  # noqa: D102
    def row(self, entity: str) -> int: ...  # noqa: D102
    def statistics(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...  # noqa: D102
    def longest_runs(self, rows: NDArray[np.int32]) -> Counts: ...  # noqa: D102
    def warm_up(self) -> None: ...  # noqa: D102
    def detect(  # noqa: D102
        self,
        values: NDArray[np.float32],
        slots: NDArray[np.int64],
        lengths: NDArray[np.int32],
        mean: NDArray[np.float32],
        scale: NDArray[np.float32],
        rows: NDArray[np.int32],
        history: NDArray[np.float32],
        states: Sequence[NDArray[np.float32] | None] | None = None,
    ) -> Any: ...  # noqa: ANN401


def detectors_of(bundle: Bundle, *, history: bool = False) -> Iterator[tuple[str, Scorer]]:
    """Yield the ways in which fleets are scored: the default one, and that of very large ones.

    With `history` they are compiled for the shapes of backfill, else for those of the service.
    """
    from tsdiff.detector import HISTORY_SHAPES, SHAPES, Detector  # noqa: PLC0415 - loads JAX

    shapes = HISTORY_SHAPES if history else SHAPES
    yield "default", cast(Scorer, Detector(bundle, shapes=shapes, adapt="auto"))
    yield "level", cast(Scorer, Detector(bundle, shapes=shapes, adapt="level"))


def workload(
    scorer: Scorer, entities: int, slots: int, missing: str, seed: int = 0
) -> dict[str, Any]:
    """Make arguments of `detect`: noise around the mean of known entities.

    "few missing" is one silent channel an entity, "many missing" every fifth cell.
    """
    rng = np.random.default_rng(seed)
    mean, scale = scorer.statistics(0)
    width, channels = scorer.window - 1 + slots, len(mean)
    values = mean + scale * rng.standard_normal((entities, width, channels), np.float32)
    if missing == "few missing":
        values[np.arange(entities), :, rng.integers(0, channels, entities)] = np.nan
    elif missing == "many missing":
        values[rng.random(values.shape) < 0.2] = np.nan
    return {
        "values": values.astype(np.float32),
        "slots": np.tile(np.arange(width), (entities, 1)),
        "lengths": np.full(entities, slots, np.int32),
        "mean": np.tile(mean, (entities, 1)),
        "scale": np.tile(scale, (entities, 1)),
        "rows": np.zeros(entities, np.int32),
        "history": np.zeros((entities, scorer.history, scorer.streams), np.float32),
    }


def timed(call: Callable[[], object], seconds: float, least: int = _REPEATS) -> float:
    """Seconds of one call: the median over `seconds`, of `least` calls at the least."""
    call()  # whatever happens only once is not what is asked for
    taken: list[float] = []
    while len(taken) < least or sum(taken) < seconds:
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return median(taken)


def windows_per_second(
    bundle: Bundle, service: Mapping[str, Scorer], seconds: float
) -> list[Record]:
    """Rates of every scorer under every workload; the first, with learning, is to be quoted.

    `service` are the detectors as the service compiles them; those of backfill are built here.
    """
    share = seconds / (len(WORKLOADS) * len(MISSING))
    rates = []
    for name, entities, slots in WORKLOADS:
        built = dict(detectors_of(bundle, history=True)) if name == "history" else service
        for scorer, detector in built.items():
            for missing in MISSING:
                call = workload(detector, entities, slots, missing)
                taken = timed(lambda d=detector, c=call: d.detect(**c), share)  # type: ignore[misc]
                rates.append(_rate(scorer, name, entities, slots, missing, taken))
    return rates


def slow_windows_per_second(bundle: Bundle) -> list[Record]:
    """Rates of the slow scorers that the bundle is calibrated for, live, with nothing missing.

    Whatever is missing costs them the same.
    """
    from tsdiff.detector import Detector  # noqa: PLC0415 - loads JAX

    rates = []
    for scorer in (name for name in bundle.manifest.scorers if name in SLOW_SCORERS):
        detector = cast(Scorer, Detector(bundle, shapes=(_SLOW,), scorer=scorer))
        call = workload(detector, *_SLOW, MISSING[0])
        taken = timed(lambda d=detector, c=call: d.detect(**c), 0.0)  # type: ignore[misc]
        rates.append(_rate(scorer, WORKLOADS[0][0], *_SLOW, MISSING[0], taken))
    return rates


def _rate(
    scorer: str, name: str, entities: int, slots: int, missing: str, seconds: float
) -> Record:
    return {
        "scorer": scorer,
        "workload": name,
        "entities": entities,
        "slots": slots,
        "missing": missing,
        "windows_per_second": entities * slots / seconds,
    }


def learning_seconds_per_slot(scorer: Scorer) -> float:
    """What going on learning costs an entity, from the end of a block to the next score."""
    adaptation = scorer.adaptation
    if adaptation is None:
        return 0.0
    one = workload(scorer, 1, adaptation.context + adaptation.block, "complete")
    weights = np.ones(adaptation.context + adaptation.block, np.float32)
    weights[: adaptation.context] = 0.0
    values, times, mean, scale = (one[name][0] for name in ("values", "slots", "mean", "scale"))
    values, times = values[-len(weights) :], times[-len(weights) :]
    single = workload(scorer, 1, 1, "complete")

    def learn() -> None:
        state = adaptation.learn(0, None, values, times, weights, mean, scale)
        scorer.detect(**single, states=[state])

    more = timed(learn, 1.0) - timed(lambda: scorer.detect(**single), 1.0)
    return max(more, 0.0) / adaptation.block  # learning levels is less than the clock's noise


def compilations_while_shapes_change(scorer: Scorer) -> int:
    """How often a warm detector compiles while sizes and missing patterns change: never."""
    before = scorer.compilations
    for entities, slots in ((1, 1), (3, 2), (64, 1), (65, 1), (200, 1), (5, 16), (9, 17), (2, 40)):
        for seed, missing in enumerate(MISSING):
            scorer.detect(**workload(scorer, entities, slots, missing, seed))
    return scorer.compilations - before


def matmul_flops_per_second(size: int = _MATMUL_SIZE, seconds: float = 0.5) -> float:
    """The machine's float32 peak as a matrix product reaches it: the best of XLA and BLAS."""
    import jax  # noqa: PLC0415 - not where help is asked for
    import jax.numpy as jnp  # noqa: PLC0415

    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    on_device = jnp.asarray(a)
    product = jax.jit(jnp.matmul)

    def best(call: Callable[[], object]) -> float:
        call()
        taken: list[float] = []
        while len(taken) < _REPEATS or sum(taken) < seconds:
            begun = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begun)
        return min(taken)

    fastest = min(
        best(lambda: product(on_device, on_device).block_until_ready()), best(lambda: a @ a)
    )
    return 2 * size**3 / fastest


def counted_flops(compiled: object) -> float | None:
    """Floating-point operations of a compiled function as XLA counts them, loops once."""
    analyse = getattr(compiled, "cost_analysis", None)
    found = analyse() if analyse is not None else None
    # Older versions of JAX answer with a list of one.
    found = found[0] if isinstance(found, list) and found else found
    flops = found.get("flops") if isinstance(found, Mapping) else None
    return float(flops) if flops and flops > 0 else None


def flops_per_window(scorer: object) -> float | None:
    """What a complete window costs in the function compiled for live; None if that is unknown."""
    # The detector does not offer its executables; without them there is nothing to be counted.
    executables = vars(scorer).get("_executables", {})
    for key, compiled in executables.items():
        batch, span, missing = key[:3]
        if span == 1 and missing == 0:
            flops = counted_flops(compiled)
            return None if flops is None else flops / (batch * span)
    return None


class _Known:
    """Every entity is the model's first: what is asked is their state, not their statistics."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.adaptation = scorer.adaptation

    def row(self, entity: str) -> int:
        del entity
        return 0

    def statistics(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self._scorer.statistics(row)

    def longest_runs(self, rows: NDArray[np.int32]) -> Counts:
        return self._scorer.longest_runs(rows)

    def fit_statistics(
        self, count: NDArray[Any], total: NDArray[Any], total_sq: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        del count, total, total_sq
        return self.statistics(0)


def bytes_per_entity(bundle: Bundle, scorer: Scorer) -> float:
    """Measure what a further entity adds to a partition's buffer, and say what learning adds."""
    from stream.buffer import PartitionBuffer  # noqa: PLC0415
    from stream.compose import Model, grid_of  # noqa: PLC0415
    from stream.config import ServiceConfig  # noqa: PLC0415
    from stream.records import PartitionId, ReadingBatch  # noqa: PLC0415

    config = ServiceConfig.model_validate({"model": {"path": "-"}, "input": {"topic": "-"}})
    grid = grid_of(Model(bundle, cast(Any, scorer)), config)
    held = []
    for entities in _ENTITIES:
        tracemalloc.start()
        buffer = PartitionBuffer(grid, _Known(scorer))
        batch = ReadingBatch(
            PartitionId("-", 0),
            [f"host-{number:06d}" for number in range(entities)],
            np.zeros(entities, np.int64),
            np.zeros((entities, grid.channels), np.float32),
            np.arange(entities),
            entities,
        )
        for _ in buffer.advance(batch):
            pass
        if len(buffer.names) != entities:
            raise TsdiffError(
                f"expected {entities} entities in the buffer, {len(buffer.names)} are"
            )
        del batch
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    learned = 0 if scorer.adaptation is None else scorer.adaptation.entity_bytes
    return (held[1] - held[0]) / (_ENTITIES[1] - _ENTITIES[0]) + learned


# -- the research way --------------------------------------------------------------------------


def research_windows_per_second(
    bundle: Bundle,
    *,
    windows: int = 4,
    steps: int = _RESEARCH_STEPS,
    samples: int = _RESEARCH_SAMPLES,
) -> float:
    """Score windows as papers do: sample the hidden slots many times, in many denoising steps.

    The same model, the same mask, one core; ancestral sampling (Ho et al. 2020, algorithm 2).
    """
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415

    from tsdiff.reading import make_denoiser  # noqa: PLC0415
    from tsdiff.samplers import Ancestral, sample  # noqa: PLC0415
    from tsdiff.sde import LinearVP, beta_levels, linear_betas  # noqa: PLC0415

    config, channels = bundle.manifest.model, len(bundle.channels)
    cells, hidden = config.window * channels, config.hidden * channels
    x = jnp.asarray(np.random.default_rng(0).standard_normal((windows, cells), np.float32))
    target = jnp.broadcast_to(jnp.arange(cells) >= cells - hidden, x.shape)
    levels = beta_levels(linear_betas(steps))
    denoise = make_denoiser(bundle)
    draw = jax.jit(
        lambda key: sample(
            denoise, LinearVP(), Ancestral(), x, ~target, target, key, levels, samples=samples
        )
    )
    taken = timed(lambda: draw(jax.random.key(0)).block_until_ready(), 0.0, least=3)
    return windows / taken


# -- for people --------------------------------------------------------------------------------


def as_text(found: Record) -> str:
    """Lay out what was found, one fact a line, and rates as a table."""
    share, flops = found["matmul_peak_share"], found["flops_per_window"]
    research, rate = found["research_windows_per_second"], found["windows_per_second_per_core"]
    facts = [
        ("model", f"{found['model']}, {found['channels']} channels"),
        ("machine", f"{found['cpu']}, {found['cores']} cores"),
        (
            "matmul peak",
            f"{found['matmul_gflops']:.0f} GFLOP/s on one core"
            + ("" if flops is None else f"; a window takes {flops / 1e6:.2f} MFLOP: {share:.1%}"),
        ),
        (
            "compilation",
            f"{found['compilations']} in {found['compile_seconds']:.1f} s on one core; "
            f"{found['compilations_after_warmup']} more while batches and missing cells change",
        ),
        (
            "per entity",
            f"{found['bytes_per_entity'] / 1024:.1f} KiB in very large fleets (level), "
            f"{found['bytes_per_entity_default'] / 1024:.0f} KiB in others",
        ),
        (
            "learning",
            f"{1e6 * found['learning_seconds_per_slot']:.0f} us a slot, counted in what is quoted",
        ),
        ("peak memory", f"{found['peak_memory_bytes'] / 2**20:.0f} MiB to load, compile and score"),
        (
            "first score",
            f"after {found['seconds_to_first_score']:.1f} s; "
            f"{found['seconds_to_first_score_cached']:.1f} s with a compilation cache",
        ),
        (
            "research way",
            f"{research:.2f} windows/s ({_RESEARCH_STEPS} steps x {_RESEARCH_SAMPLES} samples): "
            f"{rate / research:,.0f} times slower",
        ),
        ("end to end", "not measured here: `tsdiff bench --kafka HOST:PORT`"),
    ]
    lines = [*_facts(facts), "", *_rate_table(found["rates"])]
    if found["core_share"] < 0.9:
        lines += ["", f"busy machine: the core was ours {found['core_share']:.0%} of the time"]
    return "\n".join(lines)


def service_text(found: Record) -> str:
    """Lay out what `run_service_bench` found."""
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in found["stage_share"].items())
    p50, p99 = found["latency_p50_seconds"], found["latency_p99_seconds"]
    memory = found["peak_service_memory_bytes"]
    facts = [
        ("model", f"{found['model']}, {found['channels']} channels"),
        (
            "machine",
            f"{found['cpu']}, {found['cores']} cores for broker, producer and {found['services']} "
            f"service{'' if found['services'] == 1 else 's'}",
        ),
        ("entities", f"{found['entities']:,}"),
        (
            "backlog",
            f"{found['readings_per_second']:,.0f} readings/s; what was waiting was worked off in "
            f"{found['lag_recovery_seconds']:.1f} s",
        ),
        ("time goes to", f"{shares} (of the wall time of the backlog)"),
        (
            "latency",
            f"append to metric at {found['rate']:,.0f} readings/s: "
            + ("none measured" if p50 is None else f"p50 {p50:.3f} s, p99 {p99:.3f} s")
            + f"; {found['rate_share_kept']:.0%} of the rate was sent",
        ),
        ("lag at the end", f"{found['lag_at_end_seconds']:.1f} s"),
        ("peak memory", "unknown" if memory is None else f"{memory / 2**20:,.0f} MiB"),
        (
            "lost",
            f"{found['late_readings']:.0f} readings too late, {found['dead_letters']:.0f} dead "
            "letters",
        ),
    ]
    return "\n".join(_facts(facts))


def _facts(facts: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in facts)
    return [f"{name:<{width}}  {text}" for name, text in facts]


def _rate_table(rates: Sequence[Record]) -> list[str]:
    """One line a scorer and workload, one column a way of missing."""
    table = [["windows/s on one core", *MISSING]]
    kinds = dict.fromkeys((r["scorer"], r["workload"], r["entities"], r["slots"]) for r in rates)
    for kind in kinds:
        scorer, name, entities, slots = kind
        found = {
            r["missing"]: r["windows_per_second"]
            for r in rates
            if (r["scorer"], r["workload"], r["entities"], r["slots"]) == kind
        }
        prefix = "" if scorer == "default" else f"{scorer}, "
        label = f"{prefix}{name}: {entities:,} x {slots} slot{'' if slots == 1 else 's'}"
        table.append([label, *(f"{found[m]:,.0f}" if m in found else "" for m in MISSING)])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

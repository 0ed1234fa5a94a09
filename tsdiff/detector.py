# ruff: noqa: F722
"""A bundle put to work: raw values in, calibrated evidence, expected values and bands out.

The compiled function is pure and stateless: everything a result depends on is in its arguments.
It is compiled once for each of a few padded shapes (`shapes`, each for no, few and any number of
missing cells); whatever comes in is cut and padded to these, so the steady state never compiles.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from numpy.typing import NDArray

from tsdiff import calibration, scorers
from tsdiff.adapt import make_adaptation
from tsdiff.bundle import Bundle
from tsdiff.calibration import Calibration
from tsdiff.config import SLOW_SCORERS, Adapt, ModelConfig, Scorer
from tsdiff.errors import BundleError, ConfigError
from tsdiff.normalize import Statistics, denormalize, normalize, running_statistics
from tsdiff.reading import Model, Reader, build_model, read_spans
from tsdiff.runs import Counts
from tsdiff.season import harmonics, means_of_slots
from tsdiff.types import DoubleArray, FloatArray, IntArray

_Scalar = TypeVar("_Scalar", bound=np.generic)

# Missing cells per window that a compiled shape is made for: none; one silent channel, or a slot
# of a few, or 1 % here and there; any number.
_MISSING: tuple[int | None, ...] = (0, 16, None)
# (entities, slots) that are compiled. Live, few or many entities have one slot each; a backlog has
# many slots of each. Both are 64 windows: 256 are no faster a window, and a small fleet would pay
# for all of them; a further size would cost everybody seconds at start.
SHAPES: Final = ((64, 1), (4, 16))
HISTORY_SHAPES: Final = ((4, 64),)
"""For history, where spans may be as long as one likes: a tenth to a third faster a window."""
_Z90 = 1.645  # half-width of a 90 % band in standard deviations


class Detection(NamedTuple):
    """What `Detector.detect` returns, NumPy float32; rows past an entity's length are NaN.

    `evidence` (E, T) is -log10 of the tail probability; `streams` (E, T, S), of the slots `lag`
    later, is to be kept as history; `expected`, `lower`, `upper` (E, T, D) are in raw units, a 90 %
    band; `contribution` (E, T, D) sums to 1 over the observed channels; `imputed_ratio` (E, T) is
    the share of missing cells of the slot.
    """

    evidence: FloatArray
    streams: FloatArray
    expected: FloatArray
    lower: FloatArray
    upper: FloatArray
    contribution: FloatArray
    imputed_ratio: FloatArray


class Tables(NamedTuple):
    """Arrays of the bundle beside the model: calibration, band scale (R+1, D), season (R+1, K, D).

    The calibration's tables are those of the chosen lag, (R+1, C, Q) and (R+1, C), the joint ones
    of the chosen scorer, too: (R+1, Q), (R+1,) and ().
    """

    calibration: Calibration
    band_scale: Array
    season: Array


class Traced(NamedTuple):
    """As `Detection`, of JAX arrays."""

    evidence: Float[Array, "E T"]
    streams: Float[Array, "E T S"]
    expected: Float[Array, "E T D"]
    lower: Float[Array, "E T D"]
    upper: Float[Array, "E T D"]
    contribution: Float[Array, "E T D"]
    imputed_ratio: Float[Array, "E T"]


def _contributions(surprise: Float[Array, "E T D"], observed: Array) -> Float[Array, "E T D"]:
    """Squared surprises as shares of their sum; shares are equal where nothing surprises."""
    squared = jnp.minimum(surprise**2, 1e12)
    total = squared.sum(-1, keepdims=True)
    count = jnp.maximum(observed.sum(-1, keepdims=True), 1)
    return jnp.where(total > 0, squared / jnp.maximum(total, 1e-30), observed / count)


def detect_spans(
    model: Model,
    tables: Tables,
    values: Float[Array, "E M D"],
    basis: Float[Array, "E M K"],
    mean: Float[Array, "E D"],
    scale: Float[Array, "E D"],
    rows: Int[Array, " E"],
    history: Float[Array, "E H S"],
    *,
    reader: Reader,
    scorer: str,
    lag: int,
    missing: int | None,
) -> Traced:
    """Score T = M - W + 1 - lag slots of every entity: the function that is compiled.

    A slot's streams are read from the window that ends at it, whatever the lag; what follows it
    counts in a long time scale. `basis` are the slots' `season.harmonics`.
    """
    fitted, config = tables.calibration, reader.config
    unit = scale[:, None, :]
    centre = means_of_slots(mean, scale, tables.season[rows], basis)
    z = normalize(values, centre, unit, config.clip)
    last = z.shape[1] - lag
    read = read_spans(model, z[:, lag:], rows, reader, missing=missing)
    neutral = fitted.neutral[rows]
    streams = scorers.settle(read.streams, read.coverage, neutral[:, None, :])
    streams = jnp.where(jnp.isfinite(streams), streams, neutral[:, None, :])
    known = jnp.concatenate([history, streams], 1)
    usual = fitted.knots[rows][:, : streams.shape[-1], -1]
    known = scorers.at_scales(known, neutral, usual, scorers.scales(config, lag))
    evidence = calibration.stream_evidence(known, fitted.knots[rows], fitted.slope[rows])
    if lag:
        read = read_spans(model, z[:, :last], rows, reader, missing=missing)
    network = reader.network is not None
    combined = calibration.add_cusum(calibration.combine(evidence, scorer, network=network))
    joint = calibration.joint_evidence(combined, fitted.joint_knots[rows], fitted.joint_slope[rows])
    z = z[:, config.window - 1 : last]
    observed = jnp.isfinite(z)
    half_width = read.sd * tables.band_scale[rows][:, None, :]
    centre = centre[:, config.window - 1 : last]
    raw = partial(denormalize, mean=centre, scale=unit, clip=config.clip)
    return Traced(
        evidence=joint,
        streams=streams,
        expected=raw(read.expected),
        lower=raw(read.expected - _Z90 * half_width),
        upper=raw(read.expected + _Z90 * half_width),
        contribution=_contributions(read.surprise, observed),
        imputed_ratio=1.0 - observed.mean(-1),
    )


def history_slots(config: ModelConfig, lag: int) -> int:
    """How many slots' streams, besides those of the newest slot, the evidence of a slot needs."""
    by = scorers.scales(config, lag)
    return by.behind + by.ahead + calibration.CUSUM_BEHIND


def cut_span(
    entities: int, slots: int, batches: Mapping[int, int]
) -> Iterator[tuple[int, int, int]]:
    """Cut a span of so many entities into pieces (start, length, padded length).

    `batches` are the lengths that are compiled for, and how many entities each takes at a time.
    Every piece is the one that takes the fewest windows, padding included, for a slot.
    """
    start = 0
    while start < slots:
        left = slots - start

        def cost(length: int, left: int = left) -> tuple[float, int, int]:
            calls = -(-entities // batches[length])
            windows = calls * batches[length] * length / min(length, left)
            # Of equals the longer one, if it is full: an entity's slots share its anchor.
            return windows, max(length - left, 0), -length

        padded = min(batches, key=cost)
        yield start, min(padded, left), padded
        start += padded


class Detector:
    """Scores spans of slots for many entities at once.

    Attributes:
        bundle: what it was built from.
        scorer: how the model is read, one of the bundle's (`config.Scorer`).
        lag: slots after a slot that must be known before it is scored, one of `calibration.LAGS`.
        adaptation: how entities go on learning from their readings, if they do.
        window: slots of raw history a slot needs, itself included (W).
        history: slots before the newest one whose streams are needed (H).
        slots_per_alarm: how many slots above a line make one alarm of normal data.
        streams: raw stream values per slot that are kept as history (S).
        longest_span: slots of an entity that one call of the compiled function can score.
        compilations: how often the function has been traced.

    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        shapes: Sequence[tuple[int, int]] = SHAPES,
        scorer: str = calibration.SCORERS[0],
        lag: int = 0,
        adapt: Adapt = "none",
    ) -> None:
        _one_of("a scorer", scorer, get_args(Scorer))
        if scorer not in bundle.manifest.scorers:
            raise ConfigError(
                f"expected a scorer that bundle {bundle.manifest.name} is calibrated for "
                f"({', '.join(bundle.manifest.scorers)}), got {scorer!r}; train it with "
                f"`tsdiff train --scorer {scorer}`"
            )
        _one_of("a lag", lag, calibration.LAGS)
        _one_of("adapt", adapt, get_args(Adapt))
        self.bundle = bundle
        self.scorer = scorer
        self.lag = lag
        self.channels = bundle.channels
        self.period_ms = bundle.period_ms
        self._config = bundle.manifest.model
        self.window = self._config.window
        self.history = history_slots(self._config, lag)
        self.compilations = 0
        self._batches = {span: batch for batch, span in shapes}
        self.longest_span = max(self._batches)
        self._rows = {entity: row for row, entity in enumerate(bundle.entities)}
        try:
            self._statistics = Statistics(
                *(_float(bundle, f"statistics.{name}") for name in Statistics.__annotations__)
            )
            self._longest = np.asarray(bundle.arrays["runs.longest"], np.int32)
            fitted = calibration.tables_of(bundle.arrays, scorer)
            slow = scorer if scorer in SLOW_SCORERS else None
            self._model, self._reader = build_model(bundle, slow)
            of_lag, of_scorer = calibration.LAGS.index(lag), self._reader.scorers.index(scorer)
            # Tables of a lag with few scales are as wide as those of one with many.
            columns = fitted.neutral.shape[1] * (1 + len(scorers.scales(self._config, lag).each))
            self._tables = Tables(
                fitted._replace(
                    knots=fitted.knots[:, of_lag, :columns],
                    slope=fitted.slope[:, of_lag, :columns],
                    joint_knots=fitted.joint_knots[:, of_lag, of_scorer],
                    joint_slope=fitted.joint_slope[:, of_lag, of_scorer],
                    slots_per_alarm=fitted.slots_per_alarm[of_lag, of_scorer],
                ),
                jnp.asarray(_float(bundle, "band_scale")),
                jnp.asarray(_float(bundle, "season")),
            )
            self.adaptation = make_adaptation(adapt, bundle, self._model, scorer)
            if self.adaptation is not None:
                self._model = self.adaptation.start(self._model)
        except KeyError as error:
            raise BundleError(
                f"bundle {bundle.manifest.name} lacks the array {error}; train it again"
            ) from error
        # What a slow scorer costs does not depend on it.
        self._missing = (None,) if slow else _MISSING
        self.slots_per_alarm = float(self._tables.calibration.slots_per_alarm)
        self._terms = int(self._tables.season.shape[1])
        self.streams = int(self._tables.calibration.neutral.shape[1])
        self._jitted = jax.jit(self._trace, static_argnames=("missing",))
        self._threads = ThreadPoolExecutor(os.cpu_count(), "tsdiff-detect")
        self._executables: dict[tuple[int, int, int | None], Callable[..., Traced]] = {}

    def _trace(
        self,
        model: Model,
        tables: Tables,
        values: Array,
        basis: Array,
        mean: Array,
        scale: Array,
        rows: Array,
        history: Array,
        missing: int | None,
    ) -> Traced:
        self.compilations += 1  # runs when JAX traces, that is, once per shape
        return detect_spans(
            model,
            tables,
            values,
            basis,
            mean,
            scale,
            rows,
            history,
            reader=self._reader,
            scorer=self.scorer,
            lag=self.lag,
            missing=missing,
        )

    def row(self, entity: str) -> int:
        """Row of an entity of the training data; -1 for one never seen."""
        return self._rows.get(entity, -1)

    def statistics(self, row: int) -> tuple[FloatArray, FloatArray]:
        """Mean and scale (D,) of a row; row -1 is the pooled one."""
        return self._statistics.mean[row].copy(), self._statistics.scale[row].copy()

    def threshold(self, false_alarms_per_entity_week: float) -> float:
        """Evidence at which the anomaly score is 1, see `calibration.evidence_threshold`."""
        return calibration.evidence_threshold(
            false_alarms_per_entity_week, self.period_ms, self.slots_per_alarm
        )

    def longest_runs(self, rows: IntArray) -> Counts:
        """Longest gaps and standstills (n, 2, D) that training saw in these rows (-1: in all)."""
        return self._longest[rows]

    def fit_statistics(
        self, count: DoubleArray, total: DoubleArray, total_sq: DoubleArray
    ) -> tuple[FloatArray, FloatArray]:
        """Mean and scale (D,) of a never-seen entity from running sums (D,) of raw readings."""
        return running_statistics(
            count, total, total_sq, self._statistics, self._config.scale_floor
        )

    def warm_up(self) -> None:
        """Compile every shape, so that no later call has to."""
        keys = [
            (batch, span, missing)
            for span, batch in self._batches.items()
            for missing in self._missing
        ]
        # XLA compiles one module on one core and lets go of the interpreter meanwhile.
        for _ in self._threads.map(self._executable, keys):
            pass

    def _executable(self, key: tuple[int, int, int | None]) -> Callable[..., Traced]:
        """The compiled function for (batch, span, most missing cells)."""
        found = self._executables.get(key)
        if found is None:
            batch, span, missing = key
            channels = len(self.channels)
            found = self._jitted.lower(
                self._model,
                self._tables,
                _shape(batch, self.window - 1 + span + self.lag, channels),
                _shape(batch, self.window - 1 + span + self.lag, self._terms),
                _shape(batch, channels),
                _shape(batch, channels),
                _shape(batch, dtype=np.int32),
                _shape(batch, self.history, self.streams),
                missing=missing,
            ).compile()
            self._executables[key] = found
        return found

    def detect(
        self,
        values: FloatArray,
        slots: NDArray[np.int64],
        lengths: IntArray,
        mean: FloatArray,
        scale: FloatArray,
        rows: IntArray,
        history: FloatArray,
        states: Sequence[FloatArray | None] | None = None,
    ) -> Detection:
        """Score the last slots of E entities; the result does not depend on cuts or batches.

        `values` (E, W-1+T+lag, D) are raw, NaN = missing; entity e's scored slots are rows W-1 to
        W-1+lengths[e]-1, what follows the `lag` slots after them is padding. `slots` (E, W-1+T+lag)
        are the rows' numbers, which tell the time of day. `mean`, `scale` (E, D) are the entities'
        statistics, `rows` (E,) their rows (-1: pooled), `history` (E, H, S) the streams of the
        slots before those that this call reads anew, oldest first, NaN = none; `states` what each
        entity has learned so far (`Adaptation.learn`), None = nothing.

        Raises:
            ValueError: an argument has a shape other than these.

        """
        values = np.asarray(values, np.float32)
        lengths, rows = np.asarray(lengths, np.int32), np.asarray(rows, np.int32)
        mean, scale = np.asarray(mean, np.float32), np.asarray(scale, np.float32)
        self._check(values, slots, lengths, mean, scale, rows, history)
        basis = harmonics(slots, self.period_ms, self._terms)
        if self.adaptation is not None:
            known = [None] * len(rows) if states is None else states
            self._model, mean = self.adaptation.prepare(self._model, rows, mean, scale, known)
        entities, span = len(values), values.shape[1] - self.window + 1 - self.lag
        result = self._empty(entities, span)
        history = np.asarray(history, np.float32)
        for start, length, size in cut_span(entities, span, self._batches):
            read = slice(start, start + self.window - 1 + length + self.lag)
            piece, times = values[:, read], basis[:, read]
            most = self._most_missing(piece, lengths - start)
            kind = np.searchsorted([bound for bound in self._missing if bound is not None], most)
            kind[lengths <= start] = -1
            into = Detection(*(whole[:, start : start + length] for whole in result))
            score = partial(self._score, (piece, times, mean, scale, rows, history), into, size)
            # Together they keep all cores at work, with laying out as well as with computing.
            for _ in self._threads.map(score, *zip(*self._batched(kind, size), strict=True)):
                pass
            recent = np.concatenate([history, result.streams[:, start : start + length]], 1)
            history = recent[:, length:]
        beyond = np.arange(span) >= lengths[:, None]
        for whole in result:
            whole[beyond] = np.nan
        return result

    def _batched(
        self, kind: NDArray[np.int64], size: int
    ) -> Iterator[tuple[NDArray[np.intp], Callable[..., Traced]]]:
        """Entities that share a call, and the compiled function for it.

        `kind` (E,) is which of `self._missing` each is to be read as, -1 = not at all.
        """
        batch = self._batches[size]
        for number, missing in enumerate(self._missing):
            chosen = np.flatnonzero(kind == number)
            for begin in range(0, len(chosen), batch):
                call = self._executable((batch, size, missing))
                yield chosen[begin : begin + batch], call

    def _score(
        self,
        arguments: tuple[FloatArray, FloatArray, FloatArray, FloatArray, IntArray, FloatArray],
        into: Detection,
        size: int,
        index: NDArray[np.intp],
        call: Callable[..., Traced],
    ) -> None:
        """Call the compiled function for the entities `index`; put what it finds into place."""
        values, basis, mean, scale, rows, history = (part[index] for part in arguments)
        batch, length = self._batches[size], into.evidence.shape[1]
        found = call(
            self._model,
            self._tables,
            _pad(values, batch, size - length),
            _pad(basis, batch, size - length, fill=0.0),
            _pad(mean, batch, fill=0.0),
            _pad(scale, batch, fill=1.0),
            _pad(rows, batch, fill=-1),
            _pad(history, batch),
        )
        for whole, part in zip(into, found, strict=True):
            whole[index] = np.asarray(part)[: len(index), :length]

    def _most_missing(self, values: FloatArray, lengths: IntArray) -> NDArray[np.int64]:
        """Most missing cells in any anchor window of each entity's span, (E,)."""
        length = self._config.window
        cells = np.count_nonzero(~np.isfinite(values[:, self.window - length :]), axis=2)
        windows = np.lib.stride_tricks.sliding_window_view(cells, length, axis=1).sum(2)
        # Padding after an entity's own length does not make its windows incomplete.
        own = np.arange(windows.shape[1]) < lengths[:, None] + self.lag
        most: NDArray[np.int64] = np.where(own, windows, 0).max(1)
        return most

    def _empty(self, entities: int, span: int) -> Detection:
        channels = len(self.channels)
        shapes: list[tuple[int, ...]] = [(), (self.streams,)] + [(channels,)] * 4 + [()]
        return Detection(
            *(np.full((entities, span, *shape), np.nan, np.float32) for shape in shapes)
        )

    def _check(
        self,
        values: FloatArray,
        slots: NDArray[np.int64],
        lengths: IntArray,
        mean: FloatArray,
        scale: FloatArray,
        rows: IntArray,
        history: FloatArray,
    ) -> None:
        entities, channels = len(values), len(self.channels)
        fewest = self.window + self.lag
        if values.ndim != 3 or values.shape[1] < fewest or values.shape[2] != channels:
            raise ValueError(
                f"expected values of shape (E, {fewest} - 1 + T, {channels}) with T >= 1, "
                f"got {values.shape}"
            )
        wanted: dict[str, tuple[NDArray[Any], tuple[int, ...]]] = {
            "slots": (slots, values.shape[:2]),
            "lengths": (lengths, (entities,)),
            "mean": (mean, (entities, channels)),
            "scale": (scale, (entities, channels)),
            "rows": (rows, (entities,)),
            "history": (history, (entities, self.history, self.streams)),
        }
        for name, (array, shape) in wanted.items():
            if array.shape != shape:
                raise ValueError(f"expected {name} of shape {shape}, got {array.shape}")


def _one_of(what: str, given: object, allowed: Sequence[object]) -> None:
    if given not in allowed:
        raise ConfigError(f"expected {what} of {', '.join(map(str, allowed))}, got {given!r}")


def _shape(*shape: int, dtype: type = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def _float(bundle: Bundle, name: str) -> FloatArray:
    return np.asarray(bundle.arrays[name], np.float32)


def _pad(
    array: NDArray[_Scalar], batch: int, span: int = 0, *, fill: float = np.nan
) -> NDArray[_Scalar]:
    """Pad the first axis to `batch`, the second by `span`."""
    short = batch - len(array)
    if short == 0 and span == 0:
        return array
    widths = [(0, short), (0, span)][: array.ndim] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, widths, constant_values=fill)

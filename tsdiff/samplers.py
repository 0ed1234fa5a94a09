# ruff: noqa: F722
"""Draw the target cells of a window given its conditioned cells; and their likelihood.

All methods move y = x_t / scale(t) = x + sigma n down a grid of noise levels and end with the
denoiser's mean at the last one. In these coordinates DDPM, DDIM, Heun and DPM-Solver++ are the
same for every noise process, which enters by the grid alone; the SDE's methods step in the
process's own time and scale.

| method                 | per level | order | source                                            |
| ---------------------- | --------- | ----- | ------------------------------------------------- |
| `Ancestral`            | 1         | 1     | DDPM: Ho et al. 2020, arXiv:2006.11239            |
| `DDIM`                 | 1         | 1     | Song, Meng & Ermon 2021, arXiv:2010.02502         |
| `EulerMaruyama`        | 1         | 1 weak| reverse SDE: Song et al. 2021, arXiv:2011.13456   |
| `PredictorCorrector`   | 1 + m     | -     | Song et al. 2021, algorithms 2-5                  |
| `Heun`                 | 2         | 2     | Karras et al. 2022, arXiv:2206.00364, alg. 1, 2   |
| `DPMSolver2M`          | 1         | 2     | DPM-Solver++(2M): Lu et al. 2022, arXiv:2211.01095|

"Per level" counts calls of the denoiser, m being the number of corrections. The denoiser sees
conditioned cells clean (noise variance 0) and the others noisy or not at all, so an exact
conditional denoiser gives exact conditional samples; nothing is replaced or projected on the way.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, PRNGKeyArray

from tsdiff.errors import ConfigError
from tsdiff.sde import Process, diffusion, reverse_drift, score_from_x0
from tsdiff.types import DenoiseFn

# y (..., B, N) and sigma () -> E[x | y] in every cell, given the conditioned ones.
Denoise = Callable[[Array, Array], Array]


class Step(NamedTuple):
    """What a step may use: y at noise level `now`, to be taken to `after`.

    `before` is the level of the step before, infinite at the first, and `earlier` what that step
    denoised.
    """

    denoise: Denoise
    process: Process
    y: Float[Array, "S B N"]
    earlier: Float[Array, "S B N"]
    before: Float[Array, ""]
    now: Float[Array, ""]
    after: Float[Array, ""]
    key: PRNGKeyArray

    def noise(self) -> Float[Array, "S B N"]:
        """Standard normal, the same at every call."""
        return jax.random.normal(self.key, self.y.shape, self.y.dtype)


class Method(Protocol):
    """One step of a sampler. A frozen value, so that it can be a static argument of `jit`."""

    def __call__(self, step: Step) -> tuple[Float[Array, "S B N"], Float[Array, "S B N"]]:
        """Return y at `step.after`, and what was denoised on the way: the next one's `earlier`."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Ancestral:
    """DDPM: draw from q(x_s | x_t, x_0 = D), the exact posterior (Ho et al. 2020, eq. 6-7).

    With the levels of `sde.beta_levels` it is DDPM's algorithm 2, with beta-tilde as variance.
    """

    def __call__(self, step: Step) -> tuple[Array, Array]:
        """See `Method`."""
        denoised = step.denoise(step.y, step.now)
        kept = (step.after / step.now) ** 2
        mean = denoised + kept * (step.y - denoised)
        return mean + step.after * jnp.sqrt(1.0 - kept) * step.noise(), denoised


@dataclass(frozen=True)
class DDIM:
    """Any process with DDPM's marginals (Song, Meng & Ermon 2021, eq. 12 and 16).

    `eta` 0 is deterministic (Euler's method on the probability-flow ODE), 1 is DDPM.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"expected 0 <= eta <= 1 (0: deterministic, 1: DDPM), got {self}")

    def __call__(self, step: Step) -> tuple[Array, Array]:
        """See `Method`."""
        denoised = step.denoise(step.y, step.now)
        epsilon = (step.y - denoised) / step.now
        fresh = self.eta**2 * (1.0 - (step.after / step.now) ** 2)  # share of the variance
        moved = denoised + step.after * jnp.sqrt(1.0 - fresh) * epsilon
        if self.eta > 0:
            moved = moved + step.after * jnp.sqrt(fresh) * step.noise()
        return moved, denoised


@dataclass(frozen=True)
class EulerMaruyama:
    """The reverse-time SDE (Song et al. 2021, eq. 6), by Euler's method in the process's time."""

    def __call__(self, step: Step) -> tuple[Array, Array]:
        """See `Method`."""
        process = step.process
        t, t_after = process.time(step.now), process.time(step.after)
        scale = process.scale(t)
        denoised = step.denoise(step.y, step.now)
        x = scale * step.y
        grad_log_p = score_from_x0(x, denoised, scale, scale * step.now)
        back = jnp.maximum(t - t_after, 0.0)  # by rounding, two close levels may swap
        x = x - back * reverse_drift(process, x, t, grad_log_p)
        x = x + diffusion(process, t) * jnp.sqrt(back) * step.noise()
        return x / process.scale(t_after), denoised


@dataclass(frozen=True)
class PredictorCorrector:
    """A step of `predictor`, then Langevin steps at the new level (Song et al., algorithms 2-5).

    y + e grad log p(y) + sqrt(2 e) z with e = 2 (snr sigma)^2. Song et al. set
    e = 2 (snr |z| / |grad log p|)^2, which is this where noise dominates and norms are those
    expected. Measured norms would make a window's sample depend on its neighbours in the batch,
    or, window by window, blow up where there are few targets and their gradient happens to vanish.
    """

    predictor: Method = EulerMaruyama()
    corrections: int = 1
    snr: float = 0.16  # Song et al.'s choice for most of their models

    def __post_init__(self) -> None:
        if self.corrections < 1 or not 0 < self.snr < 1:
            raise ConfigError(
                f"expected corrections >= 1 and 0 < snr < 1, got {self}; from 1 on the Langevin "
                "steps would diverge"
            )

    def __call__(self, step: Step) -> tuple[Array, Array]:
        """See `Method`."""
        key_predictor, key_corrector = jax.random.split(step.key)
        predicted, denoised = self.predictor(step._replace(key=key_predictor))

        def correct(y: Array, key: Array) -> tuple[Array, None]:
            towards = 2.0 * self.snr**2 * (step.denoise(y, step.after) - y)
            away = 2.0 * self.snr * step.after * jax.random.normal(key, y.shape, y.dtype)
            return y + towards + away, None

        keys = jax.random.split(key_corrector, self.corrections)
        return jax.lax.scan(correct, predicted, keys)[0], denoised


@dataclass(frozen=True)
class Heun:
    """Second order on the probability-flow ODE dy / dsigma = (y - D) / sigma (Karras et al. 2022).

    Algorithm 1; with `churn` algorithm 2: levels within `churn_range` are first raised by that
    share with fresh noise, of `churn_noise` times the due size. `churn` is Karras et al.'s gamma,
    S_churn over the number of steps and at most sqrt(2) - 1.
    """

    churn: float = 0.0
    churn_range: tuple[float, float] = (0.0, math.inf)
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.churn <= math.sqrt(2) - 1:
            raise ConfigError(f"expected 0 <= churn <= sqrt(2) - 1, got {self}")

    def __call__(self, step: Step) -> tuple[Array, Array]:
        """See `Method`."""
        y, now, after = step.y, step.now, step.after
        if self.churn > 0:
            low, high = self.churn_range
            gamma = jnp.where((low <= now) & (now <= high), self.churn, 0.0)
            fresh = self.churn_noise * now * jnp.sqrt(gamma * (2.0 + gamma))
            y, now = y + fresh * step.noise(), now * (1.0 + gamma)
        denoised = step.denoise(y, now)
        slope = (y - denoised) / now
        euler = y + (after - now) * slope
        slope_after = (euler - step.denoise(euler, after)) / after
        return y + (after - now) * 0.5 * (slope + slope_after), denoised


@dataclass(frozen=True)
class DPMSolver2M:
    """DPM-Solver++(2M): exact but for D, extrapolated in log sigma (Lu et al. 2022, alg. 2).

    The first step has nothing to extrapolate from: `before` is infinite, which makes it DDIM's.
    """

    def __call__(self, step: Step) -> tuple[Array, Array]:
        """See `Method`."""
        denoised = step.denoise(step.y, step.now)
        kept = step.after / step.now
        r = jnp.log(step.before / step.now) / -jnp.log(kept)
        ahead = denoised + 0.5 / r * (denoised - step.earlier)
        return kept * step.y + (1.0 - kept) * ahead, denoised


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "ddpm": Ancestral(),
        "ddim": DDIM(),
        "euler_maruyama": EulerMaruyama(),
        "predictor_corrector": PredictorCorrector(),
        "heun": Heun(),
        "dpm_solver_2m": DPMSolver2M(),
    }
)


def sample(
    denoise: DenoiseFn,
    process: Process,
    method: Method,
    x: Float[Array, "B N"],
    conditioned: Bool[Array, "B N"],
    target: Bool[Array, "B N"],
    key: PRNGKeyArray,
    levels: Float[Array, " n"],
    *,
    samples: int = 1,
    start: Float[Array, "S _ N"] | None = None,
) -> Float[Array, "S B N"]:
    """Draw the target cells given the conditioned cells; all others are as in `x`.

    `x` is in normalised units; only its conditioned cells are read, so that missing ones may be
    NaN. A missing cell to be imputed is a target; a cell that is neither is averaged over; one
    that is both counts as conditioned. `levels` are noise levels that fall and stay positive
    (`sde.karras_levels` and its like), `levels[0]` so high that targets are noise alone: what is
    lost is of the order of the data's mean over `levels[0]`. `start`, standard normal noise to
    begin with, is drawn here if None; one for all windows has a second axis of 1. The denoiser is
    mapped over samples, so that it sees (B, N) and may hold what belongs to each window.
    `denoise`, `process`, `method` and `samples` are static under `jit`.
    """
    target = target & ~conditioned
    given = jax.vmap(conditional(denoise, x, conditioned, target), (0, None))
    key_start, key_steps = jax.random.split(key)
    if start is None:
        start = jax.random.normal(key_start, (samples, *x.shape), x.dtype)
    y = levels[0] * jnp.broadcast_to(start, (samples, *x.shape))
    before = jnp.concatenate([jnp.full(1, jnp.inf, levels.dtype), levels])[:-2]
    keys = jax.random.split(key_steps, len(levels) - 1)

    def advance(
        state: tuple[Array, Array], step: tuple[Array, Array, Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        return method(Step(given, process, *state, *step)), None

    steps = (before, levels[:-1], levels[1:], keys)
    (y, _), _ = jax.lax.scan(advance, (y, jnp.zeros_like(y)), steps)
    return jnp.where(target, given(y, levels[-1]), x)


def conditional(
    denoise: DenoiseFn,
    x: Float[Array, "B N"],
    conditioned: Bool[Array, "B N"],
    target: Bool[Array, "B N"],
) -> Denoise:
    """The denoiser of target cells at one noise level, with the conditioned ones clean.

    `target` and `conditioned` have no cell in common; all other cells say nothing.
    """
    clean = jnp.where(conditioned, x, 0.0)

    def denoise_targets(y: Float[Array, "B N"], sigma: Float[Array, ""]) -> Float[Array, "B N"]:
        known = jnp.where(conditioned, 0.0, jnp.inf)
        return denoise(jnp.where(target, y, clean), jnp.where(target, sigma**2, known))[0]

    return denoise_targets


def log_likelihood(
    denoise: DenoiseFn,
    x: Float[Array, "B N"],
    conditioned: Bool[Array, "B N"],
    target: Bool[Array, "B N"],
    key: PRNGKeyArray,
    levels: Float[Array, " n"],
    *,
    probes: int = 1,
) -> Float[Array, " B"]:
    """Return log p(targets | conditioned cells) in nats, by the probability-flow ODE.

    The sum of `cell_log_likelihood`, where the rest is said, with `probes` Rademacher vectors.
    """
    vectors = jax.random.rademacher(key, (probes, *x.shape), x.dtype)
    return cell_log_likelihood(denoise, x, conditioned, target, vectors, levels).sum(-1)


def cell_log_likelihood(
    denoise: DenoiseFn,
    x: Float[Array, "B N"],
    conditioned: Bool[Array, "B N"],
    target: Bool[Array, "B N"],
    probes: Float[Array, "P B N"],
    levels: Float[Array, " n"],
) -> Float[Array, "B N"]:
    """Return each target cell's share of log p(targets | conditioned cells), 0 for other cells.

    Song et al. 2021, eq. 39 (the instantaneous change of variables), with the trace of D's
    Jacobian estimated from `probes` (eq. 40; Hutchinson 1990): unbiased for random signs, and exact
    where that Jacobian is diagonal, or with the rows of a Hadamard matrix. In u = log sigma the
    flow dy/du = y - D has divergence n - tr dD/dy over n targets; one step of Runge-Kutta's fourth
    order between successive `levels`, upwards. At `levels[0]` y counts as noise alone; the density
    is that of x + levels[-1] n. Masks and `levels` are as in `sample`; a target must have been
    observed.

    The flow ends in noise that is independent from cell to cell, so the density there is a product
    over cells, and the divergence is a sum over them. For Gaussian data the noise is what symmetric
    whitening makes of x, which stays as close to the cells as whitening can (Kessy et al. 2018,
    arXiv:1512.00809, section 3: ZCA).
    """
    target = target & ~conditioned
    given = conditional(denoise, x, conditioned, target)
    probe = jnp.where(target, probes, 0.0)

    def slope(y: Array, u: Array) -> tuple[Array, Array]:
        def flow(y: Array) -> Array:
            return jnp.where(target, y - given(y, jnp.exp(u)), 0.0)

        velocity, pushed = jax.vmap(
            lambda direction: jax.jvp(flow, (y,), (direction,)), out_axes=(None, 0)
        )(probe)
        return velocity, (probe * pushed).mean(0)

    nodes, weights = jnp.array([0.0, 0.5, 0.5, 1.0]), jnp.array([1.0, 2.0, 2.0, 1.0]) / 6.0

    def advance(
        state: tuple[Array, Array], ends: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        (y, total), (u, h) = state, (ends[0], ends[1] - ends[0])

        # A loop over the four stages, so that the denoiser is compiled once.
        def stage(velocity: Array, node: Array) -> tuple[Array, tuple[Array, Array]]:
            slopes = slope(y + node * h * velocity, u + node * h)
            return slopes[0], slopes

        _, (velocities, divergences) = jax.lax.scan(stage, jnp.zeros_like(y), nodes)
        # Sums of products, not products of matrices, which a GPU may round to 10 bits.
        y = y + h * (weights[:, None, None] * velocities).sum(0)
        return (y, total + h * (weights[:, None, None] * divergences).sum(0)), None

    u = jnp.log(levels)[::-1]
    start = (jnp.where(target, x, 0.0), jnp.zeros_like(x))
    (y, divergence), _ = jax.lax.scan(advance, start, (u[:-1], u[1:]))
    cell = -0.5 * (y / levels[0]) ** 2 - u[-1] - 0.5 * math.log(2.0 * math.pi)
    return jnp.where(target, cell + divergence, 0.0)

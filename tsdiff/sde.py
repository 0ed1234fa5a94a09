# ruff: noqa: F722
"""Noise processes: how a window is drowned in noise over diffusion time t.

    x_t = scale(t) x_0 + std(t) n,    n ~ N(0, I),    sigma(t) = std(t) / scale(t)

A process is a frozen value that knows its scale, its sigma and the inverse of sigma; all else
follows, because x_t / scale(t) = x_0 + sigma(t) n is the same for every process (Karras et al.
2022, appendix B). In these coordinates one denoiser serves them all.

| process  | scale(t)            | sigma(t)^2               | from                                 |
| -------- | ------------------- | ------------------------ | ------------------------------------ |
| LinearVP | exp(-B/2)           | exp(B) - 1               | Ho 2020; Song 2021, eq. 11, 32-33    |
| CosineVP | cos(u) / cos(u_0)   | (cos(u_0) / cos(u))^2 - 1| Nichol & Dhariwal 2021, eq. 17       |
| SubVP    | alpha of a VP       | (1 / alpha - alpha)^2    | Song 2021, eq. 12, 29                |
| VE       | 1                   | geometric in t           | Song 2021, eq. 9, 30-31              |
| EDM      | 1                   | t^2                      | Karras 2022, table 1                 |

B(t) is the integral of beta from 0 to t. Song et al. 2021 is arXiv:2011.13456, Karras et al. 2022
arXiv:2206.00364, Nichol & Dhariwal 2021 arXiv:2102.09672, Ho et al. 2020 arXiv:2006.11239.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from tsdiff.errors import ConfigError
from tsdiff.types import DenoiseFn, ScoreFn

# Cells in any arrangement, and what goes with each or with all of them.
Cells = Float[Array, "*x"]
Factor = Float[Array, "*#x"]


class Process(Protocol):
    """A noise process. Its functions are elementwise in t, which has any shape.

    Sampling runs from `t_max` down to `t_min`, where sigma is still > 0. x and sigma are in
    normalised units, t in the process's own.
    """

    @property
    def t_min(self) -> float:
        """Where sampling ends."""
        ...

    @property
    def t_max(self) -> float:
        """Where sampling begins: only noise is left."""
        ...

    def scale(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Return what is left of the signal: alpha(t), or s(t) in EDM's notation."""
        ...

    def sigma(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Return the noise level std / scale, increasing in t."""
        ...

    def time(self, sigma: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Return the t at which the noise level is `sigma`."""
        ...

    def __hash__(self) -> int: ...


def _check(valid: bool, expected: str, process: Process) -> None:
    if not valid:
        raise ConfigError(f"expected {expected}, got {process}")


def _check_range(process: Process) -> None:
    _check(0 < process.t_min < process.t_max, "0 < t_min < t_max", process)


@dataclass(frozen=True)
class LinearVP:
    """Variance preserving with DDPM's linear beta(t) (Song et al. 2021, eq. 11, 32-33).

    The betas are DDPM's 1e-4 to 0.02 in a thousand steps of unit time. t in [0, 1]; `t_min` as in
    Song et al., appendix C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_range(self)
        _check(0 < self.beta_min <= self.beta_max, "0 < beta_min <= beta_max", self)

    def scale(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """alpha(t) = exp(-B/2), eq. 33."""
        return jnp.exp(-0.5 * self._integral(t))

    def sigma(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """sqrt(1 - alpha^2) / alpha."""
        return jnp.sqrt(jnp.expm1(self._integral(t)))

    def time(self, sigma: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Inverse of `sigma`."""
        integral, slope = jnp.log1p(sigma**2), self.beta_max - self.beta_min
        # The root of a quadratic, in the form that keeps small t exact.
        root = jnp.sqrt(self.beta_min**2 + 2.0 * slope * integral)
        return 2.0 * integral / (self.beta_min + root)

    def _integral(self, t: Array) -> Array:
        """B(t)."""
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2


@dataclass(frozen=True)
class CosineVP:
    """Variance preserving with a cosine for alpha (Nichol & Dhariwal 2021, eq. 17).

    alpha = cos(u) / cos(u_0) with u = (t + offset) / (1 + offset) pi / 2. At t = 1 sigma is
    infinite; `t_max` is where Lu et al. 2022 (arXiv:2206.00927) stop, sigma = 119.
    """

    offset: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946

    def __post_init__(self) -> None:
        _check_range(self)
        _check(self.offset >= 0 and self.t_max < 1, "offset >= 0 and t_max < 1", self)

    def scale(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """alpha(t)."""
        return jnp.cos(self._rate * t + self._origin) / math.cos(self._origin)

    def sigma(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """sqrt(1 - alpha^2) / alpha."""
        # cos(u_0)^2 - cos(u)^2 as a product: the difference is lost in float32 near t = 0.
        product = jnp.sin(self._rate * t) * jnp.sin(self._rate * t + 2.0 * self._origin)
        return jnp.sqrt(product) / jnp.cos(self._rate * t + self._origin)

    def time(self, sigma: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Inverse of `sigma`."""
        tangent = jnp.sqrt(sigma**2 + math.sin(self._origin) ** 2) / math.cos(self._origin)
        return (jnp.arctan(tangent) - self._origin) / self._rate

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1.0 + self.offset)

    @property
    def _origin(self) -> float:
        return self._rate * self.offset


@dataclass(frozen=True)
class SubVP:
    """A variance-preserving process with less noise (Song et al. 2021, eq. 12 and 29).

    std is 1 - alpha^2 instead of its root. Song et al.'s sub-VP SDE is that of `LinearVP`.
    """

    base: Process = LinearVP()

    @property
    def t_min(self) -> float:
        """As of `base`."""
        return self.base.t_min

    @property
    def t_max(self) -> float:
        """As of `base`."""
        return self.base.t_max

    def scale(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """alpha(t) of `base`."""
        return self.base.scale(t)

    def sigma(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """(1 - alpha^2) / alpha, from the base's sigma^2 = (1 - alpha^2) / alpha^2."""
        return self.base.sigma(t) ** 2 * self.base.scale(t)

    def time(self, sigma: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Inverse of `sigma`."""
        inverse_scale = 0.5 * sigma + jnp.sqrt(1.0 + 0.25 * sigma**2)  # 1/alpha - alpha = sigma
        return self.base.time(jnp.sqrt(sigma * inverse_scale))


@dataclass(frozen=True)
class VE:
    """Variance exploding, sigma geometric in t in [0, 1] (Song et al. 2021, eq. 30-31)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check(0 <= self.t_min < self.t_max, "0 <= t_min < t_max", self)
        _check(0 < self.sigma_min < self.sigma_max, "0 < sigma_min < sigma_max", self)

    def scale(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """One."""
        return jnp.ones_like(t)

    def sigma(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """sigma_min (sigma_max / sigma_min)^t."""
        return self.sigma_min * jnp.exp(math.log(self.sigma_max / self.sigma_min) * t)

    def time(self, sigma: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Inverse of `sigma`."""
        return jnp.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM:
    """sigma(t) = t, scale 1 (Karras et al. 2022, table 1): diffusion time is the noise level."""

    t_min: float = 0.002
    t_max: float = 80.0

    def __post_init__(self) -> None:
        _check_range(self)

    def scale(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """One."""
        return jnp.ones_like(t)

    def sigma(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Return t itself."""
        return t

    def time(self, sigma: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Inverse of `sigma`: itself."""
        return sigma


# ---- What follows from scale and sigma ----


def std(process: Process, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
    """Standard deviation of x_t given x_0 (Song et al. 2021, eq. 29)."""
    return process.scale(t) * process.sigma(t)


def log_snr(process: Process, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
    """log(scale^2 / std^2) = -2 log sigma (Kingma et al. 2021, arXiv:2107.00630, section 3.1)."""
    return -2.0 * jnp.log(process.sigma(t))


def time_of_log_snr(process: Process, log_ratio: Float[Array, "*t"]) -> Float[Array, "*t"]:
    """Inverse of `log_snr`; `log_ratio` is in nats."""
    return process.time(jnp.exp(-0.5 * log_ratio))


def prior_std(process: Process) -> Float[Array, ""]:
    """Standard deviation of the noise at `t_max`, where sampling starts."""
    return std(process, jnp.asarray(process.t_max, jnp.float32))


def prior_sample(
    process: Process, key: PRNGKeyArray, shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """Draw x_t at `t_max`, of any shape: noise alone."""
    return prior_std(process) * jax.random.normal(key, shape)


def _slope(function: Callable[[Array], Array], t: Array) -> Array:
    """Derivative of an elementwise function."""
    slope: Array = jax.jvp(function, (t,), (jnp.ones_like(t),))[1]
    return slope


def drift(process: Process, x: Cells, t: Factor) -> Cells:
    """Drift f(t) x of the forward SDE, f = d log scale / dt (Karras et al. 2022, appendix B)."""
    return _slope(lambda t: jnp.log(process.scale(t)), t) * x


def diffusion(process: Process, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
    """g(t) of the forward SDE: scale sqrt(d sigma^2 / dt) (Karras et al. 2022, appendix B)."""
    return process.scale(t) * jnp.sqrt(_slope(lambda t: process.sigma(t) ** 2, t))


def reverse_drift(process: Process, x: Cells, t: Factor, grad_log_p: Cells) -> Cells:
    """Drift of the reverse-time SDE, f x - g^2 grad log p_t(x) (Song et al. 2021, eq. 6)."""
    return drift(process, x, t) - diffusion(process, t) ** 2 * grad_log_p


def flow_drift(process: Process, x: Cells, t: Factor, grad_log_p: Cells) -> Cells:
    """Drift of the probability-flow ODE, f x - g^2 / 2 grad log p_t(x) (Song et al., eq. 13)."""
    return drift(process, x, t) - 0.5 * diffusion(process, t) ** 2 * grad_log_p


# ---- Noise levels for sampling: n of them, falling, from sigma(t_max) to sigma(t_min) ----


def karras_levels(process: Process, steps: int, rho: float = 7.0) -> Float[Array, " n"]:
    """Uniform in sigma^(1/rho); rho = 7 is what Karras et al. use (2022, eq. 5)."""
    first, last = _ends(process) ** (1.0 / rho)
    return jnp.linspace(first, last, steps) ** rho


def time_levels(process: Process, steps: int) -> Float[Array, " n"]:
    """Uniform in t (Song et al. 2021, section 4)."""
    return process.sigma(jnp.linspace(process.t_max, process.t_min, steps))


def log_snr_levels(process: Process, steps: int) -> Float[Array, " n"]:
    """Uniform in log-SNR: geometric in sigma (Lu et al. 2022, arXiv:2206.00927)."""
    first, last = jnp.log(_ends(process))
    return jnp.exp(jnp.linspace(first, last, steps))


def _ends(process: Process) -> Array:
    return process.sigma(jnp.asarray([process.t_max, process.t_min], jnp.float32))


# ---- DDPM's discrete time ----


def linear_betas(steps: int, beta_min: float = 0.1, beta_max: float = 20.0) -> Float[Array, " n"]:
    """DDPM's betas, rising: 1e-4 to 0.02 at a thousand steps (Ho et al. 2020, section 4).

    With other numbers of steps their sum is kept, so that the noise at the end stays the same.
    """
    if steps <= beta_max:
        raise ConfigError(
            f"expected more steps than beta_max = {beta_max}, as a beta must stay below 1, "
            f"got {steps}; discrete_betas(LinearVP(), {steps}) has no such limit"
        )
    return jnp.linspace(beta_min / steps, beta_max / steps, steps)


def discrete_betas(process: Process, steps: int, largest: float = 0.999) -> Float[Array, " n"]:
    """The betas of a variance-preserving process at t = 1/n .. 1, rising.

    1 - alpha(t)^2 / alpha(t - 1/n)^2, not above `largest` (Nichol & Dhariwal 2021, eq. 17 and
    the text below it).
    """
    # alpha^2 = 1 / (1 + sigma^2): in float32 sigma still tells small t apart, alpha does not.
    decay = jnp.log1p(process.sigma(jnp.linspace(0.0, 1.0, steps + 1)) ** 2)
    return jnp.minimum(-jnp.expm1(decay[:-1] - decay[1:]), largest)


def beta_levels(betas: Float[Array, " n"]) -> Float[Array, " n"]:
    """Noise levels of a discrete DDPM, falling: sigma_i^2 = 1 / prod(1 - beta) - 1 (Ho, eq. 4)."""
    return jnp.sqrt(jnp.expm1(-jnp.cumsum(jnp.log1p(-betas))))[::-1]


# ---- What a network may predict: x_0, the noise epsilon, v, or the score, given x_t ----


def x0_from_epsilon(x: Cells, epsilon: Cells, scale: Factor, std: Factor) -> Cells:
    """x_0 = (x - std epsilon) / scale (Ho et al. 2020, eq. 15)."""
    return (x - std * epsilon) / scale


def epsilon_from_x0(x: Cells, x0: Cells, scale: Factor, std: Factor) -> Cells:
    """The noise in x if the signal is x_0."""
    return (x - scale * x0) / std


def x0_from_v(x: Cells, v: Cells, scale: Factor, std: Factor) -> Cells:
    """x_0 of v = scale epsilon - std x_0 (Salimans & Ho 2022, arXiv:2202.00512, section 4).

    There scale^2 + std^2 = 1; here it may be anything.
    """
    return (scale * x - std * v) / (scale**2 + std**2)


def v_from_x0(x: Cells, x0: Cells, scale: Factor, std: Factor) -> Cells:
    """Return v = scale epsilon - std x_0."""
    return scale * epsilon_from_x0(x, x0, scale, std) - std * x0


def x0_from_score(x: Cells, grad_log_p: Cells, scale: Factor, std: Factor) -> Cells:
    """Tweedie: x_0 = (x + std^2 grad log p_t(x)) / scale (Karras et al. 2022, eq. 3)."""
    return (x + std**2 * grad_log_p) / scale


def score_from_x0(x: Cells, x0: Cells, scale: Factor, std: Factor) -> Cells:
    """Grad log p_t(x) = (scale x_0 - x) / std^2, with x_0 = E[x_0 | x]."""
    return (scale * x0 - x) / std**2


def score_fn(denoise: DenoiseFn) -> ScoreFn:
    """The score of x_0 + sigma n with every cell noisy: (D - x) / sigma^2 (Karras, eq. 3)."""

    def gradient(x: Float[Array, "B N"], sigma: Float[Array, " B"]) -> Float[Array, "B N"]:
        level = jnp.broadcast_to(sigma[:, None], x.shape)
        return score_from_x0(x, denoise(x, level**2)[0], jnp.ones_like(level), level)

    return gradient

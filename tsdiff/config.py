"""Frozen settings of the model. They are stored in the bundle; nothing here is read at run time."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from tsdiff.errors import ConfigError

FastScorer = Literal["hybrid", "reconstruction", "density"]
SlowScorer = Literal["crps", "elbo", "score-norms", "flow"]
Scorer = Literal[FastScorer, SlowScorer]
"""Readings of the model: all bundles are calibrated for the fast ones (`tsdiff.scorers`; the first
is the default), for a slow one (`tsdiff.slow`) those that were trained with it."""
SLOW_SCORERS: Final = get_args(SlowScorer)
Adapt = Literal["auto", "none", "level", "full"]
"""What an entity goes on learning (`tsdiff.adapt`)."""
MOST_FULL = 1000
"""Entities in training up to which `auto` is `full`, else `level`: 470 KB each at 38 channels."""


@dataclass(frozen=True)
class ModelConfig:
    """What a window is, and the Gaussian anchor. Lengths are in slots, noise in normalised units.

    `window` is what is read at once; `hidden` how many last slots a masked reading hides; `sigma`
    the noise level of the unmasked reading; `smoothing` the slots of the streams' long scale, in
    which a slot weighs half of one that is `smoothing_half_life` slots younger, and counts as no
    more than `smoothing_ceiling` times the stream's 98th percentile. With a lag there is another
    one, of the slots to come, whose weights halve in `smoothing_half_life_ahead`.
    """

    window: int = 16  # what a 32-rank Gaussian can learn of 38 channels in a day
    rank: int = 32  # 64 and 128 find no more and cost two and four times as much
    noise_floor: float = 0.1  # variance; keeps float32 algebra well-conditioned (cond(M) < 1e5)
    scale_floor: float = 0.05  # of the typical standard deviation: near-constant channels
    clip: float = 10.0  # normalised units; beyond it values grow as their logarithm
    sigma: float = 0.5
    hidden: int = 4
    smoothing: int = 16
    smoothing_half_life: float = 3.0
    smoothing_half_life_ahead: float = 6.0
    smoothing_ceiling: float = 3.0  # so that one wild slot is not remembered as an event

    def __post_init__(self) -> None:
        if not 1 <= self.hidden < self.window:
            raise ConfigError(
                f"expected 1 <= hidden < window, got hidden={self.hidden}, window={self.window}"
            )
        if self.rank < 1 or self.smoothing < 1:
            raise ConfigError(
                f"expected rank, smoothing >= 1, got rank={self.rank}, smoothing={self.smoothing}"
            )
        positive = (
            "noise_floor",
            "sigma",
            "smoothing_half_life",
            "smoothing_half_life_ahead",
            "smoothing_ceiling",
        )
        if min(getattr(self, name) for name in positive) <= 0:
            got = ", ".join(f"{name}={getattr(self, name)}" for name in positive)
            raise ConfigError(f"expected {', '.join(positive)} > 0, got {got}")


@dataclass(frozen=True)
class NetworkConfig:
    """The network on the anchor: a residual perceptron of `blocks` steps over `width` features."""

    width: int = 96
    blocks: int = 2
    expand: int = 1  # as good as 2 on three fleets, for half of the work
    entity_width: int = 16

    def __post_init__(self) -> None:
        if min(self.width, self.blocks, self.expand, self.entity_width) < 1:
            raise ConfigError(f"expected positive sizes for the network, got {self}")


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise levels of training: log-normal (Karras et al. 2022, table 1) plus a mass at infinity.

    At infinity a target cell says nothing: one step of denoising is then the conditional mean.
    """

    log_sigma_mean: float = -0.7
    log_sigma_std: float = 1.0
    infinite_share: float = 0.7

    def __post_init__(self) -> None:
        if self.log_sigma_std <= 0 or not 0 <= self.infinite_share <= 1:
            raise ConfigError(
                "expected log_sigma_std > 0 and 0 <= infinite_share <= 1, got "
                f"{self.log_sigma_std} and {self.infinite_share}"
            )

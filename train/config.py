"""Settings of training, beside the model's own."""

from dataclasses import dataclass, field

from tsdiff.config import SLOW_SCORERS, DiffusionConfig, ModelConfig, NetworkConfig
from tsdiff.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """How a bundle is made from history.

    `held_out` is the share at the end of every entity's history that nothing is fitted to: it
    calibrates, stops the network early and gives the metrics. `network` None trains the anchor
    alone; `network_weight` None lets held-out likelihood choose the network's weight.
    """

    name: str = "tsdiff"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    network: NetworkConfig | None = field(default_factory=NetworkConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    held_out: float = 0.15
    min_held_out: int = 512  # slots: ten exceedances of the 98th percentile
    network_weight: float | None = None
    steps: int = 4000
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    ema: float = 0.99
    evaluate_every: int = 250
    patience: int = 4  # evaluations without improvement
    max_minutes: float | None = None
    most_anchors: int = 64
    """Up to so many entities may have anchors of their own, where held-out data want it."""
    units: tuple[str, ...] = ()
    slow_scorers: tuple[str, ...] = ()
    """Calibrated for besides the fast ones."""

    def __post_init__(self) -> None:
        for scorer in self.slow_scorers:
            if scorer not in SLOW_SCORERS:
                raise ConfigError(
                    f"expected slow scorers of {', '.join(SLOW_SCORERS)}, got {scorer!r}; "
                    "bundles are calibrated for the others anyway"
                )
        if not 0.05 <= self.held_out <= 0.5:
            raise ConfigError(f"expected 0.05 <= held_out <= 0.5, got {self.held_out}")
        if self.steps < 1 or self.batch < 1 or self.evaluate_every < 1:
            raise ConfigError(
                f"expected steps, batch, evaluate_every >= 1, got {self.steps}, {self.batch}, "
                f"{self.evaluate_every}"
            )

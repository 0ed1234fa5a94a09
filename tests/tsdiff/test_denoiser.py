"""The network as a correction of the anchor, and EDM as its special case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsdiff.anchor import Anchor, posterior
from tsdiff.config import DiffusionConfig, ModelConfig, NetworkConfig
from tsdiff.denoiser import Network
from tsdiff.errors import ConfigError
from tsdiff.loss import loss, negative_log_likelihood, pose, pose_forecast
from tsdiff.precondition import MAX_LOG_VARIANCE, bounded, denoised

MODEL = ModelConfig(window=16, anchor_window=8, hidden=4)
CHANNELS = 3
NETWORK = Network(CHANNELS, 2, MODEL, NetworkConfig(width=16, blocks=1, patch=4))
ANCHOR = Anchor(jnp.zeros((1, 24)), 0.3 * jnp.ones((1, 24, 2)), 0.5 * jnp.ones((1, 24)))


@pytest.mark.parametrize("sigma", [0.01, 0.5, 1.0, 20.0])
def test_without_loadings_it_is_edm(sigma: float) -> None:
    """c_skip and c_out of Karras et al. 2022, table 1, for sigma_data = 0.5."""
    sigma_data, cells = 0.5, 6
    white = Anchor(jnp.zeros(cells), jnp.zeros((cells, 1)), jnp.full(cells, sigma_data**2))
    x = jnp.linspace(-2, 2, cells)[None]
    residual = jnp.linspace(1, -1, cells)[None]
    m, s = posterior(white, x, jnp.full((1, cells), sigma**2))
    found, _ = denoised(m, s, residual, jnp.zeros(()))
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
    np.testing.assert_allclose(found, c_skip * x + c_out * residual, rtol=1e-4, atol=1e-6)


def test_gate_zero_is_the_anchor() -> None:
    mean, sd = denoised(jnp.asarray(2.0), jnp.asarray(3.0), jnp.asarray(9.0), jnp.asarray(1.0), 0.0)
    assert (float(mean), float(sd)) == (2.0, 3.0)


def test_the_network_may_widen_the_anchors_band_but_not_narrow_it() -> None:
    log_variance = jnp.asarray([-2.0, 2.0])
    _, sd = denoised(jnp.zeros(2), jnp.full(2, 3.0), jnp.zeros(2), log_variance)
    np.testing.assert_allclose(sd, [3.0, 3.0 * np.e], rtol=1e-6)


def test_log_variance_is_bounded() -> None:
    assert float(jnp.abs(bounded(jnp.asarray([-1e9, 1e9]))).max()) <= MAX_LOG_VARIANCE
    assert float(bounded(jnp.asarray(0.01))) == pytest.approx(0.01, rel=1e-3)


def windows(batch: int = 5) -> jax.Array:
    window = jax.random.normal(jax.random.key(0), (batch, MODEL.window, CHANNELS))
    return window.at[0, 3, 1].set(jnp.nan).at[1, -1, 0].set(jnp.nan)


def test_training_starts_at_the_anchor() -> None:
    params = NETWORK.initialize(0)
    problem = pose_forecast(ANCHOR, windows(), jnp.zeros(5, int), MODEL)
    residual, log_variance = NETWORK(
        params, problem.x, problem.m, problem.conditioned, None, problem.sigma, problem.rows, last=4
    )
    assert residual.shape == log_variance.shape == (5, 4, CHANNELS)
    assert float(jnp.abs(residual).max()) == float(jnp.abs(log_variance).max()) == 0.0
    y = (problem.x[:, -8:] - problem.m) / problem.s
    target = np.asarray(problem.target)
    assert float(negative_log_likelihood(problem, residual, log_variance)) == pytest.approx(
        0.5 * float((np.asarray(y)[target] ** 2).mean()), rel=1e-4
    )


def test_missing_cells_are_neither_conditioned_nor_targets() -> None:
    problem = pose(
        jax.random.key(1), ANCHOR, windows(64), jnp.zeros(64, int), MODEL, DiffusionConfig()
    )
    observed = jnp.isfinite(windows(64))
    assert not (problem.conditioned & ~observed).any()
    assert not (problem.target & ~observed[:, -8:]).any()
    assert not (problem.target & problem.conditioned[:, -8:]).any()
    assert ((problem.target | problem.conditioned[:, -8:]) == observed[:, -8:]).all()
    assert jnp.isfinite(problem.noisy).all()


def test_what_is_hidden_does_not_reach_the_network() -> None:
    """Sigma to infinity: another value of a target changes the loss, not the prediction."""
    initial = NETWORK.initialize(0)
    keys = jax.random.split(jax.random.key(1), len(initial))
    # A head of zeros, or the same number everywhere, would not let anything through.
    params = {
        name: value + 0.1 * jax.random.normal(key, value.shape)
        for key, (name, value) in zip(keys, initial.items(), strict=True)
    }

    def predict(slots: slice, shift: float) -> jax.Array:
        window = windows().at[:, slots, 0].add(shift)
        problem = pose_forecast(ANCHOR, window, jnp.zeros(5, int), MODEL)
        return NETWORK(
            params, problem.x, problem.m, problem.conditioned, problem.noisy,
            problem.sigma, problem.rows, last=4,
        )[0]  # fmt: skip

    as_it_is = predict(slice(-4, None), 0.0)
    np.testing.assert_array_equal(predict(slice(-4, None), 100.0), as_it_is)
    assert float(jnp.abs(predict(slice(4, 8), 100.0) - as_it_is).max()) > 0.01


def test_a_step_of_gradient_lowers_the_loss() -> None:
    params = NETWORK.initialize(0)
    problem = pose_forecast(ANCHOR, windows(), jnp.asarray([0, 1, -1, 0, 1]), MODEL)
    value, gradient = jax.value_and_grad(loss, argnums=1)(NETWORK, params, problem)
    moved = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
    assert float(loss(NETWORK, moved, problem)) < float(value)


def test_lengths_must_fit_the_patch() -> None:
    with pytest.raises(ConfigError, match="multiple of the network's patch of 5 slots"):
        Network(CHANNELS, 1, MODEL, NetworkConfig(patch=5))

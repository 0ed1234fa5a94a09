"""The network as a correction of the anchor, and EDM as its special case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsdiff.anchor import Anchor, posterior, whiten
from tsdiff.config import DiffusionConfig, ModelConfig, NetworkConfig
from tsdiff.denoiser import Network, Params
from tsdiff.loss import (
    Imputation,
    denoising_loss,
    imputation_losses,
    pose,
    pose_imputation,
)
from tsdiff.precondition import MAX_LOG_VARIANCE, bounded, denoised

MODEL = ModelConfig(window=8, hidden=4)
CHANNELS = 3
NETWORK = Network(CHANNELS, 2, MODEL, NetworkConfig(width=16, blocks=1))
_rng = np.random.default_rng(0)
_LOADINGS = 0.5 * _rng.normal(size=(24, 2))
ANCHOR = Anchor(
    jnp.zeros((1, 24)), jnp.asarray(_LOADINGS[None], jnp.float32), jnp.full((1, 24), 0.5)
)
CLEAN = jax.tree.map(
    lambda part: part[None], whiten(np.zeros(24), _LOADINGS, np.full(24, 0.5), 0.0)
)


def one_anchor() -> Anchor:
    return Anchor(*(part[0] for part in ANCHOR))


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


def loud_params() -> dict[str, jax.Array]:
    """Away from the start: a head of zeros would not let anything through."""
    initial = NETWORK.initialize(0)
    keys = jax.random.split(jax.random.key(1), len(initial))
    return {
        name: value + 0.1 * jax.random.normal(key, value.shape)
        for key, (name, value) in zip(keys, initial.items(), strict=True)
    }


def served(window: jax.Array) -> Imputation:
    return pose_imputation(CLEAN, window, jnp.asarray([0, 1, -1, 0, 1]), MODEL.hidden)


def test_training_starts_at_the_anchor() -> None:
    params, problem = NETWORK.initialize(0), served(windows())
    residual, log_variance = NETWORK.each(
        params, problem.x, problem.m, problem.observed, problem.rows
    )
    assert residual.shape == log_variance.shape == (5, CHANNELS)
    assert float(jnp.abs(residual).max()) == float(jnp.abs(log_variance).max()) == 0.0
    losses = imputation_losses(NETWORK, params, problem, (0.0, 1.0))
    y = (problem.x[:, -1] - problem.m[..., -1]) / problem.s
    anchors = np.where(problem.observed[:, -1], 0.5 * np.asarray(y) ** 2, np.nan)
    np.testing.assert_allclose(losses, np.stack([anchors, anchors]), rtol=1e-5)


@pytest.mark.parametrize("channel", range(CHANNELS))
def test_each_is_the_network_with_that_channel_hidden(channel: int) -> None:
    """Against one call with an explicit mask, the stand-ins being the anchor's posterior."""
    params, window = loud_params(), windows()
    problem = served(window)
    fast, fast_log_variance = NETWORK.each(
        params, problem.x - problem.mean, problem.m, problem.observed, problem.rows
    )
    hidden = jnp.zeros(window.shape, bool).at[:, -MODEL.hidden :, channel].set(True)
    observed = jnp.isfinite(window)
    variance = jnp.where(observed & ~hidden, 0.0, jnp.inf).reshape(5, -1)
    m, s = posterior(one_anchor(), jnp.nan_to_num(window).reshape(5, -1), variance)
    slow, slow_log_variance = NETWORK(
        params,
        problem.x - problem.mean,
        m.reshape(window.shape),
        observed & ~hidden,
        hidden,
        jnp.zeros(window.shape),
        jnp.full(5, jnp.inf),
        problem.rows,
    )
    np.testing.assert_allclose(fast[:, channel], slow[:, -1, channel], atol=1e-4)
    np.testing.assert_allclose(
        fast_log_variance[:, channel], slow_log_variance[:, -1, channel], atol=1e-4
    )
    newest = s.reshape(window.shape)[:, -1, channel]
    np.testing.assert_allclose(problem.s[:, channel], newest, rtol=1e-4)


def test_missing_cells_are_neither_conditioned_nor_targets() -> None:
    problem = pose(
        jax.random.key(1), ANCHOR, windows(64), jnp.zeros(64, int), MODEL, DiffusionConfig()
    )
    observed = jnp.isfinite(windows(64))
    assert not (problem.conditioned & ~observed).any()
    assert not (problem.target & ~observed).any()
    assert not (problem.target & problem.conditioned).any()
    assert ((problem.target | problem.conditioned) == observed).all()
    assert jnp.isfinite(problem.noisy).all()


@pytest.mark.parametrize("channel", range(CHANNELS))
def test_a_channels_newest_cells_do_not_reach_its_own_imputation(channel: int) -> None:
    """Another value there changes the loss, and what is said of the others."""
    params = loud_params()

    def told(slots: slice) -> np.ndarray:
        problem = served(windows().at[:, slots, channel].add(2.0))
        residual, _ = NETWORK.each(params, problem.x, problem.m, problem.observed, problem.rows)
        return np.asarray(problem.m[..., -1] + problem.s * residual)

    as_it_is, newest, before = told(slice(0, 0)), told(slice(-4, None)), told(slice(0, 4))
    moved = np.abs(newest - as_it_is).max(0)
    assert moved[channel] < 1e-4
    assert np.delete(moved, channel).min() > 0.01
    assert np.abs(before - as_it_is)[:, channel].max() > 0.01


def test_a_step_of_gradient_lowers_both_losses() -> None:
    params = NETWORK.initialize(0)
    rows = jnp.asarray([0, 1, -1, 0, 1])
    posed = pose(jax.random.key(2), ANCHOR, windows(), rows, MODEL, DiffusionConfig())

    def imputing(params: Params) -> jax.Array:
        return jnp.nanmean(imputation_losses(NETWORK, params, served(windows())))

    def denoising(params: Params) -> jax.Array:
        return denoising_loss(NETWORK, params, posed)

    for loss in (imputing, denoising):
        value, gradient = jax.value_and_grad(loss)(params)
        moved = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
        assert float(loss(moved)) < float(value)

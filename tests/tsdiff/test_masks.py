"""The mask bank drawn as pictures, how often training draws each, and missing cells.

In pictures rows are channels and time runs to the right; # is hidden.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from tests.tsdiff.gaussian import key
from tsdiff import masks
from tsdiff.anchor import Anchor
from tsdiff.config import DiffusionConfig, ModelConfig, NetworkConfig
from tsdiff.denoiser import Network
from tsdiff.loss import _SHARES, Problem, denoising_loss, draw_masks, pose

Strategy = Callable[[Array, int, int], Array]

MODEL = ModelConfig(window=6, hidden=2)
CHANNELS, BATCH = 12, 2000  # so many channels that a group is never empty, nor all of them

# A mask's kind by the channels that occur in it. Whatever is not drawn here is random.
KINDS = {
    frozenset(["......"]): "none",
    frozenset(["....##"]): "last",
    frozenset(["......", "....##"]): "last_some",
    frozenset(["##..##"]): "grating",
    frozenset(["..##.."]): "grating",
    frozenset(["......", "######"]): "group",
}


def picture(mask: Array | np.ndarray) -> list[str]:
    return ["".join(".#"[int(hidden)] for hidden in channel) for channel in np.asarray(mask).T]


def many(strategy: Strategy, length: int, channels: int, count: int = 2000) -> np.ndarray:
    """Masks of as many keys."""
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: strategy(key, length, channels)))(keys))


def assert_share(hits: np.ndarray, share: float) -> None:
    """Of many fair draws (the first axis), to within five standard errors everywhere."""
    error = np.sqrt(share * (1 - share) / len(hits))
    np.testing.assert_allclose(hits.mean(0), share, rtol=0, atol=5 * error)


def assert_independent(draws: np.ndarray) -> None:
    """The columns of (draws, columns) have nothing to do with one another."""
    correlation = np.corrcoef(draws, rowvar=False) - np.eye(draws.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(len(draws))


def test_none() -> None:
    drawn = """
        ......
        ......
        ......
    """
    assert picture(masks.none(6, 3)) == drawn.split()


def test_last() -> None:
    drawn = """
        ....##
        ....##
        ....##
    """
    assert picture(masks.last(6, 3, 2)) == drawn.split()


@pytest.mark.parametrize(("hidden", "drawn"), [(0, "...."), (1, "...#"), (4, "####")])
def test_last_from_nothing_to_everything(hidden: int, drawn: str) -> None:
    assert picture(masks.last(4, 1, hidden)) == [drawn]


def test_grating_a() -> None:
    drawn = """
        ##..##
        ##..##
        ##..##
    """
    assert picture(masks.grating(6, 3, 2, 0)) == drawn.split()


def test_grating_b() -> None:
    drawn = """
        ..##..
        ..##..
        ..##..
    """
    assert picture(masks.grating(6, 3, 2, 1)) == drawn.split()


@pytest.mark.parametrize(
    ("length", "stripe", "a", "b"),
    [
        (7, 1, "#.#.#.#", ".#.#.#."),
        (7, 3, "#...###", ".###..."),  # the oldest stripe is the one that is cut
        (4, 9, "####", "...."),
    ],
)
def test_gratings_that_do_not_fit(length: int, stripe: int, a: str, b: str) -> None:
    found = [picture(masks.grating(length, 1, stripe, phase))[0] for phase in (0, 1)]
    assert found == [a, b]


@pytest.mark.parametrize("length", range(1, 9))
def test_gratings_complement_one_another(length: int) -> None:
    """One is the other's complement, the newest stripe is hidden in A, and neighbours differ."""
    for channels, stripe in product(range(1, 4), range(1, 10)):
        a, b = (np.asarray(masks.grating(length, channels, stripe, phase)) for phase in (0, 1))
        assert a.shape == b.shape == (length, channels)
        np.testing.assert_array_equal(a, ~b)
        assert a[-stripe:].all()
        np.testing.assert_array_equal(a[:-stripe], ~a[stripe:])


def test_group() -> None:
    """What this key draws; another generator would draw other channels."""
    drawn = """
        ......
        ......
        ######
        ######
        ......
    """
    assert picture(masks.group(jax.random.key(0), 6, 5)) == drawn.split()


def test_group_hides_half_of_the_channels_all_the_time() -> None:
    drawn = many(masks.group, 6, 10)
    assert {row for mask in drawn[:100] for row in picture(mask)} == {"......", "######"}
    assert (drawn == drawn[:, :1]).all()
    assert_share(drawn[:, 0], 0.5)
    assert_independent(drawn[:, 0])


def test_random_cells() -> None:
    """What this key draws; another generator would draw other cells."""
    drawn = """
        .#..#.
        ..#...
        ......
        ......
        .#.#..
    """
    assert picture(masks.random_cells(jax.random.key(0), 6, 5)) == drawn.split()


def test_random_cells_are_a_fifth() -> None:
    drawn = many(masks.random_cells, 6, 5)
    assert_share(drawn, 0.2)
    assert_independent(drawn.reshape(2000, -1))


@pytest.mark.parametrize("strategy", [masks.group, masks.random_cells])
def test_a_mask_is_a_function_of_its_key(strategy: Strategy) -> None:
    first, second = jax.random.key(0), jax.random.key(1)
    mask = strategy(first, 8, 16)
    assert picture(strategy(first, 8, 16)) == picture(mask)
    assert picture(jax.jit(strategy, static_argnums=(1, 2))(first, 8, 16)) == picture(mask)
    assert picture(strategy(second, 8, 16)) != picture(mask)


def test_every_strategy_has_its_name() -> None:
    """`grating_a` and `grating_b` are the phases of one function, `random` is `random_cells`."""
    functions = {
        name.partition("_")[0]
        for name, _ in inspect.getmembers(masks, inspect.isfunction)
        if inspect.getmodule(getattr(masks, name)) is masks and not name.startswith("_")
    }
    assert {name.partition("_")[0] for name in masks.NAMES} == functions
    assert len(set(masks.NAMES)) == len(masks.NAMES)


_draw = jax.jit(draw_masks, static_argnums=(1, 2, 3))


def kind(mask: np.ndarray) -> str:
    return KINDS.get(frozenset(picture(mask)), "random")


def draw(seed: int) -> np.ndarray:
    return np.asarray(_draw(jax.random.key(seed), BATCH, CHANNELS, MODEL))


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """The masks of many windows, (B, A, D)."""
    return draw(0)


@pytest.fixture(scope="module")
def kinds(drawn: np.ndarray) -> np.ndarray:
    return np.array([kind(mask) for mask in drawn])


def test_kinds_are_drawn_by_their_shares(kinds: np.ndarray) -> None:
    assert sum(_SHARES.values()) == pytest.approx(1.0)
    assert Counter(kinds).keys() == _SHARES.keys()
    for name, share in _SHARES.items():
        assert_share(kinds == name, share)
    assert_independent(np.stack([kinds[:-1] == "last", kinds[1:] == "last"], 1))


def test_each_kind_is_drawn_as_the_bank_has_it(drawn: np.ndarray, kinds: np.ndarray) -> None:
    """Both phases alike; half of the channels; a fifth of the cells; no window like another."""
    newest, oldest = drawn[:, -1], drawn[:, 0]
    assert_share(newest[kinds == "grating", 0], 0.5)
    assert_share(newest[kinds == "last_some"], 0.5)
    assert_share(oldest[kinds == "group"], 0.5)
    assert_share(drawn[kinds == "random"], 0.2)
    assert len({mask.tobytes() for mask in drawn[kinds == "random"]}) == (kinds == "random").sum()


def test_masks_are_a_function_of_their_key(drawn: np.ndarray) -> None:
    np.testing.assert_array_equal(drawn, draw(0))
    assert (drawn != draw(1)).any()


CELLS = MODEL.window * CHANNELS
_rng = np.random.default_rng(0)
ANCHOR = Anchor(
    jnp.asarray(_rng.normal(size=(1, CELLS)), jnp.float32),
    jnp.asarray(_rng.normal(size=(1, CELLS, 2)), jnp.float32),
    jnp.full((1, CELLS), 0.3),
)
NETWORK = Network(CHANNELS, 1, MODEL, NetworkConfig(width=8, blocks=1))
# Away from where training starts: there, nothing but the anchor has a say.
PARAMS = {
    name: 0.3 * jnp.asarray(_rng.normal(size=leaf.shape), jnp.float32)
    for name, leaf in jax.eval_shape(lambda: NETWORK.initialize(0)).items()
}
X = _rng.normal(size=(BATCH, MODEL.window, CHANNELS)).astype(np.float32)
MISSING = _rng.random(X.shape) < 0.25
MISSING[0], MISSING[1:9, :, 0] = True, True  # a silent entity; a channel that nobody reports
PRESENT = ~MISSING


@jax.jit
def posed(window: Array) -> Problem:
    rows = jnp.zeros(len(window), int)
    return pose(key(), ANCHOR, window, rows, MODEL, DiffusionConfig())


_loss = jax.jit(denoising_loss, static_argnums=0)


def loss_of(problem: Problem) -> float:
    return float(_loss(NETWORK, PARAMS, problem))


def window(missing: float = np.nan) -> Array:
    return jnp.asarray(np.where(MISSING, missing, X))


def test_targets_are_observed_and_hidden() -> None:
    """A window without gaps shows what the key hides; gaps take cells away and move none."""
    whole, gaps = posed(jnp.asarray(X)), posed(window())
    hidden = np.asarray(whole.target)
    np.testing.assert_array_equal(gaps.target, hidden & PRESENT)
    np.testing.assert_array_equal(whole.conditioned, ~hidden)
    np.testing.assert_array_equal(gaps.conditioned, np.asarray(whole.conditioned) & PRESENT)


def test_conditioned_and_target_share_no_cell() -> None:
    problem = posed(window())
    conditioned, target = np.asarray(problem.conditioned), np.asarray(problem.target)
    assert not (conditioned & target).any()
    np.testing.assert_array_equal(conditioned | target, PRESENT)


def test_with_nothing_hidden_everything_is_a_noisy_target() -> None:
    problem = posed(jnp.asarray(X))
    everything: np.ndarray = np.all(problem.target, axis=(1, 2))
    assert_share(everything, _SHARES["none"])
    assert np.isfinite(problem.sigma)[everything].all()
    assert np.isinf(problem.sigma)[~everything].any()


@pytest.mark.parametrize("missing", [np.inf, -np.inf])
def test_what_marks_a_missing_cell_does_not_matter(missing: float) -> None:
    one, other = posed(window()), posed(window(missing))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert loss_of(one) == loss_of(other)


@pytest.mark.parametrize("value", [-1e6, 1.0, np.nan])
def test_missing_cells_cannot_change_the_loss(value: float) -> None:
    """Whatever is written into them once the problem is posed."""
    problem = posed(window())
    written = problem._replace(x=jnp.where(MISSING, value, problem.x))
    assert np.isfinite(loss_of(problem))
    assert loss_of(written) == loss_of(problem)
    assert not np.asarray(problem.noisy)[MISSING].any()


def test_observed_cells_do_change_the_loss() -> None:
    """So that the above says something: a conditioned cell by the network, a target by itself."""
    problem = posed(window())
    for cells in (problem.conditioned, problem.target):
        other = problem._replace(x=jnp.where(cells, problem.x + 1.0, problem.x))
        assert abs(loss_of(other) - loss_of(problem)) > 1e-3


def test_a_window_without_a_cell_says_nothing() -> None:
    """The anchor is left with its prior, and the loss with no cell."""
    problem = posed(jnp.asarray(np.full_like(X, np.nan)))
    mean, loadings, noise = (np.asarray(part[0], np.float64) for part in ANCHOR)
    flat = (BATCH, CELLS)
    sd = np.broadcast_to(np.sqrt((loadings**2).sum(1) + noise), flat)
    np.testing.assert_allclose(problem.m.reshape(flat), np.broadcast_to(mean, flat), atol=1e-5)
    np.testing.assert_allclose(problem.s.reshape(flat), sd, rtol=1e-4)
    assert loss_of(problem) == 0.0

# ruff: noqa: F722
"""The anchor: a low-rank Gaussian over windows, exact for every mask and every noise level.

    x = mean + W z + e,    z ~ N(0, I_K),    e ~ N(0, diag(noise)),    x_sigma = x + sigma * n

so p(x_sigma) = N(mean, W W' + diag(noise + sigma^2)), and the posterior of z given the cells that
say anything is Gaussian with precision M = I + W' diag(o / (noise + sigma^2)) W (factor analysis;
Bishop 2006, section 12.2.4). x is one window, flattened slot-major, in normalised units.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from tsdiff.linalg import invert
from tsdiff.types import BoolArray, DoubleArray

# Added to M's diagonal: float32 round-off of a product over some thousand cells.
_JITTER = 1e-6
# Windows of one anchor for which outer products of all loadings are not worth making.
_FEW = 32


class Anchor(NamedTuple):
    """Parameters: mean (N,), loadings (N, K), noise variance (N,); or A of them, stacked."""

    mean: Float[Array, "*A N"]
    loadings: Float[Array, "*A N K"]
    noise: Float[Array, "*A N"]


def anchor_index(rows: Int[Array, " B"], anchors: int) -> Int[Array, " B"]:
    """Which of `anchors` stacked anchors an entity's row (-1: never seen) has.

    There is one for each row and, last, the pooled one; or the pooled one alone.
    """
    return jnp.where((rows < 0) | (rows >= anchors), anchors - 1, rows)


def fit_anchor(
    mean: DoubleArray, covariance: DoubleArray, rank: int, noise_floor: float, rounds: int = 6
) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
    """Factor analysis of a window covariance (N, N): mean, loadings (N, K), noise (N,).

    Alternates the maximum-likelihood loadings for given noise (the leading eigenvectors of the
    covariance in units of the noise; Lawley & Maxwell 1962) with the noise they leave, not below
    `noise_floor`. A covariance estimated pairwise under missing cells may have negative
    eigenvalues: those are not among the leading ones.
    """
    variance = np.diag(covariance)
    noise = np.maximum(0.5 * variance, noise_floor)
    loadings = np.zeros((len(mean), rank))
    for _ in range(rounds if len(mean) <= 1500 else 2):
        root = np.sqrt(noise)
        eigenvalues, vectors = np.linalg.eigh(covariance / np.outer(root, root))
        leading = np.maximum(eigenvalues[::-1][:rank] - 1.0, 0.0)
        # The sign of an eigenvector is the solver's whim; fix it so that a hash can be compared.
        basis = vectors[:, ::-1][:, :rank]
        basis = basis * np.where(basis.sum(0) < 0, -1.0, 1.0)
        loadings = root[:, None] * basis * np.sqrt(leading)
        noise = np.maximum(variance - (loadings**2).sum(1), noise_floor)
    return mean, loadings, noise


def refit_anchor(
    covariance: DoubleArray,
    loadings: DoubleArray,
    noise: DoubleArray,
    noise_floor: float,
    rounds: int = 2,
    steps: int = 3,
) -> tuple[DoubleArray, DoubleArray]:
    """`fit_anchor` from a nearby start: loadings (N, K), noise (N,), some ten times faster.

    The leading eigenvectors by subspace iteration (Golub & Van Loan 2013, section 8.2.4) from the
    given loadings instead of a whole decomposition.
    """
    variance = np.diag(covariance)
    for _ in range(rounds):
        root = np.sqrt(noise)
        scaled = (covariance / np.outer(root, root)).astype(np.float32)
        basis = np.linalg.qr((loadings / root[:, None]).astype(np.float32))[0]
        for _ in range(steps):
            basis = np.linalg.qr(scaled @ basis)[0]
        eigenvalues, turn = np.linalg.eigh((basis.T @ (scaled @ basis)).astype(np.float64))
        leading = np.sqrt(np.maximum(eigenvalues - 1.0, 0.0))
        loadings = root[:, None] * (basis.astype(np.float64) @ turn) * leading
        noise = np.maximum(variance - (loadings**2).sum(1), noise_floor)
    return loadings, noise


def _outer(loadings: Float[Array, "N K"]) -> Float[Array, "N H"]:
    """The lower triangles, H = K(K+1)/2, of every row's outer product: sums of them are M."""
    row, column = np.tril_indices(loadings.shape[1])
    return loadings[:, row] * loadings[:, column]


def _unpack(packed: Float[Array, "B H"], rank: int) -> Float[Array, "B K K"]:
    """Lower triangles -> symmetric matrices."""
    index = np.zeros((rank, rank), np.int32)
    row, column = np.tril_indices(rank)
    index[row, column] = index[column, row] = np.arange(len(row))
    return packed[:, index]


def posterior(
    anchor: Anchor, x: Float[Array, "B N"], noise_variance: Float[Array, "B N"]
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """E[x | x_sigma] and its standard deviation per cell: the Gaussian denoiser, any mask.

    `noise_variance` is sigma^2 per cell: 0 for a conditioned cell (returned as it is, sd 0), inf
    for a cell that says nothing (missing, or a target at sigma to infinity; `x` is ignored).
    `anchor` is one for all windows, or B stacked ones, one for each.
    """
    mean, loadings, noise = anchor
    rank = loadings.shape[-1]
    known = jnp.isfinite(noise_variance)
    weight = jnp.where(known, 1.0 / (noise + jnp.where(known, noise_variance, 0.0)), 0.0)
    y = jnp.where(known, x - mean, 0.0)
    weighted = jnp.swapaxes(weight[..., None] * loadings, -1, -2)
    precision = weighted @ loadings + (1.0 + _JITTER) * jnp.eye(rank)
    inverse = _batch_inverse(precision)
    latent = inverse @ (weighted @ y[..., None])
    spread = jnp.maximum((loadings @ inverse * loadings).sum(-1), 0.0)
    kept = noise * weight  # of the cell's own residual: 1 for a clean cell, 0 for an unknown one
    from_latent = (loadings @ latent)[..., 0]
    m = mean + from_latent + kept * (y - from_latent)
    variance = noise * (1.0 - kept) + (1.0 - kept) ** 2 * spread
    return m, jnp.sqrt(jnp.maximum(variance, 0.0))


class Whitened(NamedTuple):
    """The anchor at one noise level, in the basis in which a complete window has M = I.

    With v = noise + sigma^2 and M_full = R R' its precision when nothing is missing:
    `loadings` = v^-1/2 W R^-T, and under missing cells M = I - sum over missing of l l'. Few
    missing cells are a small correction of I, so float32 is good enough, and a complete window
    gives the same numbers by every way of solving.

    `basis` = R^-T takes the latent variables back to those that are N(0, I).

    A further level of the same anchor shares the `loadings` of the first, the largest part by far:
    its own are `weight` times these times `turn` (None: as they are), see `turn`.
    """

    mean: Float[Array, " N"]
    scale: Float[Array, " N"]
    loadings: Float[Array, "N K"]
    basis: Float[Array, "K K"]
    weight: Float[Array, " N"] | None = None
    turn: Float[Array, "K K"] | None = None

    def anchor(self) -> Anchor:
        """What it was made of (`whiten`), where that was at no noise."""
        scaled = jax.scipy.linalg.solve_triangular(self.basis, self.loadings.T, trans=1)
        return Anchor(self.mean, self.scale[:, None] * scaled.T, self.scale**2)

    def project(self, residual: Float[Array, "B N"]) -> Float[Array, "B K"]:
        """Sum whitened residuals along this level's loadings."""
        weighted = residual if self.weight is None else residual * self.weight
        return self._turned(weighted @ self.loadings)

    def explained(self, latent: Float[Array, "B K"]) -> Float[Array, "B N"]:
        """Whitened residuals that these latent variables would leave."""
        fitted = self._turned_back(latent) @ self.loadings.T
        return fitted if self.weight is None else fitted * self.weight

    def prior(self, latent: Float[Array, "B K"]) -> Float[Array, " B"]:
        """Squared length of the latent variables where they are N(0, I)."""
        plain = self._turned_back(latent) @ self.basis.T
        return jnp.einsum("bk,bk->b", plain, plain)

    def last(self, cells: int) -> Float[Array, "C K"]:
        """Return this level's loadings of the last `cells`."""
        rows = self.loadings[-cells:]
        return self._turned(rows if self.weight is None else rows * self.weight[-cells:, None])

    def of(self, index: Int[Array, "B Q"]) -> Float[Array, "B Q K"]:
        """Return this level's loadings of the cells in `index`."""
        rows = self.loadings[index]
        return self._turned(rows if self.weight is None else rows * self.weight[index][..., None])

    def lost(self, observed: Bool[Array, "B N"]) -> Float[Array, "B K K"]:
        """Sum l l' over the cells that are not observed."""
        share = jnp.where(observed, 0.0, 1.0 if self.weight is None else self.weight**2)
        if len(observed) < _FEW:
            hidden = share[..., None] * self.loadings
            lost = jnp.swapaxes(hidden, -1, -2) @ self.loadings
        else:
            lost = _unpack(share @ _outer(self.loadings), self.loadings.shape[1])
        return lost if self.turn is None else self.turn.T @ lost @ self.turn

    def _turned(self, rows: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
        return rows if self.turn is None else rows @ self.turn

    def _turned_back(self, latent: Float[Array, "B K"]) -> Float[Array, "B K"]:
        return latent if self.turn is None else latent @ self.turn.T


def whiten(mean: DoubleArray, loadings: DoubleArray, noise: DoubleArray, sigma: float) -> Whitened:
    """Precompute (in float64) what serving needs of the anchor at noise level `sigma`."""
    v = noise.astype(np.float64) + sigma**2
    scaled = loadings.astype(np.float64) / np.sqrt(v)[:, None]
    basis = np.linalg.inv(_precision_root(loadings, v)).T
    parts = (mean, np.sqrt(v), scaled @ basis, basis)
    return Whitened(*(jnp.asarray(part, jnp.float32) for part in parts))


def turn(
    loadings: DoubleArray, noise: DoubleArray, visible: BoolArray, sigma: float = 0.0
) -> Float[Array, "K K"]:
    """R0' R^-T, which takes the basis of all cells at sigma = 0 to that of another reading.

    The other is at noise level `sigma` and sees the `visible` cells alone. What it knows less well
    it stretches; by no more than the noise is raised, or the hidden cells told.
    """
    other = _precision_root(loadings[visible], noise[visible] + sigma**2)
    return jnp.asarray(np.linalg.solve(other, _precision_root(loadings, noise)).T, jnp.float32)


def _precision_root(loadings: DoubleArray, variance: DoubleArray) -> DoubleArray:
    """R (K, K), lower triangular, with R R' = I + W' diag(1 / variance) W."""
    scaled = loadings.astype(np.float64) / np.sqrt(variance.astype(np.float64))[:, None]
    return np.asarray(np.linalg.cholesky(np.eye(loadings.shape[1]) + scaled.T @ scaled))


class Solved(NamedTuple):
    """One batch of windows against a whitened anchor.

    `residual` (B, N) is (x - mean) / scale with 0 for missing cells, `projection` (B, K) that onto
    the loadings, `latent` (B, K) the posterior mean of z, in the whitened basis. M^-1 = I + a b
    with `left` a (B, K, Q) and `right` b (B, Q, K); both None when M = I.
    """

    residual: Float[Array, "B N"]
    projection: Float[Array, "B K"]
    latent: Float[Array, "B K"]
    left: Float[Array, "B K Q"] | None
    right: Float[Array, "B Q K"] | None


def solve(
    whitened: Whitened,
    x: Float[Array, "B N"],
    observed: Bool[Array, "B N"],
    *,
    missing: int | None,
) -> Solved:
    """Posterior of the latent variables.

    `missing` (static) promises an upper bound of the missing cells per window: 0 costs nothing, a
    small number a system of that size, None (no promise) one of size K per window.
    """
    residual = jnp.where(observed, (x - whitened.mean) / whitened.scale, 0.0)
    projection = whitened.project(residual)
    if missing == 0:
        return Solved(residual, projection, projection, None, None)
    if missing is None:
        lost = whitened.lost(observed)
        eye = jnp.eye(lost.shape[-1])
        correction = _polished_inverse(eye - lost) - eye
        latent = _refined(
            projection,
            lambda b: b + jnp.einsum("bkl,bl->bk", correction, b),
            lambda z: z - jnp.einsum("bkl,bl->bk", lost, z),
        )
        return Solved(residual, projection, latent, None, correction)
    # Woodbury: the rows l of the missing cells, (I - L'L)^-1 = I + L'(I - LL')^-1 L.
    order = jnp.where(~observed, jnp.cumsum(~observed, axis=-1) - 1, missing)
    cells = jnp.arange(observed.shape[-1])
    batch = jnp.arange(observed.shape[0])[:, None]
    index = jnp.full((observed.shape[0], missing), -1)
    index = index.at[batch, order].set(jnp.broadcast_to(cells, order.shape), mode="drop")
    rows = jnp.where(index[..., None] >= 0, whitened.of(index), 0.0)
    system = jnp.eye(missing) - jnp.einsum("bqk,bpk->bqp", rows, rows)
    right = jnp.einsum("bqp,bpk->bqk", _polished_inverse(system), rows)

    def lift(weights: Array) -> Array:
        return jnp.einsum("bqk,bq->bk", rows, weights)

    latent = _refined(
        projection,
        lambda b: b + lift(jnp.einsum("bqk,bk->bq", right, b)),
        lambda z: z - lift(jnp.einsum("bqk,bk->bq", rows, z)),
    )
    return Solved(residual, projection, latent, rows.transpose(0, 2, 1), right)


def _refined(
    b: Float[Array, "B K"],
    inverse: Callable[[Array], Array],
    system: Callable[[Array], Array],
) -> Float[Array, "B K"]:
    """Solve by a nearby inverse, with one step of iterative refinement.

    It takes the jitter and the inverse's rounding out again, so that a window's result does not
    depend on which of the ways to solve it was compiled for its batch.
    """
    z = inverse(b)
    return z + inverse(b - system(z))


def _batch_inverse(system: Float[Array, "B K K"]) -> Float[Array, "B K K"]:
    return invert(system.transpose(1, 2, 0)).transpose(2, 0, 1)


def _polished_inverse(system: Float[Array, "B K K"]) -> Float[Array, "B K K"]:
    """Inverse by elimination, then one step of Newton (Schulz 1933) against the system itself.

    It takes jitter and rounding out again: variances, too, must not depend on the way of solving.
    """
    eye = jnp.eye(system.shape[-1])
    inverse = _batch_inverse(system + _JITTER * eye)
    return inverse + inverse @ (eye - system @ inverse)


def _through_latent(
    solved: Solved, rows: Float[Array, "C K"]
) -> tuple[Float[Array, "B C Q"], Float[Array, "B C Q"]] | None:
    """Pairs (a, b) such that rows M^-1 rows' = rows rows' + a b', None when M = I."""
    if solved.right is None:
        return None
    right = jnp.einsum("bqk,ck->bcq", solved.right, rows)
    if solved.left is None:
        return jnp.broadcast_to(rows[None], right.shape), right
    return jnp.einsum("bkq,ck->bcq", solved.left, rows), right


def latent_variance(solved: Solved, rows: Float[Array, "C K"]) -> Float[Array, "#B C"]:
    """Diagonal of rows M^-1 rows': the posterior variance of whitened cells, noise left out."""
    own = (rows**2).sum(-1)[None]
    pair = _through_latent(solved, rows)
    return own if pair is None else own + (pair[0] * pair[1]).sum(-1)


def mahalanobis(
    whitened: Whitened, solved: Solved, observed: Bool[Array, "B N"]
) -> Float[Array, " B"]:
    """(x - mean)' Cov^-1 (x - mean) over the observed cells.

    As what the latent variables leave unexplained and how unlikely they are themselves. Both are
    squares: where wild readings explain one another, |residual|^2 less what is explained would be
    a small difference of large numbers.
    """
    left = jnp.where(observed, solved.residual - whitened.explained(solved.latent), 0.0)
    return jnp.einsum("bn,bn->b", left, left) + whitened.prior(solved.latent)


def negative_log_likelihood(
    anchor: Anchor, x: Float[Array, "B N"], noise_variance: Float[Array, "B N"]
) -> Float[Array, " B"]:
    """-log p(x_sigma) in nats over the cells whose `noise_variance` (sigma^2) is finite."""
    mean, loadings, noise = anchor
    known = jnp.isfinite(noise_variance)
    v = noise + jnp.where(known, noise_variance, 0.0)
    weight = jnp.where(known, 1.0 / v, 0.0)
    y = jnp.where(known, x - mean, 0.0)
    rank = loadings.shape[1]
    root = jnp.linalg.cholesky(_unpack(weight @ _outer(loadings), rank) + jnp.eye(rank))
    log_det = 2.0 * jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
    log_det = log_det + jnp.where(known, jnp.log(v), 0.0).sum(-1)
    projection = (weight * y) @ loadings
    latent = jax.scipy.linalg.cho_solve((root, True), projection[..., None])[..., 0]
    quadratic = (weight * y**2).sum(-1) - (projection * latent).sum(-1)
    return 0.5 * (quadratic + log_det + known.sum(-1) * jnp.log(2.0 * jnp.pi))


class Masked(NamedTuple):
    """What the rest of the window says about the last slot's cells: mean and sd, (B, D).

    `hidden` (B, D, h) are the means of all cells that were hidden for it, a channel's newest last.
    """

    expected: Float[Array, "B D"]
    sd: Float[Array, "B D"]
    hidden: Float[Array, "B D h"]


def gram(loadings: Float[Array, "N K"], channels: int, hidden: int) -> Float[Array, "h h D"]:
    """Products of the whitened loadings of each channel's last `hidden` cells."""
    shaped = loadings[-hidden * channels :].reshape(hidden, channels, -1)
    return jnp.einsum("ick,jck->ijc", shaped, shaped)


def masked_reading(
    whitened: Whitened,
    products: Float[Array, "h h D"],
    solved: Solved,
    observed: Bool[Array, "B N"],
) -> Masked:
    """Expected value of every channel's last cell with that channel's last h cells hidden.

    All channels come from one solution of the observed window. With G the cells' covariance
    through the latent variables, taking the h observed cells T of a channel out of M is a
    Woodbury update by K = I - G_TT, an h x h system per channel. `whitened` must be at sigma = 0,
    `products` its `gram`. A missing cell is a target without evidence.
    """
    # As lists over the hidden cells: sums over axes this short would cost more than all the rest.
    hidden, channels = products.shape[1:]
    cells = range(hidden)
    rows = whitened.last(hidden * channels)

    def by_cell(flat: Float[Array, "*b C"]) -> list[Float[Array, "*b D"]]:
        return jnp.split(flat[..., -hidden * channels :], hidden, axis=-1)

    g = [[products[i, j] for j in cells] for i in cells]
    pair = _through_latent(solved, rows)
    if pair is not None:
        a, b = (part.reshape(len(part), hidden, channels, -1) for part in pair)
        more = jnp.einsum("bicq,bjcq->bijc", a, b)
        g = [[g[i][j] + more[:, i, j] for j in cells] for i in cells]
    u, o = by_cell(solved.residual), by_cell(observed.astype(jnp.float32))
    told = by_cell(solved.latent @ rows.T)
    # What the window says once the targets' own readings are out of the projection:
    without = [told[i] - _sum(g[i][j] * u[j] for j in cells) for i in cells]
    system = [[float(i == j) - g[i][j] * o[i] * o[j] for j in cells] for i in cells]
    link = [g[-1][i] * o[i] for i in cells]
    by_evidence = _solve_small(system, [without[i] * o[i] for i in cells])
    by_link = _solve_small(system, link)
    mean = [without[i] + _sum(g[i][j] * o[j] * by_evidence[j] for j in cells) for i in cells]
    variance = 1.0 + g[-1][-1] + _sum(link[i] * by_link[i] for i in cells)
    centre, scale = by_cell(whitened.mean), by_cell(whitened.scale)
    means = [centre[i] + scale[i] * mean[i] for i in cells]
    sd = jnp.broadcast_to(scale[-1] * jnp.sqrt(variance), means[-1].shape)
    return Masked(means[-1], sd, jnp.stack(means, -1))


def _sum(parts: Iterable[Array]) -> Array:
    return reduce(operator.add, parts)


def _solve_small(
    system: Sequence[Sequence[Float[Array, "*b"]]], right: Sequence[Float[Array, "*b"]]
) -> list[Float[Array, "*b"]]:
    """Gaussian elimination of many tiny symmetric positive definite systems, unrolled.

    A LAPACK call per 4 x 4 system would cost more than all the rest of the reading.
    """
    size = len(system)
    a, b = [list(row) for row in system], list(right)
    for pivot in range(size):
        inverse = 1.0 / jnp.maximum(a[pivot][pivot], _JITTER)
        for i in range(pivot + 1, size):
            factor = a[i][pivot] * inverse
            for j in range(pivot, size):
                a[i][j] = a[i][j] - factor * a[pivot][j]
            b[i] = b[i] - factor * b[pivot]
    for i in reversed(range(size)):
        for j in range(i + 1, size):
            b[i] = b[i] - a[i][j] * b[j]
        b[i] = b[i] / jnp.maximum(a[i][i], _JITTER)
    return b

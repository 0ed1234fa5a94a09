# ruff: noqa: F722
"""The anchor: a low-rank Gaussian over windows, exact for every mask and every noise level.

    x = mean + W z + e,    z ~ N(0, I_K),    e ~ N(0, diag(noise)),    x_sigma = x + sigma * n

so p(x_sigma) = N(mean, W W' + diag(noise + sigma^2)), and the posterior of z given the cells that
say anything is Gaussian with precision M = I + W' diag(o / (noise + sigma^2)) W (factor analysis;
Bishop 2006, section 12.2.4). x is one window, flattened slot-major, in normalised units.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from tsdiff.linalg import invert
from tsdiff.types import DoubleArray

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
    """

    mean: Float[Array, " N"]
    scale: Float[Array, " N"]
    loadings: Float[Array, "N K"]


def whiten(mean: DoubleArray, loadings: DoubleArray, noise: DoubleArray, sigma: float) -> Whitened:
    """Precompute (in float64) what serving needs of the anchor at noise level `sigma`."""
    return whiten_with_basis(mean, loadings, noise, sigma)[0]


def whiten_with_basis(
    mean: DoubleArray, loadings: DoubleArray, noise: DoubleArray, sigma: float
) -> tuple[Whitened, DoubleArray]:
    """As `whiten`, and R^-T (K, K), which takes loadings of other cells to the same basis."""
    v = noise.astype(np.float64) + sigma**2
    scaled = loadings.astype(np.float64) / np.sqrt(v)[:, None]
    root = np.linalg.cholesky(np.eye(loadings.shape[1]) + scaled.T @ scaled)
    basis = np.linalg.inv(root).T
    whitened = scaled @ basis
    return Whitened(
        mean=jnp.asarray(mean, jnp.float32),
        scale=jnp.asarray(np.sqrt(v), jnp.float32),
        loadings=jnp.asarray(whitened, jnp.float32),
    ), basis


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
    projection = residual @ whitened.loadings
    rank = whitened.loadings.shape[1]
    if missing == 0:
        return Solved(residual, projection, projection, None, None)
    if missing is None:
        if x.shape[0] < _FEW:
            hidden = jnp.where(observed[..., None], 0.0, whitened.loadings)
            lost = jnp.swapaxes(hidden, -1, -2) @ whitened.loadings
        else:
            lost = _unpack((~observed).astype(jnp.float32) @ _outer(whitened.loadings), rank)
        eye = jnp.eye(rank)
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
    rows = jnp.where(index[..., None] >= 0, whitened.loadings[index], 0.0)
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


def mahalanobis(solved: Solved) -> Float[Array, " B"]:
    """(x - mean)' Cov^-1 (x - mean) over the observed cells."""
    quadratic = (solved.residual**2).sum(-1) - (solved.projection * solved.latent).sum(-1)
    return jnp.maximum(quadratic, 0.0)


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


def masked_reading(
    whitened: Whitened,
    solved: Solved,
    observed: Bool[Array, "B N"],
    channels: int,
    hidden: int,
) -> Masked:
    """Expected value of every channel's last cell with that channel's last `hidden` cells hidden.

    All channels come from one solution of the observed window. With G the cells' covariance
    through the latent variables, taking the `hidden` observed cells T of a channel out of M is a
    Woodbury update by K = I - G_TT, a `hidden` x `hidden` system per channel. `whitened` must be
    at sigma = 0. A missing cell is a target without evidence.
    """
    batch = solved.residual.shape[0]
    rows = whitened.loadings[-hidden * channels :]
    shaped = rows.reshape(hidden, channels, -1)
    gram = jnp.einsum("ick,jck->cij", shaped, shaped)[None]
    pair = _through_latent(solved, rows)
    if pair is not None:
        a, b = (part.reshape(batch, hidden, channels, -1) for part in pair)
        blocks = [[(a[:, i] * b[:, j]).sum(-1) for j in range(hidden)] for i in range(hidden)]
        gram = gram + jnp.stack([jnp.stack(line, -1) for line in blocks], -2)
    told = (solved.latent @ rows.T).reshape(batch, hidden, channels).transpose(0, 2, 1)
    u = solved.residual[:, -hidden * channels :].reshape(batch, hidden, channels)
    u = u.transpose(0, 2, 1)
    o = observed[:, -hidden * channels :].reshape(batch, hidden, channels).transpose(0, 2, 1)
    o = o.astype(jnp.float32)
    # What the window says once the targets' own readings are out of the projection:
    without = told - (gram @ u[..., None])[..., 0]
    system = jnp.eye(hidden) - gram * o[..., :, None] * o[..., None, :]
    link = gram[..., -1, :] * o
    solution = _solve_small(system, jnp.stack(jnp.broadcast_arrays(without * o, link), -1))
    mean = without + (gram * o[..., None, :] * solution[..., None, :, 0]).sum(-1)
    variance = 1.0 + gram[..., -1, -1] + (link * solution[..., 1]).sum(-1)
    scale = whitened.scale[-hidden * channels :].reshape(hidden, channels).T
    told_of = whitened.mean[-hidden * channels :].reshape(hidden, channels).T + scale * mean
    sd = scale[:, -1] * jnp.sqrt(jnp.broadcast_to(variance, mean.shape[:2]))
    return Masked(told_of[..., -1], sd, told_of)


def _solve_small(
    system: Float[Array, "*b h h"], right: Float[Array, "*b h m"]
) -> Float[Array, "*b h m"]:
    """Gaussian elimination of many tiny symmetric positive definite systems, unrolled.

    A LAPACK call per 4 x 4 system would cost more than all the rest of the reading.
    """
    size = system.shape[-1]
    a = [[system[..., i, j] for j in range(size)] for i in range(size)]
    b = [right[..., i, :] for i in range(size)]
    for pivot in range(size):
        inverse = 1.0 / jnp.maximum(a[pivot][pivot], _JITTER)
        for i in range(pivot + 1, size):
            factor = a[i][pivot] * inverse
            for j in range(pivot, size):
                a[i][j] = a[i][j] - factor * a[pivot][j]
            b[i] = b[i] - factor[..., None] * b[pivot]
    for i in reversed(range(size)):
        total = b[i]
        for j in range(i + 1, size):
            total = total - a[i][j][..., None] * b[j]
        b[i] = total / jnp.maximum(a[i][i], _JITTER)[..., None]
    return jnp.stack(b, axis=-2)

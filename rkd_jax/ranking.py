"""Soft ranks, soft sorting and isotonic regression (Blondel et al., "Fast Differentiable Sorting and Ranking", 2020).

The soft rank of theta in R^n with strength eps is the Euclidean projection of -theta / eps onto the permutahedron of
(n, n - 1, ..., 1). With t = theta / eps sorted descending and u the non-increasing least-squares fit of t_j + j, it is

    r_j = u_j - t_j = middle(B) - (t_j - mean_B(t)),    B the block of the fit that holds j,

middle(B) being the mean of the positions in B. Neighbouring blocks A, B pool where mean_A(t) - mean_B(t) <=
(|A| + |B|) / 2. Once the blocks are known all is linear: the Jacobian is -(I - blockwise mean) / eps, which is
symmetric. That one line is the derivative in forward and in reverse mode and, being written in differentiable
operations, of every order. docs/soft_ranking.md shows what this does to logits.

The blocks are found in one of two ways. On a CPU: sort integer keys (3 to 5 times faster there than sorting floats),
pool adjacent violators row by row, find each entry's block by binary search; a batch whose rows all are one block skips
this. Elsewhere, and wherever rows may live on several devices: an O(n^2) test of the hull's vertices, all
comparisons and reductions over one axis, which needs no loop, no scatter and, for a sharded batch, no communication.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike

DIRECTIONS = ("ASCENDING", "DESCENDING")
LONG = 256  # entries of a row, from which sums are corrected


def soft_rank(
    values: ArrayLike, direction: str = "ASCENDING", regularization_strength: float | jax.Array = 1.0
) -> jax.Array:
    """Soft ranks along the last axis, from 1 to n; [..., n] -> [..., n].

    ASCENDING gives the smallest value rank 1, DESCENDING the largest, as in fast-soft-sort and torchsort.
    `regularization_strength` is eps, in units of `values`: towards 0 the ranks become hard (ties share the mean of
    their ranks); once it is large enough for a row to be one block they are (n + 1) / 2 +- (values - mean) / eps
    exactly. It may be a traced scalar, and is differentiable; one that is not positive then makes all ranks NaN.

    The result is float32 for float16, bfloat16 and float32 values (bfloat16 cannot hold ranks above 256), float64 for
    float64; gradients have the dtype of the values. Infinities are ranked; a NaN makes its own row NaN, and the row's
    gradient. jvp, vjp, vmap, and compositions of them to any order are supported.
    Raises ValueError for another direction or a strength that is not positive, TypeError for values that are integers.
    """
    values, eps = _checked(values, direction, regularization_strength)
    rank, _, _ = _rank(values, eps)
    return values.shape[-1] + 1 - rank if direction == "ASCENDING" else rank


def soft_sort(
    values: ArrayLike, direction: str = "ASCENDING", regularization_strength: float | jax.Array = 1.0
) -> jax.Array:
    """Soft-sorted values along the last axis; [..., n] -> [..., n].

    The projection of (n, ..., 1) / eps onto the permutahedron of `values`, which must be finite: towards 0 the values
    become sorted, and for a large eps they all become their mean. Dtypes, directions and errors as for `soft_rank`.
    """
    values, eps = _checked(values, direction, regularization_strength)
    if values.size == 0:
        return values
    sign = 1 if direction == "DESCENDING" else -1
    ordered = -jnp.sort(-sign * values)
    steps = -jnp.diff(ordered)
    start, size = _blocks(1 - jnp.where(steps == 0, 0, eps * steps))  # eps may be infinite
    offset = _middle(start, size) - jnp.arange(1, values.shape[-1] + 1, dtype=values.dtype)
    return sign * (_block_mean(ordered, start, size) + offset / eps)


def isotonic_l2(y: ArrayLike) -> jax.Array:
    """argmin over v_1 >= v_2 >= ... of ||v - y||^2 / 2 along the last axis; [..., n] -> [..., n]; y must be finite."""
    y, _ = _checked(y, "DESCENDING", 1.0)
    return _block_mean(y, *_blocks(-jnp.diff(y))) if y.size else y


def num_blocks(values: ArrayLike, regularization_strength: float | jax.Array = 1.0) -> jax.Array:
    """Number of blocks of each row's projection; [..., n] -> float [...].

    From 1, where the ranks are affine in the values, to n, where they are hard; NaN for a row that holds NaN.
    """
    values, eps = _checked(values, "DESCENDING", regularization_strength)
    rank, _, size = _rank(lax.stop_gradient(values), lax.stop_gradient(eps))
    return jnp.round(jnp.sum(1.0 / size + 0.0 * rank, axis=-1))


def _checked(values, direction, eps):
    """Values in at least float32, and eps in their dtype with as many axes (all of length 1)."""
    values = jnp.asarray(values)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is none of {DIRECTIONS}")
    if values.ndim == 0:
        raise ValueError("values is a scalar; ranks are along the last axis, so give it one")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"values has dtype {values.dtype}; convert it first, e.g. values.astype(jnp.float32)")
    if jnp.ndim(eps) != 0:
        raise ValueError(f"regularization_strength has shape {jnp.shape(eps)}; give a scalar, or use jax.vmap")
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if isinstance(eps, jax.core.Tracer):
        values = values * jnp.where(eps > 0, 1, jnp.nan).astype(values.dtype)
    elif not float(eps) >= float(jnp.finfo(values.dtype).tiny):  # with a finite inverse; an array's `>=` is traced
        raise ValueError(f"regularization_strength={eps} must be positive, and normal in {values.dtype}")
    return values, jnp.asarray(eps, values.dtype).reshape((1,) * values.ndim)


def _middle(start, size):
    """Mean of the positions start + 1, ..., start + size."""
    return start + (size + 1) / 2


# The operator. A block is (start, size): how many entries rank above it, and how many it holds. Both are given for each
# entry, so that entries are in one block where `start` is equal.


@jax.custom_jvp
@jax.jit
def _rank(values, eps):
    """Descending soft ranks, and each entry's block: [..., n], [1, ..., 1] -> three times [..., n]."""
    rank, start, size = _by_platform(_rank_by_loops, _rank_by_hull, values, eps)
    # As floats, for integers would have tangents that cannot be sharded.
    return rank, start.astype(rank.dtype), size.astype(rank.dtype)


@_rank.defjvp
def _rank_jvp(primals, tangents):
    values, eps = primals
    rank, start, size = _rank(values, eps)  # the operator itself, so that this rule is differentiable in turn
    slope = jnp.where(jnp.isnan(rank), jnp.nan, 1 / eps)
    by_values = _block_mean(tangents[0], start, size) - tangents[0]
    by_eps = (_middle(start, size) - rank) * tangents[1]
    return (rank, start, size), (slope * (by_values + by_eps), jnp.zeros_like(start), jnp.zeros_like(size))


@jax.jit
@jax.checkpoint  # which keeps the blocks for the gradient, and not the [n, n] mask of the form without loops
def _block_mean(x, start, size):
    """Mean of x over each entry's block, which is linear in x and symmetric; three times [..., n] -> [..., n]."""
    return _by_platform(_block_mean_by_loops, _block_mean_by_hull, x, start, size)


@jax.jit
def _blocks(drops):
    """Blocks of the non-increasing fit of y, from y_k - y_{k+1}; [..., n - 1] -> twice [..., n]."""
    start, size = _by_platform(_blocks_by_loops, _blocks_by_hull, lax.stop_gradient(drops))
    return start.astype(drops.dtype), size.astype(drops.dtype)


def _by_platform(loops, hull, x, *rest):
    """Apply `loops` on a CPU that holds every row of x, and `hull`, which shards without communication, elsewhere."""
    sharding = jax.typeof(x).sharding
    whole = jax.device_count() == 1 and not (sharding.mesh.manual_axes or any(sharding.spec))
    if whole and x.size and x.shape[-1] > 1:
        return lax.platform_dependent(x, *rest, cpu=loops, default=hull)
    return hull(x, *rest)


def _gaps(ordered, eps):
    """Distances of neighbours in units of eps, clipped at n: blocks further apart never pool, so the clip is exact."""
    above, below = ordered[..., :-1], ordered[..., 1:]
    return jnp.clip(jnp.where(above == below, 0, (above - below) / eps), 0, ordered.shape[-1])


def _poison(rank, values):
    return jnp.where(jnp.isnan(values).any(axis=-1, keepdims=True), jnp.nan, rank)


# Without loops. Every step is a comparison or a reduction over one axis of an [n, n] array, which a GPU or TPU never
# stores.


def _rank_by_hull(values, eps):
    if values.size == 0:
        return values, jnp.zeros_like(values, jnp.int32), jnp.zeros_like(values, jnp.int32)
    ordered = -lax.sort(-values, is_stable=False)
    cut = _cuts(_gaps(ordered, eps) - 1)[..., None, :]
    below = ordered[..., None, 1:]
    start, size = _enclosing(cut, below >= values[..., None], below < values[..., None])
    # Differences inside a block, not a difference of means: a common offset of the values costs no precision.
    ahead = values[..., None, :] - values[..., None]
    inside = (start[..., None, :] == start[..., None]) & (values[..., None, :] != values[..., None])
    rank = _middle(start, size.astype(values.dtype)) + jnp.sum(jnp.where(inside, ahead, 0), axis=-1) / eps / size
    return _poison(rank, values), start, size


def _block_mean_by_hull(x, start, size):
    inside = start[..., None, :] == start[..., None]
    return jnp.sum(jnp.where(inside, x[..., None, :], 0), axis=-1) / jnp.maximum(size, 1)


def _blocks_by_hull(drops):
    position = jnp.arange(drops.shape[-1] + 1)
    return _enclosing(_cuts(drops)[..., None, :], position[:-1] < position[:, None], position[:-1] >= position[:, None])


def _enclosing(cut, above, not_above):
    """(start, size) between the last cut above an entry and the first one not above it; bool [..., n, n - 1] each.

    The two are given apart, for XLA stores what is read twice.
    """
    k = jnp.arange(1, cut.shape[-1] + 1, dtype=jnp.int32)
    start = jnp.max(jnp.where(cut & above, k, 0), axis=-1, initial=0)
    end = jnp.min(jnp.where(cut & not_above, k, cut.shape[-1] + 1), axis=-1, initial=cut.shape[-1] + 1)
    return start, end - start


def _cuts(drops):
    """Whether the non-increasing fit of y steps down after k, from y_k - y_{k+1}; [..., n - 1] -> bool [..., n - 1].

    The fit is the slope of the least concave majorant of y's prefix sums S, and steps down at its vertices: where the
    slope to k from every earlier i exceeds the slope from k to every later one.
    """
    n = drops.shape[-1] + 1
    origin = [(0, 0)] * (drops.ndim - 1) + [(1, 0)]
    y, residue = _prefix_sum(jnp.pad(-drops, origin))
    total, residue = (jnp.pad(x, origin) for x in _prefix_sum(y - jnp.mean(y, axis=-1, keepdims=True), residue))
    k, other = jnp.arange(1, n)[:, None], jnp.arange(n + 1)
    rise = (total[..., 1:n, None] - total[..., None, :]) + (residue[..., 1:n, None] - residue[..., None, :])
    slope = rise / jnp.where(k == other, 1, k - other)
    before = jnp.min(jnp.where(other < k, slope, jnp.inf), axis=-1)
    after = jnp.max(jnp.where(other > k, slope, -jnp.inf), axis=-1)
    return before > after


def _prefix_sum(x, residue=0):
    """Prefix sums of x + residue as an unevaluated sum (rounded, residue): float32 alone would be whole ranks off."""

    def prefix_sum(x):  # jnp.cumsum takes a GPU four kernels
        position = jnp.arange(x.shape[-1])
        return jnp.sum(jnp.where(position <= position[:, None], x[..., None, :], 0), axis=-1)

    rounded = prefix_sum(x)
    before = jnp.pad(rounded[..., :-1], [(0, 0)] * (x.ndim - 1) + [(1, 0)])
    return rounded, prefix_sum(x - (rounded - before) + residue)


# With loops over the rows.


@custom_vmap
def _rank_by_loops(values, eps):
    return lax.cond(jnp.all(_is_one_block(values, eps)), _rank_one_block, _rank_by_pooling, values, eps)


@_rank_by_loops.def_vmap
def _rank_by_loops_vmap(axis_size, in_batched, values, eps):
    values = values if in_batched[0] else jnp.broadcast_to(values, (axis_size, *values.shape))
    return _rank_by_loops(values, eps if in_batched[1] else eps[None]), (True, True, True)


def _is_one_block(values, eps):
    """Whether a row is one block by a test that needs no sort, so may miss some; [..., n] -> bool [...].

    With c = (values - mean) / eps, a row is one block where the sum of its k largest c is at most k (n - k) / 2 for
    each k: c then lies in the centred permutahedron, and a projection is the identity on what lies inside. Set the
    largest c apart: the other N = n - 1 have mean -c_max / N, and by Cauchy and Schwarz the m largest of them exceed
    that mean by no more than |d| sqrt(m (N - m) / N) in sum, d being their deviations: a bound on |d| for each m,
    ((m + 1) / 2 - c_max / N) sqrt(N (N - m) / m).
    """
    rest = values.shape[-1] - 1
    ahead = values - values[..., :1]  # differences first: a common offset of the values costs no precision
    c = (ahead - jnp.mean(ahead, axis=-1, keepdims=True)) / eps
    top = jnp.max(c, axis=-1, keepdims=True)
    square = jnp.sum(c * c, axis=-1, keepdims=True) - top * top * ((rest + 1) / rest)
    m = np.arange(1, rest)
    # The least of the bounds is concave in c_max, so above its chord between c_max / N = 0 and 1 / 2.
    bounds = np.sqrt(rest * (rest - m) / m) * ((m + 1) / 2 - np.array([[0.0], [0.5]]))
    low, high = np.min(bounds, axis=-1, initial=rest).tolist()
    fits = square <= (low + (high - low) * 2 / rest * top) ** 2
    return ((top <= rest / 2) & fits)[..., 0]


def _rank_one_block(values, eps):
    n = values.shape[-1]
    ahead = values[..., :1] - values  # differences first: a common offset of the values costs no precision
    rank = (n + 1) / 2 + (ahead - jnp.mean(ahead, axis=-1, keepdims=True)) / eps
    return rank, jnp.zeros_like(values, jnp.int32), jnp.full_like(values, n, jnp.int32)


def _rank_by_pooling(values, eps):
    keys = _to_keys(-values)
    ordered = lax.sort(keys)
    starts = _starts(_gaps(-_from_keys(ordered, values.dtype), eps) - 1)
    # Equal values share a block, so values alone tell the block: no permutation is needed.
    firsts = _take(_append(ordered, jnp.iinfo(keys.dtype).max), starts)
    block = _search(firsts, keys)
    start, end = _take(starts, block), _take(_append(starts, values.shape[-1]), block + 1)
    size = (end - start).astype(values.dtype)
    first = -_from_keys(_take(firsts, block), values.dtype)
    below = jnp.where(first == values, 0, (first - values) / eps)
    centred = below - _block_mean_by_pooling(below, start, size)
    if values.shape[-1] > LONG:  # where rounding has grown, a second look at the mean takes it back
        centred -= _block_mean_by_pooling(centred, start, size)
    rank = _middle(start, size) + centred
    return _poison(rank, values), start, end - start


def _block_mean_by_loops(x, start, size):
    def mean(x, start, size):
        return jnp.broadcast_to(jnp.mean(x, axis=-1, keepdims=True), x.shape)

    one_block = _all(size[..., :1] == x.shape[-1])  # the first entry's block tells of the whole row
    return lax.cond(one_block, mean, _block_mean_by_pooling, x, start, size)


@custom_vmap
def _all(x):
    """Whether all of x is true, over vmap's axes too: a condition for each row would compute both branches for all."""
    return jnp.all(x)


@_all.def_vmap
def _all_vmap(axis_size, in_batched, x):
    return _all(x), False


def _block_mean_by_pooling(x, start, size):
    def total(x, start):
        at = {"mode": "promise_in_bounds"}
        return jnp.zeros_like(x).at[start].add(x, **at).at[start].get(**at)

    return jnp.vectorize(total, signature="(n),(n)->(n)")(x, start.astype(jnp.int32)) / size


@custom_vmap
def _blocks_by_loops(drops):
    starts = _starts(drops)
    position = jnp.broadcast_to(jnp.arange(drops.shape[-1] + 1, dtype=jnp.int32), starts.shape)
    block = _search(starts, position)
    start, end = _take(starts, block), _take(_append(starts, drops.shape[-1] + 1), block + 1)
    return start, end - start


@_blocks_by_loops.def_vmap
def _blocks_by_loops_vmap(axis_size, in_batched, drops):
    return _blocks_by_loops(drops), (True, True)


def _starts(drops):
    """First positions of the blocks in order, then n; [..., n - 1] -> int32 [..., n]."""
    starts, count = lax.map(_pool, drops.reshape(-1, drops.shape[-1]))
    n = starts.shape[-1]
    starts = jnp.where(jnp.arange(n, dtype=jnp.int32) < count[:, None], starts, n)
    return starts.reshape(*drops.shape[:-1], n)


def _pool(drops):
    """Pool adjacent violators in one row: [n - 1] -> first positions of the blocks, int32 [n], and their number.

    A block is known by its start and by how far its mean lies above its last entry and below its first, so that no sum
    grows with the row and float32 suffices.
    """
    zero, at = drops.dtype.type(0), {"mode": "promise_in_bounds"}

    def push(j, stack):
        def step_down(block):  # mean of the block on top of the stack minus the mean of this one
            top, start, _, below = block
            last = jnp.maximum(top - 1, 0), jnp.maximum(start - 1, 0)
            return over_last.at[last[0]].get(**at) + drops.at[last[1]].get(**at) + below

        def violates(block):
            return (block[0] > 0) & (step_down(block) <= 0)

        def merge(block):
            top, start, over, below = block
            left = starts.at[top - 1].get(**at)
            share = step_down(block) / (j + 1 - left).astype(drops.dtype)
            over = over + share * (start - left).astype(drops.dtype)
            below = below_first.at[top - 1].get(**at) + share * (j + 1 - start).astype(drops.dtype)
            return top - 1, left, over, below

        top, starts, over_last, below_first = stack
        top, start, over, below = lax.while_loop(violates, merge, (top, j, zero, zero))
        return (
            top + 1,
            starts.at[top].set(start, **at),
            over_last.at[top].set(over, **at),
            below_first.at[top].set(below, **at),
        )

    n = drops.shape[-1] + 1
    empty = jnp.zeros(n, drops.dtype)
    stack = (jnp.int32(0), jnp.zeros(n, jnp.int32), empty, empty)
    count, starts, _, _ = lax.fori_loop(jnp.int32(0), jnp.int32(n), push, stack)
    return starts, count


def _to_keys(x):
    """Integers in the order of the floats; `_from_keys` is its inverse."""
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def _from_keys(keys, dtype):
    return lax.bitcast_convert_type(jnp.where(keys < 0, keys ^ jnp.iinfo(keys.dtype).max, keys), dtype)


def _search(ordered, keys):
    """Index of the last entry of each ordered row that is at most the key; [..., n], [..., n] -> int32 [..., n]."""

    def row(ordered, keys):
        return jnp.searchsorted(ordered, keys, side="right", method="scan_unrolled").astype(jnp.int32) - 1

    return jnp.vectorize(row, signature="(n),(n)->(n)")(ordered, keys)


def _take(x, index):
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")


def _append(x, value):
    return jnp.concatenate([x, jnp.full_like(x[..., :1], value)], axis=-1)

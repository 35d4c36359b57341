"""Translation retrieval: does a sentence's nearest neighbour in another language say the same?

Every ordered pair of languages, by cosine, by CSLS and by the ratio margin the paper uses, and
MEXA's mutual rule on the way. One block of cosines [N, N] serves both directions of a pair and all
scores; that block and one score's exist at a time.

    found = retrieval(states)                    # {'cosine': [G, G], 'csls': ..., 'margin': ...}
    found["margin"][en, cy]                      # share of English sentences that find the Welsh
    table = retrieval(states, width=256)         # a sweep over all layers on a small machine

What it costs: N^2 D multiplications for each of the G (G - 1) / 2 pairs. The languages of FLORES in
an 8B model (36 x 988 x 4096) take 5.0e12 floating-point operations a layer, 1.7e14 for 33 layers.
Nothing exact was found that is cheaper: the states fill all 4096 dimensions, and what principal
directions leave out bounds a cosine only to about 0.05 where they keep 95 %. So the time is that of
the matrix product: 63 CPU seconds a layer (AVX-512). With `width=256` it is half, 32: of the 26 ms
that a pair then takes at least, 3 are the product, 2 the exact cosines of translations, 14 the
nearest neighbours by row and column, 7 the maxima of four scores. `top_k`, a partition and an
insertion row by row were not much faster. The exact table of all layers is work for an accelerator.
"""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.probe.subspace import compress
from jaxalign.probe.vectors import States, shape_of, unit_vectors

SCORES = ("cosine", "csls", "margin", "mexa")
ROUNDING = 1e-5  # what a cosine of all dimensions must be better by than one of some directions


def retrieval(
    states: States,
    scores: tuple[str, ...] = ("cosine", "csls", "margin"),
    *,
    groups: Any = None,
    csls_neighbours: int = 10,
    margin_neighbours: int = 4,
    width: int | None = None,
) -> dict[str, np.ndarray]:
    """Share of sentences whose translation scores higher than every other candidate, per score.

    - `cosine`: cos(x, y).
    - `csls`: 2 cos(x, y) - r(x) - r(y), r the mean cosine with the k nearest sentences of the other
      language (Conneau et al. 2018, arXiv 1710.04087; k = 10).
    - `margin`: cos(x, y) / (r(x) / 2 + r(y) / 2) (Artetxe & Schwenk 2019, arXiv 1811.01136,
      the ratio; k = 4). This is the score of Liu & Niehues 2025.
    - `mexa`: both sentences strictly prefer each other by cosine (see `jaxalign.probe.mexa`); it is
      the same in both directions and does not look at `groups`.

    A tie is not a hit: the translation must score strictly higher than every other candidate, so
    that states that have all collapsed into one find nothing. With fewer sentences than k, all are
    neighbours.

    Args:
      states: [G, N, D] of one layer.
      scores: which of the four.
      groups: integers, [N] or [1, N] of all languages, or [G, N]; sentences with equal numbers say
        the same: what translates one translates the other. None: all sentences differ.
      csls_neighbours: k of CSLS.
      margin_neighbours: k of the margin.
      width: None computes every cosine in full. A number keeps that many principal directions for
        the cosines of wrong pairs, those of translations stay exact; see `jaxalign.probe.subspace`.

    Returns:
      For each score [G, G] float64 in 0..1, row = source language, column = target language, NaN on
      the diagonal.

    Raises:
      UserError: unknown score; bad states, groups or numbers.
    """
    languages, number, full = shape_of(states)
    unknown = set(scores) - set(SCORES)
    if unknown or not scores:
        raise UserError(f"retrieval scores are {', '.join(SCORES)}; not {sorted(unknown)}")
    if languages < 2:
        raise UserError("retrieval needs at least 2 languages")
    if min(csls_neighbours, margin_neighbours) < 1:
        raise UserError("a neighbourhood holds at least 1 sentence")
    groups = np.atleast_2d(np.arange(number) if groups is None else groups)
    if groups.shape not in ((1, number), (languages, number)):
        raise UserError(
            f"groups must hold {number} numbers, or as many for each of {languages} languages, "
            f"not shape {groups.shape}"
        )
    said = [jnp.asarray(np.unique(row, return_inverse=True)[1], jnp.int32) for row in groups]
    if width is not None and width < 1:
        raise UserError(f"width must be at least 1, not {width}")
    vectors = unit_vectors(states)
    width = full if width is None else width
    small = compress(vectors, width).coordinates if width < full else vectors
    near = {"csls": min(csls_neighbours, number), "margin": min(margin_neighbours, number)}
    pair = partial(_pair, scores=tuple(scores), near=near)
    alike = _translations(said[0], said[0])
    shares = {score: np.full((languages, languages), np.nan) for score in scores}
    waiting = []  # Results are fetched a row late, so that the accelerator never idles.
    for a, b in combinations(range(languages), 2):
        exact = (vectors[a], vectors[b]) if width < full else None
        same = alike if len(said) == 1 else _translations(said[a], said[b])
        waiting.append((a, b, pair(small[a], small[b], exact, same)))
        if len(waiting) > 8:
            _note(shares, number, *waiting.pop(0))
    for one in waiting:
        _note(shares, number, *one)
    return shares


def _note(
    shares: dict[str, np.ndarray], number: int, a: int, b: int, hits: list[jax.Array]
) -> None:
    for share, both in zip(shares.values(), hits, strict=True):
        share[a, b], share[b, a] = np.asarray(both) / number


def _pair(
    x: jax.Array,  # [N, W] float32, one language
    y: jax.Array,  # [N, W]
    exact: tuple[jax.Array, jax.Array] | None,  # [N, D] twice: full vectors behind x and y
    same: jax.Array,  # [N, N] bool: finding this one is finding the translation
    *,
    scores: tuple[str, ...],
    near: dict[str, int],  # neighbours of CSLS and of the margin
) -> list[jax.Array]:
    """Hits of each score, [2] int32: from x to y, and back."""
    sizes = tuple(sorted({near[score] for score in scores if score in near}))
    cosine, rows, columns = _cosines(x, y, exact, sizes)
    found = []
    for score in scores:
        if score == "mexa":
            found.append(_mutual(cosine))
        else:
            # A program of its own: fused into the maxima, a score is computed once for each of
            # them, with another rounding, and what is equal would win or lose by chance.
            k = near.get(score)
            values = cosine if k is None else _SCORED[score](cosine, rows[k], columns[k])
            found.append(_hits(values, same))
    return found


@jax.jit
def _translations(x: jax.Array, y: jax.Array) -> jax.Array:
    """[N, N] bool: whether a sentence of x [N] int is anywhere beside one of y [N] int."""
    beside = jnp.zeros((len(x), len(y)), bool).at[x, y].set(True)
    return beside[x][:, y]


@partial(jax.jit, static_argnames="sizes")
def _cosines(
    x: jax.Array, y: jax.Array, exact: tuple[jax.Array, jax.Array] | None, sizes: tuple[int, ...]
) -> tuple[jax.Array, dict[int, jax.Array], dict[int, jax.Array]]:
    """[N, N], row = x, column = y; mean cosines of the k nearest, by row and by column."""
    cosine = cosines(x, y)
    if exact is not None:
        own = jnp.sum(exact[0] * exact[1], axis=-1) - ROUNDING
        cosine = jnp.where(jnp.eye(x.shape[0], dtype=bool), own, cosine)
    if not sizes:
        return cosine, {}, {}
    rows, columns = (top_means(cosine, list(sizes), axis) for axis in (1, 0))
    return cosine, rows, columns


@jax.jit
def _csls(cosine: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    return 2 * cosine - rows - columns


@jax.jit
def _margin(cosine: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    near = (rows + columns) / 2
    # A ratio to a negative mean would order the candidates from the farthest to the nearest.
    return jnp.where(near > 0, cosine / jnp.where(near > 0, near, 1.0), 0.0)


_SCORED = {"csls": _csls, "margin": _margin}


@jax.jit
def _hits(values: jax.Array, same: jax.Array) -> jax.Array:
    return jnp.stack([jnp.sum(prefers(values, same, axis)) for axis in (1, 0)])


@jax.jit
def _mutual(cosine: jax.Array) -> jax.Array:
    own = jnp.eye(cosine.shape[0], dtype=bool)
    both = jnp.sum(prefers(cosine, own, 1) & prefers(cosine, own, 0))
    return jnp.stack([both, both])


def cosines(x: jax.Array, y: jax.Array) -> jax.Array:
    """[N, M] float32 for unit vectors x [N, D] and y [M, D]; float32 on every accelerator."""
    # Left to themselves, TPUs multiply in bfloat16 and GPUs in TF32.
    return jnp.einsum("iD,jD->ij", x, y, precision=jax.lax.Precision.HIGHEST)


def prefers(values: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """Whether the best of `right` [N, N] is strictly larger than all others along `axis`: [N]."""
    inside = jnp.max(jnp.where(right, values, -jnp.inf), axis)
    return inside > jnp.max(jnp.where(right, -jnp.inf, values), axis)


def top_means(values: jax.Array, sizes: list[int], axis: int) -> dict[int, jax.Array]:
    """Means of the k largest values along `axis`, kept as an axis of 1, for each k of `sizes`."""
    # The next largest is the maximum of what is below the last one: as many passes over the block
    # as neighbours, and still cheaper than `top_k`, which sorts.
    bounds = [jnp.max(values, axis, keepdims=True)]
    while len(bounds) < max(sizes):
        below = jnp.where(values < bounds[-1], values, -jnp.inf)
        bounds.append(jnp.max(below, axis, keepdims=True))
    ranks = jnp.arange(1, len(bounds) + 1)

    def counted() -> jax.Array:
        return jnp.stack([jnp.sum(values >= bound, axis, keepdims=True) for bound in bounds])

    # Equal values share one bound. Float32 cosines are equal now and then: only then we count.
    above = jnp.sum(values >= bounds[-1], axis, keepdims=True)
    taken = jax.lax.cond(
        jnp.all((above == len(bounds)) & jnp.isfinite(bounds[-1])),
        lambda: jnp.broadcast_to(ranks[:, None, None], (len(bounds), *above.shape)),
        counted,
    )  # [k, ...]: values at least as large as each bound
    means = {}
    for size in sizes:
        full = jnp.minimum(taken, size)
        times = jnp.diff(full, axis=0, prepend=0)
        parts = [jnp.where(n > 0, n * bound, 0) for n, bound in zip(times, bounds, strict=True)]
        means[size] = sum(parts, start=jnp.zeros_like(bounds[0])) / size
    return means

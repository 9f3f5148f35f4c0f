"""CLIP's contrastive loss over the global batch, computed as a ring over shards.

With b pairs over n shards, each holding m = b / n, the full matrix of logits is b x b: at the
paper's batch it would fill a chip (2103.00020, section 2.3). No chip ever holds more than
m x min(m, COLUMNS) of it:

    each chip keeps its images; the captions go round the ring
    repeat n times:
        logits = scale * z_img[m, d] @ z_txt[m, d].T    its images, the captions that are here
        update for each image the running maximum and sum of exponentials over captions
        update the same for each caption, which travels on with it
        send the captions, with their running values, to the next chip
    loss of a pair = (log-sum-exp over captions + log-sum-exp over images) / 2 - its own logit

The running sums under a running maximum are Milakov & Gimelshein's (1805.02867). The backward pass
goes round once more, computes the softmaxes from the kept log-sum-exps, and lets the gradients of
the captions travel with them; what lives between the passes is of size b. Outside a mesh there is
one shard, and the loop has one turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dalle2_jax.parallel.shards import current_batch_axes, on_shards
from dalle2_jax.types import Array

# Captions that a chip visits at a time.
COLUMNS = 1024


class Contrast(NamedTuple):
    """The contrastive loss of a batch, with the accuracy of both directions."""

    loss: Array  # scalar: mean cross-entropy over both directions
    image_to_text: Array  # scalar in [0, 1]: how often an image's own caption scores highest
    text_to_image: Array


def contrast(z_img: Array, z_txt: Array, scale: Array) -> Contrast:
    """Symmetric cross-entropy between z_img [b, d] and z_txt [b, d], pair i against all others.

    `scale` multiplies the dot products: a scalar, or [b] where each example brings its own, which
    then serves its row of either direction. Of equal logits the first counts as the highest.
    Everything in float32. b must be a multiple of the batch shards of the mesh it is traced in.
    """
    z_img, z_txt, scale = (x.astype(jnp.float32) for x in (z_img, z_txt, scale))
    losses, text_hits, image_hits = _pairs(z_img, z_txt, jnp.broadcast_to(scale, z_img.shape[:1]))
    return Contrast(losses.mean(), text_hits.mean(), image_hits.mean())


@jax.custom_vjp
def _pairs(z_img: Array, z_txt: Array, scale: Array) -> tuple[Array, Array, Array]:
    """Returns (losses [b], hits of the captions [b], 0 or 1, hits of the images [b])."""
    return _pairs_fwd(z_img, z_txt, scale)[0]


def _pairs_fwd(z_img: Array, z_txt: Array, scale: Array) -> tuple[Any, Any]:
    axes, n = current_batch_axes()
    run = on_shards(functools.partial(_forward, axes, n), axes)
    *out, lse_img, lse_txt = run(z_img, z_txt, scale)
    return tuple(out), (z_img, z_txt, scale, lse_img, lse_txt)


def _pairs_bwd(residuals: Any, cotangents: Any) -> tuple[Array, Array, Array]:
    axes, n = current_batch_axes()
    # The hits are counts, so only the losses have a cotangent that matters.
    return on_shards(functools.partial(_backward, axes, n), axes)(*residuals, cotangents[0])


_pairs.defvjp(_pairs_fwd, _pairs_bwd)


class _Peak(NamedTuple):
    """Running maximum, sum of exponentials and hits of rows (or columns) of logits seen in part."""

    top: Array  # the highest logit
    place: Array  # int32, its place in the global batch, the first of equal ones
    total: Array  # sum of exp(logit - top)

    @classmethod
    def none(cls, *shape: int) -> _Peak:
        return cls(jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))

    def see(self, logits: Array, first: Array, axis: int) -> _Peak:
        """Takes in logits that stand, along `axis`, at `first`, `first` + 1, ... of the batch."""
        top = logits.max(axis)
        place = first + jnp.argmax(logits, axis).astype(jnp.int32)
        # A shard meets the batch from its own place on: of equal logits the first is not the
        # first it meets.
        won = (top > self.top) | ((top == self.top) & (place < self.place))
        # Sums are relative to the maximum, so no exponential overflows. When the maximum rises,
        # the old sum shrinks by exp(old - new): at first by exp(-inf) = 0, times a sum of 0.
        highest = jnp.maximum(top, self.top)
        seen = jnp.exp(logits - jnp.expand_dims(highest, axis)).sum(axis)
        total = self.total * jnp.exp(self.top - highest) + seen
        return _Peak(highest, jnp.where(won, place, self.place), total)

    def lse(self) -> Array:
        return self.top + jnp.log(self.total)


def _dots(a: Array, b: Array) -> Array:
    """a @ b, exact to float32: a TPU's default of bfloat16 would cost a logit of 100 its tenths."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _round(
    axes: tuple[str, ...], n: int, visit: Callable[..., Any], rows: Any, captions: Any, columns: Any
) -> tuple[Any, Any]:
    """Takes the captions of every shard round the ring, each with its sums.

    Args:
        visit: (rows, captions, columns, row, column) -> (rows, columns), for all images of this
            shard and up to COLUMNS captions. `row` and `column` are the places of the first image
            and of the first caption in the global batch.
        rows: sums over captions, [m, ...]; they stay with the images.
        captions: what `visit` reads of the captions, [m, ...].
        columns: sums over images, [m, ...]; they travel with the captions.

    Returns:
        (rows, columns) once every caption has met every image; columns are home again.
    """
    m = jax.tree.leaves(captions)[0].shape[0]
    # The largest divisor of m, since a scan needs equal pieces. If m is a large prime, it is 1.
    width = next(c for c in range(min(m, COLUMNS), 0, -1) if m % c == 0)
    me = jax.lax.axis_index(axes) if axes else 0

    def cut(x: Array) -> Array:
        return x.reshape(m // width, width, *x.shape[1:])

    def move(tree: Any) -> Any:  # to the next shard
        ring = [(i, (i + 1) % n) for i in range(n)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, ring), tree) if axes else tree

    def turn(carry: Any, t: Array) -> tuple[Any, None]:
        rows, captions, columns = carry
        firsts = (me - t) % n * m + width * jnp.arange(m // width)  # places in the global batch
        # After t turns the captions of shard me - t are here. The scan threads `rows` through the
        # pieces, and stacks `columns`, which each piece has for itself.
        rows, columns = jax.lax.scan(
            lambda rows, x: visit(rows, x[0], x[1], me * m, x[2]), rows, (captions, columns, firsts)
        )
        # `captions` does not wait for the visit: the compiler may send it in the meantime.
        return (rows, move(captions), move(columns)), None

    # n turns move everything once round, so columns end on the shard whose captions they belong to.
    start = rows, jax.tree.map(cut, captions), jax.tree.map(cut, columns)
    (rows, _, columns), _ = jax.lax.scan(turn, start, jnp.arange(n))
    return rows, jax.tree.map(lambda x: x.reshape(m, *x.shape[2:]), columns)


def _forward(axes: tuple[str, ...], n: int, z_img: Array, z_txt: Array, scale: Array) -> Any:
    """Computes on one shard, all [m]: losses, hits of both directions, log-sum-exps of both."""
    m = z_img.shape[0]

    def visit(rows: Any, captions: Any, columns: Any, row: Array, column: Array) -> tuple[Any, Any]:
        dots = _dots(z_img, captions[0].T)  # m c
        # One product serves both directions; they differ only in whose scale multiplies it.
        rows = rows.see(scale[:, None] * dots, column, axis=1)
        return rows, columns.see(captions[1][None, :] * dots, row, axis=0)

    rows, columns = _round(axes, n, visit, _Peak.none(m), (z_txt, scale), _Peak.none(m))
    here = (jax.lax.axis_index(axes) if axes else 0) * m + jnp.arange(m)
    hits = [(side.place == here).astype(jnp.float32) for side in (rows, columns)]
    lse_img, lse_txt = rows.lse(), columns.lse()
    losses = (lse_img + lse_txt) / 2 - scale * jnp.sum(z_img * z_txt, axis=1)
    return losses, *hits, lse_img, lse_txt


def _backward(
    axes: tuple[str, ...],
    n: int,
    z_img: Array,
    z_txt: Array,
    scale: Array,
    lse_img: Array,
    lse_txt: Array,
    g: Array,  # m, the cotangents of the losses
) -> tuple[Array, Array, Array]:
    """Computes on one shard the gradients of z_img, z_txt [m, d] and scale [m]."""
    m = z_img.shape[0]

    def visit(rows: Any, captions: Any, columns: Any, row: Array, column: Array) -> tuple[Any, Any]:
        (dz_img, dscale), (dz_txt, dscale_txt) = rows, columns
        txt, scale_txt, lse, g_txt = captions
        dots = _dots(z_img, txt.T)  # m c
        same = row + jnp.arange(m)[:, None] == column + jnp.arange(txt.shape[0])[None, :]
        # softmax - one-hot of either direction, times its pair's share
        by_row = (jnp.exp(scale[:, None] * dots - lse_img[:, None]) - same) * (g / 2)[:, None]
        by_column = (jnp.exp(scale_txt[None, :] * dots - lse[None, :]) - same) * (g_txt / 2)[None]
        pull = scale[:, None] * by_row + scale_txt[None, :] * by_column  # of the dot products
        rows = dz_img + _dots(pull, txt), dscale + jnp.sum(by_row * dots, axis=1)
        columns = dz_txt + _dots(pull.T, z_img), dscale_txt + jnp.sum(by_column * dots, axis=0)
        return rows, columns

    # Gradients of captions and of images have the same shapes: m d, and m of the scale.
    nothing = jnp.zeros_like(z_img), jnp.zeros_like(scale)
    captions = z_txt, scale, lse_txt, g
    (dz_img, dscale), (dz_txt, dscale_txt) = _round(axes, n, visit, nothing, captions, nothing)
    return dz_img, dz_txt, dscale + dscale_txt

"""The ring's loss is the plain one, whatever the mesh, and never holds its logits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import within

from dalle2_jax.parallel import sharding
from dalle2_jax.tasks.shared import contrastive
from dalle2_jax.tasks.shared.contrastive import contrast

MESHES = [(1, 1, 1), (2, 1, 1), (8, 1, 1), (2, 4, 1), (1, 8, 1), (1, 4, 2)]


def plain(z_img, z_txt, scale):
    """2103.00020, figure 3, all logits at once; scale [b] serves each row of either direction."""
    dots = jnp.matmul(z_img, z_txt.T, precision="highest")
    labels = jnp.arange(len(dots))
    sides = [scale[:, None] * dots, scale[:, None] * dots.T]
    losses = [jax.nn.logsumexp(s, axis=1) - jnp.diagonal(s) for s in sides]
    hits = [(jnp.argmax(s, axis=1) == labels).mean() for s in sides]
    return (losses[0].mean() + losses[1].mean()) / 2, *hits


def over(sizes):
    """`contrast` jitted as the trainer does on that mesh, arguments split over it."""
    devices = jax.devices()[: math.prod(sizes)]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), devices)
    return functools.partial(
        jax.jit, in_shardings=sharding.batch_sharding(mesh)
    ), lambda function: within(mesh, function)


def embeddings(b=64, d=4, seed=0, near=0.5):
    """Unit vectors; captions near their images."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(2, b, d))
    z[1] = z[0] + near * z[1]
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    return jnp.asarray(z[0], jnp.float32), jnp.asarray(z[1], jnp.float32)


def check_equal(got, want, rtol=1e-4):
    """To rtol of the array's greatest entry: entries that cancel have rounding alone.

    Logits of up to 100 are rounded to 100 EPS / 2 at each of a few operations, which is the
    relative error of their exponentials. What a shard leaves out is 1 / 64 and more.
    """
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        size = np.abs(np.asarray(other)).max()
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * size)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(function, *arguments):
    return jax.value_and_grad(
        lambda *a: (function(*a)[0], function(*a)[1:]), argnums=(0, 1, 2), has_aux=True
    )(*arguments)


@pytest.mark.parametrize("sizes", MESHES)
def test_loss_hits_and_gradients_are_the_plain_ones(sizes):
    jit, traced = over(sizes)
    got = jit(traced(functools.partial(value_and_grad, contrast)))
    for scale in (1 / 0.07, 100.0):
        scales = scale * jnp.linspace(0.8, 1.0, 64)  # each example its own, as under SAM
        arguments = *embeddings(), scales
        check_equal(got(*arguments), value_and_grad(plain, *arguments))
        (_, hits), _ = got(*arguments)
        assert 0 < hits[0] < 1 and 0 < hits[1] < 1


def test_one_scale_gets_the_sum_of_its_gradients():
    z_img, z_txt = embeddings()
    each = value_and_grad(plain, z_img, z_txt, jnp.full(64, 30.0))[1][2].sum()
    alone = value_and_grad(contrast, z_img, z_txt, jnp.float32(30.0))[1][2]
    assert alone.shape == ()
    check_equal(alone, each)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 4, 1)])
def test_of_equal_logits_the_first_is_the_highest(sizes):
    """Captions 5 and 40 are one and lie on two shards, so do images 9 and 33: of each two, only
    the first is found. On a ring the shard of 40 meets its own before it meets 5."""
    z = jnp.eye(64)
    z_img, z_txt = z.at[33].set(z[9]), z.at[40].set(z[5])
    # what is equal must be found by its images and captions alike
    z_img, z_txt = z_img.at[40].set(z[5]), z_txt.at[33].set(z[9])
    jit, traced = over(sizes)
    got = jit(traced(contrast))(z_img, z_txt, jnp.full(64, 20.0))
    want = plain(z_img, z_txt, jnp.full(64, 20.0))
    assert [float(x) for x in got[1:]] == [float(x) for x in want[1:]] == [62 / 64] * 2


@pytest.mark.parametrize("columns", [16, 5])
def test_chunks_of_columns_change_nothing(monkeypatch, columns):
    """5 does not divide 64: 4 does."""
    arguments = *embeddings(), jnp.float32(50)
    want = value_and_grad(contrast, *arguments)
    monkeypatch.setattr(contrastive, "COLUMNS", columns)
    check_equal(value_and_grad.__wrapped__(contrast, *arguments), want)


SHAPE = re.compile(r"\b(?:pred|[subf]+\d+)\[([\d,]+)\]")


def largest(function, sizes, monkeypatch, columns=1024):
    """Most elements of an array in what one device runs for the gradient; 64 pairs, d = 2."""
    monkeypatch.setattr(contrastive, "COLUMNS", columns)
    jit, traced = over(sizes)
    grad = traced(jax.value_and_grad(lambda *a: function(*a)[0], argnums=(0, 1, 2)))
    z = jax.ShapeDtypeStruct((64, 2), jnp.float32)
    lowered = jit(grad).lower(z, z, jax.ShapeDtypeStruct((64,), jnp.float32))
    shapes = SHAPE.findall(lowered.compile().as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_no_device_holds_more_logits_than_a_shard_by_a_shard(monkeypatch):
    """[8, 64] of a row of shards would have 512 elements, all 64 embeddings 128."""
    assert largest(plain, (1, 1, 1), monkeypatch) >= 64 * 64
    assert largest(contrast, (8, 1, 1), monkeypatch) <= 8 * 8
    assert largest(contrast, (2, 4, 1), monkeypatch) <= 8 * 8
    assert largest(contrast, (1, 1, 1), monkeypatch, columns=8) <= 64 * 8


def test_captions_travel_and_nothing_is_gathered():
    jit, traced = over((1, 8, 1))
    z = jax.ShapeDtypeStruct((64, 2), jnp.float32)
    grad = traced(jax.grad(lambda *a: contrast(*a).loss, argnums=(0, 1)))
    text = jit(grad).lower(z, z, jax.ShapeDtypeStruct((64,), jnp.float32)).compile().as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text and "all-to-all" not in text

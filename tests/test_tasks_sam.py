"""SAM per replica against a loop over replicas, on any mesh."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_cascade
from meshes import within

from dalle2_jax import build
from dalle2_jax.errors import UserError
from dalle2_jax.nets.forward import forward
from dalle2_jax.parallel import sharding
from dalle2_jax.parallel.fsdp import gathering
from dalle2_jax.tasks.shared import sam
from dalle2_jax.tasks.shared.contrastive import contrast

RHO, REPLICA, BATCH = 0.1, 2, 16


def make(**changes):
    changes = {"task__max_shift": 0, "batch_size": BATCH, **changes}
    return build.task(small_cascade.config("clip", **changes))


@pytest.fixture(scope="module")
def params():
    return small_cascade.random_params(make().init, std=0.1)


def toy_encode(params, inputs):
    """Two towers of two layers and a temperature: images [b, 6], texts [b, 5] -> unit [b, 4]."""

    def tower(p, x):
        z = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"][None]) @ p["out"]["kernel"]
        return z / jnp.linalg.norm(z, axis=-1, keepdims=True)

    images, texts = inputs
    scale = jnp.broadcast_to(jnp.exp(params["log_scale"]), images.shape[:1])
    return tower(params["image"], images), tower(params["text"], texts), scale


def toy():
    """(params, inputs) of `toy_encode`; its scale is low, or a replica that tells its two pairs
    apart would have a gradient of rounding alone, and so a direction."""
    rng = np.random.default_rng(0)

    def tower(n):
        layer = {"kernel": rng.normal(size=(n, 8)), "bias": rng.normal(size=8)}
        return {"in": layer, "out": {"kernel": rng.normal(size=(8, 4))}}

    params = {"image": tower(6), "text": tower(5), "log_scale": np.log(3)}
    inputs = rng.normal(size=(BATCH, 6)), rng.normal(size=(BATCH, 5))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, inputs))


def logits_loss(images, z_txt, scale):
    """2103.00020, figure 3, written out; scale [b] serves each row of either direction."""
    dots = images @ z_txt.T
    sides = [scale[:, None] * dots, scale[:, None] * dots.T]
    return -sum(jnp.diagonal(jax.nn.log_softmax(s, axis=1)).mean() for s in sides) / 2


def by_hand(encode, params, inputs, rho, replica):
    """Loss and gradient, replica after replica (2010.01412, equations 2 and 3)."""
    groups = [[x[i : i + replica] for x in inputs] for i in range(0, len(inputs[0]), replica)]
    gradient = jax.jit(jax.grad(lambda p, part: logits_loss(*encode(p, part))))
    moves = []
    for part in groups:
        g = jax.tree.map(np.asarray, gradient(params, part))
        norm = math.sqrt(sum(float(np.sum(x**2)) for x in jax.tree.leaves(g)))
        moves.append(jax.tree.map(lambda x, n=norm: x * np.float32(rho / n), g))

    def loss(p):
        parts = [
            encode(jax.tree.map(jnp.add, p, move), part)
            for move, part in zip(moves, groups, strict=True)
        ]
        return logits_loss(*(jnp.concatenate(side) for side in zip(*parts, strict=True)))

    return jax.jit(jax.value_and_grad(loss))(params)


def on_mesh(sizes, loss, params, inputs):
    """loss(params, inputs) and its gradient as the trainer takes them on that mesh."""
    devices = jax.devices()[: math.prod(sizes)]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), devices)
    rules = ((r"(in|fc1)/kernel", "tensor:-1+fsdp:1"), (".*", "fsdp:1"))
    places = sharding.param_shardings(params, rules, mesh)
    abstract = sharding.with_shardings(params, rules, mesh)

    def gradient(params, inputs):
        with gathering(mesh, abstract):
            return jax.value_and_grad(loss)(params, inputs)

    step = jax.jit(
        within(mesh, gradient),
        in_shardings=(places, sharding.batch_sharding(mesh)),
        out_shardings=(sharding.replicated(mesh), places),
    )
    return step(params, inputs)


def check_gradients(got, want, rtol=1e-5):
    """To rtol of the greatest entry of all: those that cancel have rounding alone."""
    size = max(np.abs(x).max() for x in jax.tree.leaves(want))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * size), got, want
    )


@pytest.fixture(scope="module")
def wanted():
    return by_hand(toy_encode, *toy(), RHO, REPLICA)


MESHES = [(1, 1, 1), (2, 4, 1), (1, 8, 1), (1, 4, 2)]


@pytest.mark.parametrize(
    ("sizes", "recompute"), [*((sizes, False) for sizes in MESHES), ((1, 4, 2), True)]
)
def test_each_replica_has_its_own_way_up(sizes, recompute, wanted):
    def loss(params, inputs):
        out = sam.encode_perturbed(
            toy_encode,
            lambda out: contrast(*out).loss,
            *(params, inputs, RHO, REPLICA),
            recompute=recompute,
        )
        return contrast(*out).loss

    got = on_mesh(sizes, loss, *toy())
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    check_gradients(got[1], wanted[1])


def test_the_replicas_matter(wanted):
    """Neither no move nor one for all gives that loss."""
    params, inputs = toy()
    for other in (
        logits_loss(*toy_encode(params, inputs)),
        by_hand(toy_encode, params, inputs, RHO, BATCH)[0],
    ):
        assert abs(other - wanted[0]) > 5e-3  # the losses above agree to 3e-5


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_clip_at_moved_weights(sizes, params):
    task = make(task__sam_rho=RHO, task__sam_replica_batch=REPLICA)
    batch = small_cascade.batch(BATCH)
    pixels = batch["image"].astype(jnp.float32) / 127.5 - 1

    def encode(p, part):
        images, texts, scale = forward(task.network, p, *part)
        return images, texts, jnp.broadcast_to(scale, len(images))

    want = by_hand(encode, params, (pixels, batch["tokens"]), RHO, REPLICA)
    key = jax.random.key(0)
    got = on_mesh(sizes, lambda p, x: task.loss(p, {}, x, key, True)[0], params, batch)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    check_gradients(got[1], want[1])


def test_clip_loses_rho_times_its_gradient(params):
    """To first order, where one replica is the whole batch: L(w + eps) - L(w) = rho |g|."""
    off, on = make(), make(task__sam_rho=1e-3, task__sam_replica_batch=BATCH)
    batch, key = small_cascade.batch(BATCH), jax.random.key(0)

    @jax.jit
    def run(p):
        base, grads = jax.value_and_grad(lambda p: off.loss(p, {}, batch, key, True)[0])(p)
        moved, metrics = on.loss(p, {}, batch, key, True)
        return moved - base, optax.tree.norm(grads), metrics

    rise, norm, metrics = run(params)
    assert float(rise) == pytest.approx(1e-3 * float(norm), rel=0.05)
    assert all(value.shape == () for value in metrics.values())


def test_nothing_moves_in_evaluation(params):
    """The very program of a task without SAM."""

    def program(task, train):
        batch, key = small_cascade.batch(BATCH), jax.random.key(0)
        loss = jax.jit(lambda p: task.loss(p, {}, batch, key, train)[0])
        return loss.lower(params).as_text()

    on = make(task__sam_rho=RHO, task__sam_replica_batch=REPLICA)
    assert program(on, False) == program(make(), False) != program(on, True)


def test_a_gradient_of_zero_moves_nothing():
    """Its direction is 0 / 0."""
    out = sam.encode_perturbed(
        lambda p, x: x * p["kernel"], jnp.sum, {"kernel": jnp.float32(2)}, jnp.zeros(4), 0.1, 2
    )
    np.testing.assert_array_equal(out, np.zeros(4))


def test_bfloat16_moves_by_rho_on_average():
    """A move of 1e-5 at weights of 1, whose steps are 2^-8 in bfloat16: single weights stay or
    jump, their sum moves as it should."""
    w = jnp.asarray(np.random.default_rng(0).uniform(1, 1.9, 100_000), jnp.float32)
    seen = []

    def encode(p, x):
        seen.append(p["kernel"].dtype)
        return x * jnp.sum(p["kernel"].astype(jnp.float32) - w)

    rho = 1e-5 * math.sqrt(w.size)
    rounded = encode({"kernel": w.astype(jnp.bfloat16)}, jnp.ones(2))
    moved = sam.encode_perturbed(encode, jnp.sum, {"kernel": w}, jnp.ones(2), rho, 2, jnp.bfloat16)
    assert set(seen) == {jnp.dtype("bfloat16")}
    assert float((moved - rounded)[0]) == pytest.approx(1e-5 * w.size, rel=0.5)


def test_batches_that_replicas_do_not_fill_are_refused(params):
    with pytest.raises(
        UserError, match=r"batch_size=16 is not a multiple of config.task.sam_replica_batch=3"
    ):
        make(task__sam_rho=RHO, task__sam_replica_batch=3)
    make(task__sam_replica_batch=3)  # off
    task = make(task__sam_rho=RHO, task__sam_replica_batch=4)
    told = r"config.task.sam_replica_batch=4 must divide the 2 examples that config.batch_size=16"
    with pytest.raises(UserError, match=told):
        on_mesh(
            (2, 4, 1),
            lambda p, x: task.loss(p, {}, x, jax.random.key(0), True)[0],
            *(params, small_cascade.batch(BATCH)),
        )
    with pytest.raises(
        UserError, match=r"config.task.sam_rho must be a finite number from 0, not -1"
    ):
        make(task__sam_rho=-1.0)
    with pytest.raises(
        UserError, match=r"config.task.sam_replica_batch must be a whole number from 2, not 1"
    ):
        dataclasses.replace(task, sam_replica_batch=1)


def test_the_replicas_own_loss_sees_its_pairs_alone():
    """Within a shard the ring has one link."""
    seen = []
    mesh = sharding.make_mesh({"data": 8})

    def loss(out):
        seen.append(out.shape)
        return contrast(out, out, jnp.float32(1)).loss

    def run(p, x):
        return sam.encode_perturbed(lambda p, x: p["kernel"] * x, loss, p, x, 0.1, 2)

    jax.eval_shape(within(mesh, run), {"kernel": jnp.float32(1)}, jnp.ones((16, 3)))
    assert seen == [(2, 3)]

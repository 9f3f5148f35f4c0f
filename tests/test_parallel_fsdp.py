"""Weights gathered layer by layer: rings of a torus, and results that do not depend on the mesh."""

import itertools
import re
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dalle2_jax.parallel import fsdp, sharding
from dalle2_jax.parallel.rings import ring_groups

FSDP = ((".*", "fsdp:1"),)


def torus(*sizes: int) -> list:
    """Chips in the order of their coordinates."""
    return [SimpleNamespace(coords=(*c, *[0] * (3 - len(c)))) for c in np.ndindex(*sizes)]


@pytest.mark.parametrize(
    ("sizes", "rings"),
    [
        ((4, 4), [4, 4]),
        ((8, 8), [8, 8]),
        ((2, 16), [16, 2]),
        ((16, 16), [16, 16]),
        ((4, 4, 4), [4, 4, 4]),
        ((4, 4, 8), [8, 4, 4]),
        ((2, 2), [2, 2]),
    ],
)
def test_a_ring_runs_along_one_dimension(sizes, rings):
    chips = torus(*sizes)
    stages = ring_groups(chips)
    assert [len(groups[0]) for groups in stages] == rings
    for groups in stages:
        assert sorted(itertools.chain(*groups)) == list(range(len(chips)))
        for ring in groups:
            coords = np.array([chips[i].coords for i in ring])
            (dimension,) = np.flatnonzero((coords != coords[0]).any(axis=0))
            assert len(set(coords[:, dimension])) == len(ring)


@pytest.mark.parametrize(
    "chips",
    [
        [SimpleNamespace() for _ in range(4)],  # without coordinates
        torus(8),  # a single ring
        [
            SimpleNamespace(coords=c) for c in [(0, 0), (0, 1), (1, 1), (1, 0)]
        ],  # in the order of a snake
        torus(4) * 2,  # two cores on each chip
        torus(4, 4)[:6],  # no rectangle
        torus(1),
    ],
)
def test_devices_without_rings_are_gathered_at_once(chips):
    assert ring_groups(chips) == [None]


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2), (2, 2, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_gathering_in_stages_is_gathering_at_once(sizes, axis):
    """Scattering gradients, too."""
    spec = P(*["fsdp" if i == axis else None for i in range(2)])
    mesh = sharding.make_mesh({"fsdp": 8})
    x = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    weights = np.random.default_rng(1).standard_normal((8, 16, 24)).astype(np.float32)

    def loss(rings):
        def shard(x, w):
            gathered = fsdp._gather(x, spec, rings)
            return gathered[None], jnp.sum(gathered * w[0])[None]

        def total(x):
            gathered, sums = jax.shard_map(
                shard, mesh=mesh, in_specs=(spec, P("fsdp")), out_specs=P("fsdp"), check_vma=False
            )(x, weights)
            return sums.sum(), gathered

        return jax.jit(jax.grad(total, has_aux=True))(x)

    rings = ring_groups(torus(*sizes))
    assert len(rings) == len(sizes)
    grads, gathered = loss(rings)
    np.testing.assert_array_equal(gathered, np.broadcast_to(x, (8, *x.shape)))
    np.testing.assert_allclose(grads, weights.sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads, loss([None])[0], rtol=1e-5, atol=1e-5)


class Scaled(nn.Module):
    """A layer of two arguments, one of them by name."""

    @nn.compact
    def __call__(self, x, t, *, power: int = 1):
        scale = self.param("scale", nn.initializers.normal(1.0), (x.shape[-1],))
        return x * (1 + scale[None, None]) ** power * t[:, None, None]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        h = nn.Dense(32, name="fc1")(nn.LayerNorm(name="norm")(x))
        h = nn.Dropout(0.5, deterministic=not train)(nn.gelu(h))
        return x + nn.Dense(16, name="fc2")(h), None


class Net(nn.Module):
    """A network with every case that the interceptor must distinguish."""

    remat: bool = False
    scan: bool = True
    odd: bool = True

    @nn.compact
    def __call__(self, tokens, t, train=True):
        x = nn.Embed(24, 16, name="token")(tokens)
        x = Scaled(name="scaled")(x, t, power=2)
        if self.odd:  # a parameter outside of layers, and arrays passed by name
            x += self.param("positions", nn.initializers.normal(1.0), (tokens.shape[1], 16))[None]
            x = Scaled(name="named")(x, t=t)
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        if self.scan:
            block = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=3,
            )
            x, _ = block(name="blocks")(x, train)
        else:
            for i in range(2):
                x, _ = block(name=f"block{i}")(x, train)
        if self.odd:  # a single row, which the shards do not divide
            x += Scaled(name="one")(x[:1], t[:1])
        return nn.Dense(8, name="out", dtype=jnp.float32)(x)


def step(net, sizes, rules=FSDP, devices=8, parts=()):
    """Returns (jitted loss and gradients, arguments) on a mesh of the first `devices` devices.

    With `parts`, the parameters are those of several equal networks, by these names.
    """
    mesh = sharding.make_mesh(sizes, jax.devices()[:devices])
    rng = np.random.default_rng(0)
    tokens, t = rng.integers(0, 24, (16, 8)), rng.uniform(0.5, 1, 16).astype(np.float32)
    keys = jax.random.split(jax.random.key(0))
    params = jax.jit(lambda: net.init({"params": keys[0]}, tokens, t, False))()["params"]
    params = dict.fromkeys(parts, params) if parts else params
    places = sharding.param_shardings(params, rules, mesh)
    template = sharding.with_shardings(params, rules, mesh)

    def loss(params, tokens, t):
        if parts:
            return sum(loss_of(params[part], tokens, t) for part in parts)
        return loss_of(params, tokens, t)

    def loss_of(params, tokens, t):
        out = net.apply({"params": params}, tokens, t, rngs={"dropout": keys[1]})
        return jnp.mean(jnp.square(out))

    def run(params, tokens, t):
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            fsdp.gathering(mesh, *fsdp.network_trees(template)),
        ):
            return jax.value_and_grad(loss)(params, tokens, t)

    rows = sharding.batch_sharding(mesh)
    replicated = sharding.replicated(mesh)
    jitted = jax.jit(run, in_shardings=(places, rows, rows), out_shardings=(replicated, places))
    return jitted, (jax.device_put(params, places), *jax.device_put((tokens, t), rows))


@pytest.fixture
def two_by_four(monkeypatch):
    """Makes the devices of a row look like a torus."""
    sizes = {8: (2, 4), 4: (2, 2), 2: (2,)}
    monkeypatch.setattr(fsdp, "ring_groups", lambda row: ring_groups(torus(*sizes[len(row)])))


@pytest.mark.parametrize(
    "net", [Net(), Net(remat=True), Net(scan=False), Net(True, False)], ids=str
)
def test_loss_and_gradients_are_those_of_one_device(net, two_by_four):
    run, arguments = step(net, {}, devices=1)
    one, one_grads = run(*arguments)
    tensor = ((r"fc1/kernel", "tensor:-1+fsdp:1"), ("fc2/kernel", "tensor:-2+fsdp:1"), *FSDP)
    for sizes, rules in (
        ({"fsdp": 8}, FSDP),
        ({"data": 2, "fsdp": 4}, FSDP),
        ({"data": 2, "fsdp": 2, "tensor": 2}, tensor),
    ):
        run, arguments = step(net, sizes, rules)
        many, grads = run(*arguments)
        np.testing.assert_allclose(many, one, rtol=1e-5)
        for name, g in sharding.flatten(grads).items():
            expected = sharding.flatten(one_grads)[name]
            np.testing.assert_allclose(g, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def collectives(hlo: str) -> dict[str, int]:
    """Counts the collectives of each kind in a compiled program."""
    kinds = re.findall(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", hlo)
    return {kind: kinds.count(kind) for kind in set(kinds)}


@pytest.mark.parametrize("remat", [False, True])
def test_weights_are_gathered_and_gradients_reduce_scattered(remat):
    """Activations stay where they are.

    In the backward pass of the scanned block weights are gathered again: the kernels, or everything
    but the last bias if the block is computed again. Newer compilers (JAX 0.12) also leave in the
    gather of one more bias, which nothing reads.
    """
    run, arguments = step(Net(remat, odd=False), {"fsdp": 8})
    counts = collectives(run.lower(*arguments).compile().as_text())
    assert len(jax.tree.leaves(arguments[0])) == 10
    again = 5 if remat else 2
    assert counts.pop("all-gather") in (10 + again, 11 + again)
    assert counts == {"reduce-scatter": 10, "all-reduce": 1}


def test_two_networks_in_one_tree_gather_their_own_weights():
    """They share the keys of dropout, which does not matter here."""
    with jax.debug_key_reuse(False):
        run, arguments = step(Net(odd=False), {"fsdp": 8}, parts=("first", "last"))
        counts = collectives(run.lower(*arguments).compile().as_text())
    assert counts["reduce-scatter"] == 20 and counts["all-gather"] >= 24
    assert set(counts) == {"reduce-scatter", "all-gather", "all-reduce"}


def test_several_networks_are_distinguished_from_one():
    net = {"up": {"conv": {"kernel": 1}}, "out": {"kernel": 2}}
    assert fsdp.network_trees({"first": net, "last": net}) == [net, net]
    for one in (
        {"only": net},
        {"first": net, "last": {"up": net}},
        {"fc1": {"kernel": 1}, "fc2": {"kernel": 1}},  # layers
        {**net, "scale": 3},
    ):
        assert fsdp.network_trees(one) == [one]

"""Remat by policy: the same gradients from less memory, and names that are told apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_cascade
from small_cascade import randomised

from dalle2_jax import build
from dalle2_jax.errors import UserError
from dalle2_jax.nets import remat as policies
from dalle2_jax.nets.remat import policy_name
from dalle2_jax.nets.transformer import Transformer
from dalle2_jax.nets.unet import UNet

POLICIES = ("none", "dots", "full")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def transformer(remat):
    return Transformer(depth=4, heads=2, remat=remat), (normal(0, 4, 96, 32),)


def unet(remat):
    network = UNet(3, 16, (1, 2), 2, (1,), head_channels=8, groups=4, dropout=0.3, remat=remat)
    return network, (normal(0, 2, 16, 16, 3), normal(1, 2, 8), normal(2, 2, 5, 8), True)


def gradient(make, remat):
    """(compiled gradient of a sum of squares, parameters none of which is zero)"""
    network, inputs = make(remat)
    rngs = {"dropout": jax.random.key(1)}
    shapes = jax.eval_shape(lambda: network.init({"params": jax.random.key(0)} | rngs, *inputs))
    params = randomised(jax.tree.map(lambda x: np.zeros(x.shape), shapes))

    def loss(params, rngs):
        return jnp.square(network.apply(params, *inputs, rngs=rngs)).sum()

    return jax.jit(jax.grad(loss)).lower(params, rngs).compile(), params, rngs


@pytest.fixture(scope="module", params=[transformer, unet], ids=["transformer", "U-Net"])
def gradients(request):
    """policy -> (gradient, bytes of temporary memory)"""
    found = {}
    for name in POLICIES:
        run, params, rngs = gradient(request.param, name)
        found[name] = run(params, rngs), run.memory_analysis().temp_size_in_bytes
    return found


@pytest.mark.parametrize("name", POLICIES[1:])
def test_gradients_are_the_same_with_every_policy(gradients, name):
    want, got = gradients["none"][0], gradients[name][0]
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_less_is_kept_policy_by_policy(gradients):
    none, dots, full = (gradients[name][1] for name in POLICIES)
    assert full < 0.85 * none, (none, dots, full)
    assert full < dots < none, (none, dots, full)


@pytest.mark.parametrize("make", [transformer, unet])
def test_products_with_weights_are_computed_once_with_dots(make, monkeypatch):
    """Counted in the program before XLA: forward, twice for the gradient; attention's once more."""

    def products(remat):
        network, inputs = make(remat)
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        params = jax.eval_shape(lambda: network.init(rngs, *inputs))
        step = jax.grad(lambda p: network.apply(p, *inputs, rngs=rngs).sum())
        return _count(jax.make_jaxpr(step)(params).jaxpr)

    none, dots, full = (products(name) for name in POLICIES)
    assert none["weights"] == dots["weights"] < full["weights"]
    assert none["attention"] < dots["attention"] == full["attention"]


def _count(jaxpr):
    counts = {"weights": 0, "attention": 0}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            counts["weights"] += 1
        elif eqn.primitive.name == "dot_general":
            batched = any(eqn.params["dimension_numbers"][1])
            counts["attention" if batched else "weights"] += 1
        for inner in jax.core.jaxprs_in_params(eqn.params):
            for name, n in _count(inner).items():
                counts[name] += n
    return counts


def test_booleans_of_older_folders_are_policies():
    assert [policy_name(x) for x in (False, True, *POLICIES)] == ["none", "full", *POLICIES]
    assert set(POLICIES) == set(policies.POLICIES)
    for old, new in ((False, "none"), (True, "full")):
        old_run, params, rngs = gradient(unet, old)
        new_run, _, _ = gradient(unet, new)
        temp = [x.memory_analysis().temp_size_in_bytes for x in (old_run, new_run)]
        assert temp[0] == temp[1]
        jax.tree.map(np.testing.assert_array_equal, old_run(params, rngs), new_run(params, rngs))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("ful", "remat: no policy 'ful'; did you mean 'full'?"),
        ("x", "remat: no policy 'x'; known: dots, full, none"),
        (1, "remat: no policy 1; known: dots, full, none"),
    ],
)
def test_an_unknown_policy_is_one_line(given, told):
    with pytest.raises(UserError) as error:
        policy_name(given)
    assert str(error.value) == told


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("clip", "model__image__remat"),
        ("clip", "model__text__remat"),
        ("prior", "model__remat"),
        ("decoder", "model__unet__remat"),
        ("upsampler", "model__unet__remat"),
    ],
)
def test_a_typing_mistake_in_a_config_is_told_before_any_data(folder, stage, key):
    config = small_cascade.config(stage, clip_from=folder, **{key: "dotz"})
    with pytest.raises(UserError, match=r"^remat: no policy 'dotz'; did you mean 'dots'\?$"):
        build.check(config, build.task(config))

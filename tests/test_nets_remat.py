"""Remat by policy: the same gradients from less memory, and names that are told apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_cascade
from jax.extend.core import jaxprs_in_params
from small_cascade import random_params

from dalle2_jax import build
from dalle2_jax.errors import UserError
from dalle2_jax.nets import remat as policies
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.nets.remat import policy_name
from dalle2_jax.nets.transformer import Transformer
from dalle2_jax.nets.unet import UNet

POLICIES = ("none", "dots", "full")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def transformer(remat):
    return Transformer(depth=4, heads=2, remat=remat), (normal(0, 4, 96, 32),)


def unet(remat):
    network = UNet(3, 8, (1,), 1, (0,), head_channels=8, groups=4, dropout=0.3, remat=remat)
    return network, (normal(0, 2, 8, 8, 3), normal(1, 2, 8), normal(2, 2, 5, 8), True)


def squares(make, remat):
    """(a loss, parameters none of which is zero)"""
    network, inputs = make(remat)
    rngs = {"dropout": jax.random.key(1)}
    params = random_params(lambda key: network.init({"params": key} | rngs, *inputs))
    return lambda p: jnp.square(network.apply(p, *inputs, rngs=rngs)).sum(), params


@pytest.mark.parametrize("make", [transformer, unet])
def test_gradients_are_the_same_with_every_policy(make):
    def gradient(remat):
        loss, params = squares(make, remat)
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    want, temp = gradient("none")
    most = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    for name in POLICIES[1:]:
        got, less = gradient(name)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * most)
        if make is transformer and name == "full":  # the U-Net is too small to show it
            assert less < 0.8 * temp


@pytest.mark.parametrize("make", [transformer, unet])
def test_less_is_kept_policy_by_policy(make):
    """Bytes that the forward pass hands to the backward pass."""

    def kept(remat):
        loss, params = squares(make, remat)
        backward = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    none, dots, full = (kept(name) for name in POLICIES)
    assert full < 0.5 * none and full < dots < none, (none, dots, full)


@pytest.mark.parametrize("make", [transformer, unet])
def test_products_with_weights_are_computed_once_with_dots(make):
    """Counted in the program before XLA; attention's own products are computed once more."""

    def products(remat):
        loss, params = squares(make, remat)
        return _count(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

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
        for inner in jaxprs_in_params(eqn.params):
            for name, n in _count(inner).items():
                counts[name] += n
    return counts


def test_booleans_of_older_folders_are_policies():
    assert [policy_name(x) for x in (False, True, *POLICIES)] == ["none", "full", *POLICIES]
    assert set(POLICIES) == set(policies.POLICIES)
    for old, new in ((False, "none"), (True, "full")):
        programs = [
            str(jax.make_jaxpr(jax.grad(loss))(params))
            for loss, params in (squares(unet, remat) for remat in (old, new))
        ]
        assert ("remat" in programs[0] or "checkpoint" in programs[0]) == old
        assert len(programs[0]) == len(programs[1])


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
        ("upsampler", "model__unet__remat"),
    ],
)
def test_a_typing_mistake_in_a_config_is_told_before_any_data(stage, key):
    config = small_cascade.config(stage, **{key: "dotz"})
    with pytest.raises(UserError) as error:
        build.check(config, build.task(config))
    setting = f"config.{key.replace('__', '.')}"
    assert str(error.value) == f"{setting}: no policy 'dotz'; did you mean 'dots'?"


def prior():
    return DiffusionPrior(8, 4, width=8, depth=1, heads=1, remat="dotz")


def text_encoder():
    text = dict(context_length=4, vocab_size=9, width=8, depth=1, heads=1, remat="dotz")
    return Decoder(dict(channels=4, channel_mults=(1,), num_blocks=1, groups=2), 8, 4, text)


@pytest.mark.parametrize("make", [prior, text_encoder])
def test_every_transformer_hears_of_the_policy(make):
    network = make()
    with pytest.raises(UserError, match="'dotz'"):
        jax.eval_shape(lambda: network.init(jax.random.key(0), *network.init_inputs(8)))

"""The tables of names: what they do to tensors, there and back, and what they cannot place."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from dalle2_jax.errors import UserError
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.nets.upsampler import Upsampler
from dalle2_jax.pretrained import names, names_diffusers

RULES = [
    *names.module("blocks.{l}.fc", "blocks.fc", names.DENSE),
    ("up.{~i}.{j}.w", "up{i}_block{j}", names.SAME),
    ("qkv", ["q", "k", "v"], names.MATRIX),
    ("conv", "conv", names.CONV),
    ("ids", (), names.SAME),
]


def theirs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {f"blocks.{i}.fc.weight": rng.normal(size=(5, 4)) for i in range(12)}
    found |= {f"blocks.{i}.fc.bias": rng.normal(size=5) for i in range(12)}
    found |= {f"up.{i}.{j}.w": rng.normal(size=2) for i in range(3) for j in range(2)}
    found |= {"qkv": rng.normal(size=(6, 4)), "conv": rng.normal(size=(2, 3, 5, 7))}
    return found


def ours(given) -> dict[str, np.ndarray]:
    found = names.to_ours(RULES, given, given.__getitem__)
    assert not found.unknown
    return {name: found.tensor(name) for name in found.names}


def theirs_of(rules, params) -> dict[str, np.ndarray]:
    return dict(names.to_theirs(rules, params, params.__getitem__))


def test_layers_are_stacked_in_order_and_ups_are_counted_from_the_end():
    given = theirs()
    found = ours(given)
    assert found["blocks.fc.kernel"].shape == (12, 4, 5)
    for i in (0, 2, 11):  # 10 comes after 9, not after 1
        np.testing.assert_array_equal(
            found["blocks.fc.kernel"][i], given[f"blocks.{i}.fc.weight"].T
        )
    np.testing.assert_array_equal(found["up0_block1"], given["up.2.1.w"])
    np.testing.assert_array_equal(found["up2_block0"], given["up.0.0.w"])
    np.testing.assert_array_equal(found["k"], given["qkv"][2:4].T)
    np.testing.assert_array_equal(found["conv"][4, 6], given["conv"][:, :, 4, 6].T)


def test_there_and_back_is_the_same_bit_for_bit():
    given = theirs()
    back = theirs_of(RULES, ours(given))
    assert sorted(back) == sorted(given)
    for name, tensor in given.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_tokens_that_lie_feature_by_feature_are_turned():
    features = np.arange(12).reshape(4, 3)  # 4 features of 3 tokens
    found = names.feature_major(3).ours(features.reshape(12, 1))
    np.testing.assert_array_equal(found.reshape(3, 4), features.T)
    np.testing.assert_array_equal(names.feature_major(3).theirs(found).ravel(), range(12))


def test_what_no_rule_knows_is_told_and_what_is_known_and_dropped_is_not():
    given = theirs() | {"ids": np.zeros(3), "blocks.0.fc.scale": np.zeros(1)}
    assert names.to_ours(RULES, given, given.__getitem__).unknown == ["blocks.0.fc.scale"]
    with pytest.raises(UserError, match="1 tensors have no place there: other"):
        theirs_of(RULES, {"other": np.zeros(1)})


def test_a_layer_that_is_missing_is_told():
    given = theirs()
    del given["blocks.3.fc.bias"]
    with pytest.raises(UserError, match=r"of blocks.fc.bias there are the layers \[0, 1, 2, 4"):
        ours(given)


@pytest.mark.parametrize("name", ["prior", "upsampler"])
def test_every_parameter_of_a_network_has_one_name_there(name):
    unet = dict(channels=8, channel_mults=(1, 2, 2), num_blocks=2, groups=4, scale_shift=False)
    network, rules = {
        "prior": (DiffusionPrior(8, 5, 16, 3, 2, learned_null=False, standardised=True), "PRIOR"),
        "upsampler": (Upsampler(unet), "UNET"),
    }[name]
    inputs = network.init_inputs(8) if name == "prior" else network.init_inputs()
    params = network.init(jax.random.key(0), *inputs)["params"]
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params, sep=".").items()}
    there = list(names.to_theirs(getattr(names_diffusers, rules), flat, flat.__getitem__))
    assert len(dict(there)) == len(there)
    again = names.to_ours(getattr(names_diffusers, rules), dict(there), dict(there).__getitem__)
    assert sorted(again.names) == sorted(flat) and not again.unknown
    for key, tensor in flat.items():
        np.testing.assert_array_equal(again.tensor(key), tensor)

"""Rules to shardings: known results, and mistakes that must not pass silently."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, np.float32)


PARAMS = {
    "embed": {"kernel": shape(10, 64)},
    "blocks": {"mlp": {"kernel": shape(3, 16, 64), "bias": shape(3, 64)}, "scale": shape(3)},
}


def specs(rules, sizes, params=PARAMS) -> dict[str, P]:
    shardings = sharding.param_shardings(params, rules, sharding.make_mesh(sizes))
    return {name: place.spec for name, place in sharding.flatten(shardings).items()}


def padded(spec: P, ndim: int) -> tuple:
    return tuple(spec) + (None,) * (ndim - len(spec))


@pytest.mark.parametrize(
    ("sizes", "shape_"),
    [
        ({"data": -1}, (8, 1, 1)),
        ({"data": -1, "fsdp": 4}, (2, 4, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 8, "fsdp": 1, "tensor": 1}, (8, 1, 1)),
    ],
)
def test_mesh(sizes, shape_):
    assert tuple(sharding.make_mesh(sizes).shape.values()) == shape_


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"data": -1, "fsdp": 16}, {"data": -1, "fsdp": -1}, {"data": 0}]
)
def test_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(sizes)


def test_fsdp_splits_the_largest_axis_that_divides():
    split = specs(((".*", "fsdp:1"),), {"fsdp": 8})
    assert padded(split["embed/kernel"], 2) == (None, "fsdp")  # 10 does not divide by 8
    assert padded(split["blocks/mlp/kernel"], 3) == (None, None, "fsdp")
    assert padded(split["blocks/mlp/bias"], 2) == (None, "fsdp")
    assert padded(split["blocks/scale"], 1) == (None,)


@pytest.mark.parametrize(
    ("tactic", "split"),
    [
        ("fsdp", {"large"}),
        ("fsdp:8", {"large", "medium", "small"}),
        ("fsdp:9", {"large", "medium"}),
    ],
)
def test_small_arrays_are_not_worth_a_message(tactic, split):
    params = {"large": shape(2**8, 2**10), "medium": shape(2**8, 2**10 - 1), "small": shape(8)}
    results = specs(((".*", tactic),), {"fsdp": 8}, params)
    assert {name for name, spec in results.items() if any(spec)} == split
    assert np.prod(params["large"].shape) == sharding.MIN_SPLIT


def test_the_first_rule_that_matches_decides():
    rules = (
        ("mlp/kernel", "tensor:-2+fsdp:1"),
        (r"bias|scale", "replicate"),
        ("embed", "tensor:1"),
    )
    split = specs(rules, {"data": 2, "fsdp": 2, "tensor": 2})
    assert padded(split["blocks/mlp/kernel"], 3) == (None, "tensor", "fsdp")
    assert padded(split["blocks/mlp/bias"], 2) == (None, None)
    assert padded(split["embed/kernel"], 2) == (None, "tensor")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("embd", "fsdp"), (".*", "fsdp")), r"\('embd', 'fsdp'\) takes no parameter"),
        (((".*", "fsdp"), ("embed", "replicate")), r"\('embed', 'replicate'\) takes no parameter"),
        ((("embed", "fsdp"),), "no rule matches blocks/"),
        (((".*", "fdsp"),), "unknown sharding tactic 'fdsp'"),
        (((".*", "fsdp:x"),), "unknown sharding tactic 'fsdp:x'"),
        (((".*", "tensor:x"),), "unknown sharding tactic"),
        (((".*", 3),), "config.sharding_rules: 3 is no tactic; known: replicate"),
        ((("(", "fsdp"),), r"config.sharding_rules: '\(' is no regular expression"),
        (((".*", "tensor:0"),), r"blocks/mlp/bias \(3, 64\) has no axis 0 that 2"),
        (((".*", "tensor:5"),), "has no axis 5"),
    ],
)
def test_mistakes_are_named(rules, message):
    with pytest.raises(UserError, match=message):
        specs(rules, {"data": 4, "tensor": 2})


def test_optimiser_state_inherits_by_path_and_shape():
    mesh = sharding.make_mesh({"fsdp": 8})
    places = sharding.param_shardings(PARAMS, ((".*", "fsdp:1"),), mesh)
    state = {"count": shape(), "inner": ({"mu": PARAMS}, {"kernel": shape(10, 64)})}
    inherited = sharding.inherit_shardings(state, PARAMS, places, mesh)
    assert inherited["inner"][0]["mu"] == places
    assert not places["embed"]["kernel"].is_fully_replicated
    assert inherited["count"].is_fully_replicated
    assert inherited["inner"][1]["kernel"].is_fully_replicated  # no such path among the parameters


def test_replicated_bytes_fraction():
    mesh = sharding.make_mesh({"fsdp": 8})
    params = {"a": shape(8, 3), "b": jax.ShapeDtypeStruct((4,), np.float16)}
    shardings = sharding.param_shardings(params, ((".*", "fsdp:1"),), mesh)
    assert sharding.replicated_bytes_fraction(params, shardings) == pytest.approx(8 / (96 + 8))
    assert sharding.replicated_bytes_fraction({}, {}) == 0.0


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = jax.device_put(np.arange(8.0), sharding.batch_sharding(mesh))
    assert {s.data.shape for s in batch.addressable_shards} == {(2,)}


def test_a_large_model_that_is_not_split_is_refused(monkeypatch):
    mesh = sharding.make_mesh({"fsdp": 8})
    tree = {"w": jax.ShapeDtypeStruct((9, 100_003), np.float32)}
    params = sharding.with_shardings(tree, ((".*", "fsdp"),), mesh)
    sharding.check_split(params, mesh)  # 3.6 MB are not large
    monkeypatch.setattr(sharding, "LARGE_MODEL", 2**20)
    with pytest.raises(UserError, match=r"100 % .* w \(9, 100003\).* fsdp \(now 8\)"):
        sharding.check_split(params, mesh)
    split = {"w": jax.ShapeDtypeStruct((8, 100_003), np.float32)}
    sharding.check_split(sharding.with_shardings(split, ((".*", "fsdp"),), mesh), mesh)

"""Long attention: chunks of queries and the TPU's kernel against one einsum."""

import contextlib
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tolerance import BFLOAT16

from dalle2_jax.nets import chunked
from dalle2_jax.nets.attention import LONG, attention, attention_by_einsum, without_kernels
from dalle2_jax.nets.chunked import attention_by_chunks
from dalle2_jax.nets.flash import flash_attention
from dalle2_jax.nets.transformer import causal_mask
from dalle2_jax.parallel import sharding


def inputs(b, n, m, heads, d, dtype=jnp.float32):
    rng = np.random.default_rng(n * m + d)
    return [jnp.asarray(rng.standard_normal((b, length, heads, d)), dtype) for length in (n, m, m)]


def with_gradients(function, q, k, v, *mask):
    """The output, and the gradients of a sum that weighs every element differently."""

    @jax.jit
    def run(q, k, v):
        out, backward = jax.vjp(lambda q, k, v: function(q, k, v, *mask), q, k, v)
        weights = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return out, *backward(weights.astype(out.dtype))

    return [np.asarray(x, np.float32) for x in run(q, k, v)]


def assert_equal(got, want, rtol=2e-6):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def random_mask(b, n, m):
    mask = np.random.default_rng(0).random((b, 1, n, m)) < 0.5
    mask[:, :, -1] = False  # sees nothing: averages
    return jnp.asarray(mask)


MASKS = {
    "none": lambda b, n, m: (),
    "of each example and query": lambda b, n, m: (random_mask(b, n, m),),
    "of each example": lambda b, n, m: (random_mask(b, 3, m)[:, :, :1],),
    "of each query": lambda b, n, m: (random_mask(1, n, m),),
    "causal": lambda b, n, m: (causal_mask(max(n, m))[:, :, :n, :m],),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n", [7, 8, 29], ids=lambda n: f"{n} queries")
def test_chunks_equal_the_einsum(mask, n, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 8)
    args = [*inputs(2, n, 11, 3, 4), *MASKS[mask](2, n, 11)]
    assert_equal(
        with_gradients(attention_by_chunks, *args), with_gradients(attention_by_einsum, *args)
    )


@pytest.mark.parametrize("masked", [False, True])
def test_long_attention_equals_the_einsum(masked):
    args = inputs(1, LONG + 88, LONG + 101, 2, 8)
    args += [random_mask(1, LONG + 88, LONG + 101)] if masked else []
    assert_equal(with_gradients(attention, *args), with_gradients(attention_by_einsum, *args))


def test_long_attention_keeps_logits_in_float32():
    """As the einsum's: of bfloat16 inputs both round the weights and the output alone.

    Logits of up to 39, which bfloat16 would round by up to 0.06, and the weights by 6 %.
    """
    q, k, v = inputs(1, LONG, 40, 1, 8, jnp.bfloat16)
    got, want = (function(8 * q, k, v) for function in (attention, attention_by_einsum))
    assert got.dtype == want.dtype == jnp.bfloat16
    largest = float(jnp.abs(v).max())  # that of their averages is no larger
    np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), atol=2 * BFLOAT16 * largest
    )


def test_chunks_hold_few_logits():
    args = inputs(1, LONG, 2 * LONG, 4, 8)
    logits = 4 * LONG * 2 * LONG * 4  # bytes

    def temp(function):
        step = jax.grad(lambda *x: jnp.square(function(*x)).sum(), argnums=(0, 1, 2))
        return jax.jit(step).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temp(attention_by_einsum) > logits > temp(attention)


@pytest.mark.parametrize("n", [LONG - 1, LONG])
def test_short_attention_is_one_einsum_on_every_platform(n):
    program = str(jax.make_jaxpr(attention)(*inputs(1, n, 3, 1, 8)))
    assert ("platform_index" in program) == (n >= LONG)


def test_kernels_are_for_the_tpu_without_a_mask_of_queries_and_can_be_left_out():
    args = inputs(1, LONG, 3, 1, 8)

    def kernels(*args):
        return str(jax.make_jaxpr(lambda *x: attention(*x))(*args)).count("pallas_call")

    assert kernels(*args) == 1
    assert kernels(*args, random_mask(1, 3, 3)[:, :, :1]) == 1
    assert kernels(*args, causal_mask(LONG)[:, :, :, :3]) == 0
    assert kernels(*inputs(1, LONG, 3, 1, 256)) == 0
    with without_kernels():
        assert kernels(*args) == 0
        with contextlib.suppress(ValueError), without_kernels():
            raise ValueError
        assert kernels(*args) == 0
    assert kernels(*args) == 1


@pytest.mark.parametrize("masks", [0, 1, 2])
@pytest.mark.parametrize(("n", "m", "d"), [(128, 128, 64), (200, 130, 16), (520, 1540, 8)], ids=str)
def test_the_kernel_equals_the_einsum(n, m, d, masks):
    """Interpreted. The last has several blocks of queries and of keys."""
    args = inputs(max(masks, 1), n, m, 2, d)
    args += [random_mask(masks, 3, m)[:, :, :1]] if masks else []
    kernel = functools.partial(flash_attention, interpret=True)
    with jax.numpy_rank_promotion("allow"):  # JAX's own code
        got = with_gradients(kernel, *args)
    assert_equal(got, with_gradients(attention_by_einsum, *args), rtol=1e-5)


MESHES = [{"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_long_attention_on_a_mesh_stays_on_its_shards(sizes, masked):
    """Rows split over the batch's axes, heads over the others where they divide: no exchange."""
    mesh = sharding.make_mesh(sizes)
    args = inputs(4, LONG, 5, 2, 4)
    args += [random_mask(4, 1, 5)] if masked else []
    want = attention_by_einsum(*args)

    def run(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # as the trainer traces its steps
            return attention(*args)

    heads = "tensor" if sizes["tensor"] == 2 else None
    rows = sharding.batch_sharding(mesh)
    place = NamedSharding(mesh, PartitionSpec(*rows.spec, None, heads))
    places = [place] * 3 + [rows] * masked
    compiled = jax.jit(run, in_shardings=places, out_shardings=place).lower(*args).compile()
    for exchange in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert exchange not in compiled.as_text()
    np.testing.assert_allclose(compiled(*jax.device_put(args, places)), want, atol=2e-6)


@pytest.mark.parametrize("b", [3, 4])
def test_gradients_of_long_attention_on_a_mesh(b):
    """Of 3 rows, which the mesh does not divide, each device computes all."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    args = inputs(b, LONG, 5, 2, 4)
    want = with_gradients(attention_by_einsum, *args)
    with jax.set_mesh(mesh):
        args = jax.device_put(args, sharding.replicated(mesh))
        assert_equal(with_gradients(attention, *args), want)


def test_within_a_shard_attention_does_not_split_again():
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    args = inputs(2, LONG, 5, 4, 4)
    want = attention_by_einsum(*args)
    with jax.set_mesh(mesh):
        split = PartitionSpec("data")
        local = jax.shard_map(
            attention, in_specs=split, out_specs=split, axis_names={"data"}, check_vma=False
        )
        got = jax.jit(local)(*args)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_kernel_saves_memory_on_tpu(gradient, masked):
    """The paper's decoder at 32 px: 1,024 pixels that look at themselves and 260 tokens."""
    mesh = sharding.make_mesh({"data": 2, "tensor": 2}, tpu_devices("v5e:2x2"))
    place = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    q, k = (
        jax.ShapeDtypeStruct((16, n, 32, 64), jnp.bfloat16, sharding=place) for n in (1024, 1284)
    )  # 8 examples of 16 heads a chip

    rows = NamedSharding(mesh, PartitionSpec("data"))
    mask = [jax.ShapeDtypeStruct((16, 1, 1, 1284), bool, sharding=rows)] * masked

    def run(q, k, v, *mask):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out, backward = jax.vjp(lambda *x: attention(*x, *mask), q, k, v)
        return backward(out) if gradient else out

    def compiled():
        fast = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}
        return jax.jit(lambda *x: run(*x)).lower(q, k, k, *mask).compile(compiler_options=fast)

    with_kernel = compiled()
    with without_kernels():
        without = compiled()
    assert "tpu_custom_call" in with_kernel.as_text()
    assert "tpu_custom_call" not in without.as_text()
    temp = [x.memory_analysis().temp_size_in_bytes for x in (with_kernel, without)]
    assert 4 * temp[0] < temp[1], temp


def tpu_devices(name):
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may compile too
    topologies = pytest.importorskip("jax.experimental.topologies")
    pytest.importorskip("libtpu")
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices

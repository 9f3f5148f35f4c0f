"""FLOPs by shapes, against sums by hand and over every pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.aot import flops
from dalle2_jax.nets.attention import LONG, attention
from dalle2_jax.nets.layers import conv3x3


def test_padding_is_what_fills_the_tiles():
    def product(m, k, n):
        return flops.padding(lambda a, b: a @ b, jnp.ones((m, k)), jnp.ones((k, n)))

    assert product(256, 128, 384) == 0
    assert product(256, 64, 384) == 1  # half of what is summed up is zeros
    assert product(4096, 128, 320) == pytest.approx(0)  # 320 rows against 4096 columns
    assert product(8, 128, 96) == pytest.approx(128 / 96 - 1)

    def conv3x3(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    for channels, waste in ((256, 0), (192, (256 / 192) ** 2 - 1), (320, (384 / 320) ** 2 - 1)):
        shapes = jnp.ones((2, 4, 4, channels)), jnp.ones((3, 3, channels, channels))
        assert flops.padding(conv3x3, *shapes) == pytest.approx(waste)


def test_a_product_is_two_a_multiply_add():
    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 7))
    assert flops.of_function(lambda a, b: a @ b, a, b) == 2 * 3 * 4 * 5 * 7


def test_a_scan_counts_its_length_and_inner_jits_count():
    def scanned(x):
        step = jax.jit(lambda x: x @ x)
        return jax.lax.scan(lambda x, _: (step(x), None), x, None, length=6)[0]

    assert flops.of_function(scanned, jnp.ones((8, 8))) == 6 * 2 * 8**3


def test_of_two_ways_the_dearer_counts_unless_platforms_choose():
    ways = lambda x: x @ x @ x, lambda x: x @ x
    x = jnp.ones((8, 8))
    assert flops.of_function(lambda x: jax.lax.cond(x[0, 0] > 0, *ways, x), x) == 2 * 2 * 8**3
    by_platform = dict(cpu=ways[0], default=ways[1])
    assert flops.of_function(lambda x: jax.lax.platform_dependent(x, **by_platform), x) == 2 * 8**3


@pytest.mark.parametrize("n", [LONG - 1, LONG])
def test_attention_is_two_products_and_four_behind_them_at_any_length(n):
    """Neither a kernel, whose products no jaxpr shows, nor what it computes twice makes it less or
    more; also where the same function was jitted and run before."""
    q, k = jnp.ones((1, n, 2, 16)), jnp.ones((1, 3, 2, 16))

    @jax.jit
    def loss(q, k, v):
        return attention(q, k, v).sum()

    def both(*args):
        return jax.value_and_grad(loss, (0, 1, 2))(*args)

    before = both(q, k, k)
    assert flops.of_function(loss, q, k, k) == 2 * (2 * 2 * n * 3 * 16)
    assert flops.of_function(both, q, k, k) == 6 * (2 * 2 * n * 3 * 16)
    jax.tree.map(np.testing.assert_array_equal, both(q, k, k), before)  # and runs as before


@pytest.mark.parametrize(
    ("stride", "padding", "dilate"), [(1, "SAME", 1), (2, "VALID", 1), (1, ((2, 1), (0, 3)), 2)]
)
def test_a_convolution_counts_what_meets_an_input(stride, padding, dilate):
    x, kernel = jnp.ones((2, 9, 6, 3)), jnp.ones((3, 2, 3, 5))

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            padding,
            (dilate, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    # of ones each output is the number of multiply-adds that made it
    assert flops.of_function(conv, x, kernel) == 2 * float(conv(x, kernel).sum())


def test_a_backward_pass_costs_two_forward_ones_more():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    forward = flops.of_function(lambda x, w: x @ w, x, w)
    both = jax.grad(lambda x, w: (x @ w).sum(), argnums=(0, 1))
    assert flops.of_function(both, x, w) == 3 * forward


def test_what_remat_computes_again_is_counted():
    w = jnp.ones((8, 8))

    def loss(w, x):
        return jnp.sum(jnp.sin(jnp.sin(x @ w) @ w))

    plain = flops.of_function(jax.grad(loss), w, jnp.ones((4, 8)))
    again = flops.of_function(jax.grad(jax.checkpoint(loss)), w, jnp.ones((4, 8)))
    assert plain < again <= 2 * plain


def test_where_platforms_differ_the_cheapest_way_counts():
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 6))
    forward = flops.of_function(conv3x3, x, kernel)
    assert forward == 2 * np.square(22) * 2 * 4 * 6
    both = jax.grad(lambda x, k: conv3x3(x, k).sum(), argnums=(0, 1))
    assert flops.of_function(both, x, kernel) == 3 * forward

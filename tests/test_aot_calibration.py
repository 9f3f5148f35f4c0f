"""What is read off real TPU programs, compiled for one chip; needs libtpu, no TPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from dalle2_jax.aot.chips import open_slice
from dalle2_jax.aot.hlo import Program
from dalle2_jax.aot.report import QUICKLY, compile_for, measure

pytestmark = pytest.mark.tpu_aot
ONE_CHIP = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1")


def compiled(topology, function, *args):
    """(the slice, `function` at bfloat16 arguments of these shapes, compiled for its first chip)"""
    pytest.importorskip("libtpu")
    where = open_slice(topology)
    place = SingleDeviceSharding(where.devices[0])
    shapes = [jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=place) for sizes in args]
    return where, compile_for(jax.jit(function).lower(*shapes), QUICKLY)


def seconds(where, program):
    found = measure(
        program,
        program,
        where,
        batch_size=1,
        num_params=0,
        kinds={},
        analytic_flops=1,
        ideal_collective_bytes=0,
    )
    return found.seconds


def stack(unroll):
    """8 dense layers, in a loop or one after the other."""

    def run(x, ws):
        return jax.lax.scan(lambda x, w: (jax.nn.gelu(x @ w), None), x, ws, unroll=unroll)[0]

    return run


@pytest.mark.parametrize("topology", ONE_CHIP)
def test_a_loop_takes_as_long_as_its_layers_one_after_the_other(topology):
    sizes = (1024, 8192), (8, 8192, 8192)
    where, loop = compiled(topology, stack(1), *sizes)
    _, flat = compiled(topology, stack(8), *sizes)
    by_compiler = flat.cost_analysis()["optimal_seconds"]
    assert loop.cost_analysis()["optimal_seconds"] < 0.5 * by_compiler  # counts the body once
    assert seconds(where, loop)["optimal"] == pytest.approx(by_compiler, rel=0.25)


@pytest.mark.parametrize("topology", ONE_CHIP)
def test_flops_of_convolutions_are_the_compilers_own(topology):
    def network(x, first, second):
        for kernel, stride in ((first, 1), (second, 2)):
            x = jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jnp.maximum(x, 0)
        return x

    _, program = compiled(topology, network, (4, 32, 32, 64), (3, 3, 64, 128), (3, 3, 128, 256))
    assert Program(program.as_text()).flops() == pytest.approx(
        program.cost_analysis()["flops"], rel=0.05
    )


@pytest.mark.parametrize("topology", ONE_CHIP)
def test_one_chip_means_all_its_cores(topology):
    where, program = compiled(topology, jnp.matmul, (4096, 4096), (4096, 4096))
    at_peak = 2 * 4096**3 / where.chip.flops
    # The compiler takes a v5p's clock for 1.5 GHz, the vendor's peak means 1.75.
    assert program.cost_analysis()["optimal_seconds"] == pytest.approx(at_peak, rel=0.2)

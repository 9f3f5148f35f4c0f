"""What a TPU holds of the state, by its own compiler: donated whole, and less of it offloaded."""

import os

import jax
import jax.numpy as jnp
import pytest
from toy_task import ToyTask, config

from dalle2_jax.parallel import sharding
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.state import abstract_state
from dalle2_jax.train.step import make_train_step

pytestmark = pytest.mark.tpu_aot
QUICKLY = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}
WIDTH, DEPTH, CHIPS = 1024, 16, 4
PART = DEPTH * WIDTH**2 * 4 // CHIPS  # bytes a chip of the parameters, and of each copy of them
SMALL = 16 * 1024  # counters, and what they are padded to


class Wide(ToyTask):
    """Layers of whole tiles, so that nothing is padded."""

    def init(self, key):
        init = jax.nn.initializers.lecun_normal()
        keys = jax.random.split(key, DEPTH)
        return {f"layer{i}": {"kernel": init(k, (WIDTH, WIDTH))} for i, k in enumerate(keys)}

    def frozen(self):
        return {}

    def loss(self, params, frozen, batch, key, train):
        x = jax.random.normal(key, (len(batch["image"]), WIDTH))
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"])
        loss = jnp.mean(x**2)
        return loss, {}


@pytest.fixture(scope="module")
def chips():
    """Of a TPU that is not there."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


def memory(chips, **changes):
    """The compiler's account of a chip's memory in a train step."""
    cfg = config(mesh=dict(data=1, fsdp=-1), sharding_rules=((".*", "fsdp:1"),), **changes)
    mesh = sharding.make_mesh(cfg.mesh, chips)
    task, optimizer = Wide(), make_optimizer(cfg.optimizer, 10)
    template = abstract_state(task, optimizer, 0, mesh, cfg.sharding_rules, cfg.offload)
    rows = sharding.batch_sharding(mesh)
    batch = {"image": jax.ShapeDtypeStruct((16, 4, 4, 3), jnp.uint8, sharding=rows)}
    step = make_train_step(task, optimizer, cfg, template, mesh)
    return step.lower(template, {}, batch).compile(compiler_options=QUICKLY).memory_analysis()


def test_the_state_is_donated_whole(chips):
    """Parameters, EMA and two moments are updated where they lie."""
    found = memory(chips)
    assert 0 <= found.alias_size_in_bytes - 4 * PART < SMALL
    assert 0 <= found.argument_size_in_bytes - 4 * PART < 4 * SMALL


@pytest.mark.parametrize(("names", "parts"), [("ema", 1), ("ema,optimizer", 3)])
def test_what_is_offloaded_lies_in_the_hosts_memory(chips, names, parts):
    found = memory(chips, offload=names)
    assert 0 <= found.host_argument_size_in_bytes - parts * PART < SMALL
    assert 0 <= found.argument_size_in_bytes - (4 - parts) * PART < 4 * SMALL
    assert found.host_alias_size_in_bytes == found.host_argument_size_in_bytes


def total(found) -> int:
    """Bytes that a step needs of a chip, what is fetched from the host included."""
    own = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + own + found.temp_size_in_bytes


@pytest.mark.parametrize(("names", "parts"), [("ema", 1), ("ema,optimizer", 3)])
def test_what_is_offloaded_is_not_fetched_all_at_once(chips, names, parts):
    spared = total(memory(chips)) - total(memory(chips, offload=names))
    assert spared > 0.6 * parts * PART


def test_first_moments_in_bfloat16_are_half(chips):
    found = memory(chips, optimizer=dict(mu_dtype="bfloat16"))
    assert 0 <= found.alias_size_in_bytes - 3.5 * PART < SMALL

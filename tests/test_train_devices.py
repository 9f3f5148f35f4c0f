"""Every stage, with its frozen parts, trains alike on one device and on eight."""

import jax
import numpy as np
import pytest
import small_cascade

from dalle2_jax import build, sharding
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.state import abstract_state, init_state
from dalle2_jax.train.step import global_batch, make_train_step, place_frozen


def losses(config, devices: int, sizes: dict[str, int], steps: int = 3) -> list[float]:
    """Of the first steps on the first `devices` devices."""
    mesh = sharding.make_mesh(sizes, jax.devices()[:devices])
    task, optimizer = build.task(config), make_optimizer(config.optimizer, steps)
    template = abstract_state(task, optimizer, config.seed, mesh, config.sharding_rules)
    state = init_state(task, optimizer, config.seed, template)
    step = make_train_step(task, optimizer, config, template, mesh)
    frozen, found = place_frozen(task.frozen(), mesh), []
    for _ in range(steps):
        state, metrics = step(state, frozen, global_batch(small_cascade.batch(8), mesh))
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["clip", "prior", "decoder", "upsampler"])
def test_losses_are_those_of_one_device(stage, tmp_path):
    """CLIP's logits are of the global batch, the decoder's CLIP and its own weights are split."""
    clip = small_cascade.write(tmp_path, ["clip"])
    # eps: where a gradient is 0 but for rounding, Adam must not make a step of it
    optimizer = dict(learning_rate=1e-2, eps=1e-3, warmup_steps=0)
    config = small_cascade.config(stage, clip, batch_size=8, optimizer=optimizer)
    one = losses(config, 1, {})
    eight = losses(config, 8, {"data": 2, "fsdp": 4})
    np.testing.assert_allclose(one, eight, rtol=1e-5)
    assert len(set(one)) == 3

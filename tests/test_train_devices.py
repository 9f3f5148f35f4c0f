"""Every stage, with its frozen parts, trains alike on one device and on eight."""

import re

import jax
import numpy as np
import optax
import pytest
import small_cascade

from dalle2_jax import build
from dalle2_jax.parallel import sharding
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.state import abstract_state, init_state
from dalle2_jax.train.step import global_batch, make_train_step, place_frozen

FSDP = ((".*", "fsdp:1"),)
WITH_TENSOR = ((r"/(q|k|v|fc1|conv1|emb)/kernel", "tensor:-1+fsdp:1"), *FSDP)
# With dropout, whose noise is that of the whole batch on any mesh.
CHANGES = {"decoder": dict(model__unet__dropout=0.3)}


def run(config, devices: int, sizes: dict[str, int], steps: int = 3):
    """Of the first steps on the first `devices` devices: losses, the first gradient, the names of
    parameters that are split, the program as the compiler gets it and as it returns it."""
    mesh = sharding.make_mesh(sizes, jax.devices()[:devices])
    task, optimizer = build.task(config), make_optimizer(config.optimizer, steps)
    template = abstract_state(task, optimizer, config.seed, mesh, config.sharding_rules)
    state = init_state(task, optimizer, config.seed, template)
    batch = global_batch(small_cascade.batch(8), mesh)
    frozen, losses, grads = place_frozen(task.frozen(), mesh), [], None
    lowered = make_train_step(task, optimizer, config, template, mesh).lower(state, frozen, batch)
    step = lowered.compile()
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        if grads is None:  # the first moment is 1 - b1 of it
            grads = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    places = {name: x.sharding.spec for name, x in sharding.flatten(template.params).items()}
    split = [name for name, spec in places.items() if "fsdp" in spec]
    return losses, sharding.flatten(grads), split, lowered.as_text(), step.as_text()


def owned_by_layers(names) -> int:
    """How many parameters are of layers, which gather them, not of what is made of layers (learned
    positions and the like, which the compiler gathers), nor fitted, without a gradient."""
    names = [f"/{name}" for name in names if not name.startswith("statistics/")]
    folders = {name.rpartition("/")[0] for name in names}
    inner = {f for f in folders if any(other.startswith(f"{f}/") for other in folders)}
    return sum(name.rpartition("/")[0] not in inner for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["clip", "prior", "ar_prior", "decoder", "upsampler"])
def test_eight_devices_train_as_one(stage, tmp_path):
    """CLIP's logits are of the global batch, the decoder's CLIP and its own weights are split."""
    clip = small_cascade.write(tmp_path, ["clip"])
    # eps: where a gradient is 0 but for rounding, Adam must not make a step of it
    common = dict(batch_size=8, optimizer=dict(learning_rate=1e-2, eps=1e-3, warmup_steps=0))
    common |= CHANGES.get(stage, {})
    one, one_grads, *_ = run(small_cascade.config(stage, clip, **common), 1, {})
    assert len(set(one)) == 3
    for rules, sizes in (
        (FSDP, {"data": 2, "fsdp": 4}),
        (WITH_TENSOR, {"data": 2, "fsdp": 2, "tensor": 2}),
    ):
        config = small_cascade.config(stage, clip, sharding_rules=rules, **common)
        eight, grads, split, given, made = run(config, 8, sizes)
        np.testing.assert_allclose(one, eight, rtol=1e-5)
        largest = max(np.abs(g).max() for g in one_grads.values())
        for name, g in grads.items():
            np.testing.assert_allclose(g, one_grads[name], rtol=1e-4, atol=1e-5 * largest)
        assert given.count("stablehlo.reduce_scatter") == owned_by_layers(split)
        assert not re.search(r"\ball-to-all", made)

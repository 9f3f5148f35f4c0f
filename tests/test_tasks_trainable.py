"""Task.trainable: one step of training moves what is trained, and nothing else by a bit."""

import jax
import numpy as np
import pytest
import small_cascade
from small_cascade import KARLO, batch, config, randomised

from dalle2_jax import build
from dalle2_jax.parallel import sharding
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.state import abstract_state, init_state
from dalle2_jax.train.step import global_batch, make_train_step, place_frozen

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip") / "model"
    return small_cascade.written_with(folder, KARLO, ["clip"])


CASES = {
    "ar_prior": ({}, "statistics/"),
    "prior": (KARLO["prior"], ("mean", "std")),
    "upsampler": ({**KARLO["upsampler"], "task__learns": ("last",)}, "first/"),
}


@pytest.mark.parametrize("stage", CASES)
def test_a_step_leaves_what_is_not_trained(stage, clip_folder):
    changes, untrained = CASES[stage]
    optimizer = dict(learning_rate=0.1, weight_decay=0.5, warmup_steps=0)
    cfg = config(stage, clip_folder, optimizer=optimizer, **changes)
    task = build.task(cfg)
    opt = make_optimizer(cfg.optimizer, cfg.num_steps, task.trainable)
    mesh = sharding.make_mesh(cfg.mesh)
    template = abstract_state(task, opt, 0, mesh, cfg.sharding_rules)
    state = init_state(task, opt, 0, template)
    weights = randomised(jax.device_get(state.params))
    copies = (jax.tree.map(np.array, weights) for _ in range(2))
    state = state.replace(params=next(copies), ema_params=next(copies))
    frozen = place_frozen(task.frozen(), mesh)
    step = make_train_step(task, opt, cfg, template, mesh)
    state, metrics = step(state, frozen, global_batch(jax.device_get(batch()), mesh))
    assert metrics["skipped"] == 0
    before = sharding.flatten(weights)
    moved = set()
    for tree in (state.params, state.ema_params):
        for path, leaf in sharding.flatten(jax.device_get(tree)).items():
            assert task.trainable(path) is not path.startswith(untrained)
            if not task.trainable(path):
                np.testing.assert_array_equal(leaf, before[path], err_msg=path)
            elif (leaf != before[path]).any():
                moved.add(path)
    assert len(moved) > len([path for path in before if task.trainable(path)]) / 2

"""The average and the optimiser's state in the hosts' memory: the same run."""

import jax
import numpy as np
import pytest
from toy_task import ToyTask, config, dataset, losses

from dalle2_jax import build
from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.storage import model_folder
from dalle2_jax.train import loop
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.state import abstract_state

RULES = ((".*", "fsdp:1"),)


def run(workdir, steps=(6,), **changes):
    """Trains on eight devices, in as many runs as there are `steps` to stop at."""
    given = dict(mesh=dict(fsdp=4), sharding_rules=RULES, preview_every=3, eval_every=3)
    for num_steps in steps:
        cfg = config(num_steps=num_steps, **given, **changes)
        result = loop.train(cfg, ToyTask(), dataset(), workdir, eval_dataset=dataset(8))
    return result.state


def assert_near(a, b) -> None:
    """Equal but for the rounding of what is fused otherwise."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def kinds(tree) -> set[str]:
    """Memories in which the arrays of `tree` lie, but for scalars."""
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_and_weights_are_those_without(tmp_path, accumulate):
    optimizer = dict(accumulate=accumulate)
    plain = run(tmp_path / "plain", optimizer=optimizer)
    assert kinds(plain) == {"device"}
    for names in ("ema", "ema, optimizer"):
        workdir = tmp_path / names
        moved = run(workdir, steps=(3, 6), offload=names, optimizer=optimizer)  # by a checkpoint
        assert kinds(moved.params) == {"device"} and kinds(moved.ema_params) == {"pinned_host"}
        assert kinds(moved.opt_state) == {"pinned_host" if "opt" in names else "device"}
        told, alone = losses(workdir), losses(tmp_path / "plain")
        assert sorted(told) == sorted(alone)
        np.testing.assert_allclose(list(told.values()), list(alone.values()), rtol=1e-6)
        assert_near(moved, plain)
        # a run that was stopped on the way ends as one that was not, bit for bit
        whole = run(tmp_path / f"{names} at once", offload=names, optimizer=optimizer)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(moved), strict=True):
            np.testing.assert_array_equal(a, b)
        hashes = [
            model_folder.weights_hash(w / "model") for w in (workdir, tmp_path / f"{names} at once")
        ]
        assert hashes[0] == hashes[1]


def test_a_run_may_begin_to_offload(tmp_path):
    plain = run(tmp_path / "plain")
    run(tmp_path / "moved", steps=(3,))
    moved = run(tmp_path / "moved", offload="optimizer")
    assert kinds(moved.opt_state) == {"pinned_host"} and kinds(moved.ema_params) == {"device"}
    assert_near(moved, plain)


def test_a_bad_step_is_left_out_there_too(tmp_path):
    """The average of the first good step alone, as the second one was bad."""
    states = []
    for names in ("", "ema,optimizer"):
        cfg = config(num_steps=2, offload=names, mesh=dict(fsdp=4), sharding_rules=RULES)
        data = dataset(poison_at=[1])
        states.append(loop.train(cfg, ToyTask(), data, tmp_path / (names or "plain")).state)
    assert [int(state.faults.skipped) for state in states] == [1, 1]
    assert [int(state.step) for state in states] == [2, 2]
    assert_near(*states)


def test_a_warm_start_is_offloaded_too(tmp_path):
    plain = run(tmp_path / "first")
    folder = str(tmp_path / "first" / "model")
    rate = dict(learning_rate=0.0)
    moved = run(tmp_path / "w", steps=(1,), offload="ema", init_from=folder, optimizer=rate)
    assert kinds(moved.ema_params) == {"pinned_host"}
    np.testing.assert_allclose(
        moved.ema_params["out"]["kernel"], plain.ema_params["out"]["kernel"], rtol=1e-6
    )


def test_mistakes_are_told(monkeypatch):
    with pytest.raises(UserError, match=r"config.offload: unknown key 'emma'; .* 'ema'"):
        build.check(config(offload="emma"), ToyTask())
    cfg = config()
    mesh = sharding.make_mesh(cfg.mesh)
    opt = make_optimizer(cfg.optimizer, 1)
    monkeypatch.setattr("dalle2_jax.train.state.HOST_MEMORY", "memory_of_none")
    with pytest.raises(UserError, match=r"config.offload: .* has no memory_of_none memory"):
        abstract_state(ToyTask(), opt, 0, mesh, RULES, "ema")

"""Gradients that are no good: skipped, counted, and after many in a row back to a checkpoint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_task import ToyTask, config, dataset, losses

from dalle2_jax.parallel import sharding
from dalle2_jax.train import loop
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.recovery import Recovery
from dalle2_jax.train.state import abstract_state, init_state
from dalle2_jax.train.step import global_batch, make_train_step

pytestmark = pytest.mark.usefixtures("one_device")


class Loud(ToyTask):
    """A white batch gives a large gradient, not one that is not finite."""

    def loss(self, params, frozen, batch, key, train):
        loss, metrics = super().loss(params, frozen, batch, key, train)
        again = jnp.mean(params["out"]["kernel"] ** 2) * 1e8
        return jnp.where(jnp.isfinite(loss), loss, again), metrics


class Steep(ToyTask):
    """A white batch gives a gradient, and with it a norm, that float32 cannot hold."""

    def loss(self, params, frozen, batch, key, train):
        loss, metrics = super().loss(params, frozen, batch, key, train)
        again = jnp.mean(params["out"]["kernel"]) * 3e38
        return jnp.where(jnp.isfinite(loss), loss, again * 1e-30 + again), metrics


def equal(a, b) -> bool:
    return all(
        np.array_equal(x, y, equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def stepper(task=None, **changes):
    """(first state, batch number -> state after it) of the bare step; states stay alive."""
    cfg, task = config(**changes), task or ToyTask()
    opt, mesh = make_optimizer(cfg.optimizer, cfg.num_steps), sharding.make_mesh({})
    template = abstract_state(task, opt, 0, mesh, cfg.sharding_rules)
    run = make_train_step(task, opt, cfg, template, mesh)
    frozen = jax.device_put(task.frozen())

    def step(state, batch, white=False):
        images = next(dataset(poison_at={batch} if white else ())(batch))
        return run(jax.tree.map(jnp.copy, state), frozen, global_batch(images, mesh))

    return init_state(task, opt, 0, template), step


@pytest.mark.parametrize(
    ("task", "limit"),
    [(ToyTask(), 0.0), (Loud(), 1e5), (Steep(), 0.0)],
    ids=["nan", "large", "inf"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_step_changes_counters_alone(task, limit, accumulate):
    state, step = stepper(task, max_grad_norm=limit, optimizer=dict(accumulate=accumulate))
    for batch in range(3):
        state, metrics = step(state, batch)
        assert metrics["skipped"] == 0
    after, metrics = step(state, 3, white=True)
    assert metrics["skipped"] == 1
    for part in ("params", "ema_params", "opt_state"):
        assert equal(getattr(after, part), getattr(state, part)), part
    assert (int(after.step), int(after.good_steps), int(after.position)) == (4, 3, 4)
    twice, _ = step(after, 4, white=True)
    assert [int(twice.faults.skipped), int(twice.faults.in_a_row)] == [2, 2]
    good, metrics = step(twice, 5)
    assert [int(good.faults.skipped), int(good.faults.in_a_row)] == [2, 0]
    assert metrics["skipped"] == 0 and not equal(good.opt_state, state.opt_state)


def test_below_the_limit_a_large_gradient_is_applied():
    state, step = stepper(Loud(), max_grad_norm=0.0)
    after, metrics = step(state, 0, white=True)
    assert metrics["skipped"] == 0 and metrics["grad_norm"] > 1e5
    assert not equal(after.params, state.params)


def test_the_average_and_the_schedule_count_good_steps():
    """With accumulation the average moves when an update is made, also after a skipped step."""
    settings = dict(accumulate=2, warmup_steps=4)
    state, step = stepper(optimizer=settings)
    state, _ = step(state, 0)
    state, metrics = step(state, 1, white=True)
    rate = float(metrics["learning_rate"])
    after, metrics = step(state, 2)  # the second good batch: an update
    assert float(metrics["learning_rate"]) == rate
    assert not equal(after.params, state.params)
    assert not equal(after.ema_params, state.ema_params)
    _, metrics = step(after, 3)
    assert float(metrics["learning_rate"]) == pytest.approx(2 * rate)


def lines(workdir) -> list[dict]:
    """Those of steps and rollbacks."""
    told = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in told if "checkpoint" not in line]


def test_a_few_bad_batches_cost_their_steps_alone(tmp_path):
    bad = {3, 4, 8}
    result = loop.train(config(), ToyTask(), dataset(poison_at=bad), tmp_path)
    assert result.step == 12 and int(result.state.faults.skipped) == 3
    told = {line["step"]: line for line in lines(tmp_path)}
    assert {step - 1 for step, line in told.items() if line["skipped"]} == bad
    assert {step for step, line in told.items() if "loss" not in line} == {4, 5, 9}
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"8", "12"}  # 4 was not good: nothing would go back there


def test_ten_in_a_row_go_back_and_the_log_replays_the_run(tmp_path):
    bad = set(range(9, 19))  # batches, from 0: steps 10 to 19
    result = loop.train(config(num_steps=24), ToyTask(), dataset(poison_at=bad), tmp_path)
    event = {"step": 8, "event": "rollback", "from": 19, "to": 8, "skipped_batches": [8, 19]}
    assert result.step == 24 and [x for x in lines(tmp_path) if "event" in x] == [event]
    assert [x["step"] for x in lines(tmp_path) if "loss" in x] == list(range(1, 25))
    # from the log alone: which batch each step of the surviving way was trained on
    batches, position = [], 0
    for line in lines(tmp_path):
        if "event" in line:
            position = line["skipped_batches"][1]
        else:
            batches.append(position)
            position += 1
    assert batches == [*range(8), *range(19, 35)]
    state, step = stepper(num_steps=24)
    told = losses(tmp_path)
    for number, batch in enumerate(batches, 1):
        passed_over = jnp.int32(batch + 1 - number)
        state = state.replace(faults=state.faults.replace(passed_over=passed_over))
        state, metrics = step(state, batch)
        assert float(metrics["loss"]) == told[number]
    assert equal(state.params, result.state.params)


def test_the_devices_need_not_be_waited_for(tmp_path, monkeypatch):
    """Metrics that are read late change nothing but when the host knows."""

    class Late(Recovery):
        def __init__(self, *given, lag):
            super().__init__(*given, lag=3)

    bad = {2, *range(9, 19)}
    cfg = config(num_steps=24, checkpoint_every=10)
    at_once = loop.train(cfg, ToyTask(), dataset(poison_at=bad), tmp_path / "at_once")
    monkeypatch.setattr(loop, "Recovery", Late)
    late = loop.train(cfg, ToyTask(), dataset(poison_at=bad), tmp_path / "late")
    assert equal(late.state, at_once.state) and int(late.state.faults.passed_over) == 19
    assert losses(tmp_path / "late") == losses(tmp_path / "at_once")


def test_broken_parameters_are_never_saved(tmp_path):
    """A good gradient, and a rate at which its update overflows."""
    cfg = config(optimizer=dict(learning_rate=1e38), checkpoint_every=1)
    with pytest.raises(loop.Diverged, match=r"param_norm inf at step 1: .* 3 returns"):
        loop.train(cfg, ToyTask(), dataset(), tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_what_was_stopped_among_bad_steps_goes_on_as_if_it_was_not(tmp_path):
    bad = set(range(9, 19))

    def run(name, steps):
        return loop.train(
            config(num_steps=steps), ToyTask(), dataset(poison_at=bad), tmp_path / name
        )

    whole = run("whole", 24)
    for steps in (11, 14, 17, 24):  # 11, 14 and 17 end, and are saved, among bad steps
        parts = run("parts", steps)
    assert equal(parts.state, whole.state)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert [x for x in lines(tmp_path / "parts") if "event" in x] == [
        x for x in lines(tmp_path / "whole") if "event" in x
    ]


def test_without_a_checkpoint_it_goes_back_to_the_start(tmp_path):
    cfg = config(max_skips=2, num_steps=3)
    result = loop.train(cfg, ToyTask(), dataset(poison_at={1, 2}), tmp_path)
    assert result.step == 3 and int(result.state.position) == 6
    event = next(x for x in lines(tmp_path) if "event" in x)
    assert (event["to"], event["skipped_batches"]) == (0, [0, 3])


def test_it_ends_where_going_back_does_not_help(tmp_path):
    cfg = config(max_skips=2)
    with pytest.raises(loop.Diverged, match=r"loss nan.* at step 6: .* 3 returns"):
        loop.train(cfg, ToyTask(), dataset(poison_at=range(6, 1000)), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    again = loop.train(config(), ToyTask(), dataset(), tmp_path)
    assert again.step == 12 and all(np.isfinite(x).all() for x in jax.tree.leaves(again.state))


def test_checkpoints_of_a_way_that_was_given_up_are_no_more(tmp_path):
    """Saved among bad steps (a stop), then gone back: step 8 is saved anew when it is reached."""
    bad = {5, 6, 7, 8}

    def run(steps):
        cfg = config(num_steps=steps, max_skips=4)
        return loop.train(cfg, ToyTask(), dataset(poison_at=bad), tmp_path)

    for steps in (6, 7, 8):  # saved as by stops: what a run goes back to must stay
        run(steps)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"4", "7", "8"}
    result = run(12)
    assert result.step == 12 and int(result.state.position) == 17
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"8", "12"}

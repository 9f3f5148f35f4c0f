"""Schedules, masks, clipping and the moving average against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerance import BFLOAT16, EPS
from toy_task import config

from dalle2_jax.errors import UserError
from dalle2_jax.train.optimizer import decay_mask, ema_update, make_optimizer, make_schedule


def optimizer(num_steps: int = 100, **changes):
    return make_optimizer(config(optimizer=changes).optimizer, num_steps)


def settings(**changes):
    return config(optimizer=changes).optimizer


def test_warm_up_then_constant():
    schedule = make_schedule(settings(learning_rate=1.0, warmup_steps=4), 10)
    np.testing.assert_allclose(
        [schedule(n) for n in range(6)], [0.2, 0.4, 0.6, 0.8, 1, 1], rtol=4 * EPS
    )


def test_cosine_ends_at_zero_after_warm_up():
    schedule = make_schedule(settings(learning_rate=2.0, warmup_steps=2, schedule="cosine"), 12)
    np.testing.assert_allclose([schedule(n) for n in (2, 7, 12)], [2.0, 1.0, 0.0], atol=1e-6)


def test_unknown_schedule_is_refused():
    with pytest.raises(UserError, match=r"config.optimizer.schedule='cosin' is unknown"):
        optimizer(schedule="cosin")


def test_unknown_dtype_of_moments_is_refused():
    with pytest.raises(UserError, match=r"config.optimizer.mu_dtype='bfloat61' is unknown; use"):
        optimizer(mu_dtype="bfloat61")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_first_moments_in_bfloat16_train_nearly_alike(accumulate):
    """A rounding of 2^-9 at most in each moment, of which b1 = 0.9 stays in the next: of slowly
    changing moments the roundings add up to 2^-9 / (1 - b1)."""
    key = jax.random.key(0)
    start = {"w": jax.random.normal(key, (64, 8))}
    found = {}
    for dtype in ("float32", "bfloat16"):
        opt = optimizer(mu_dtype=dtype, learning_rate=1e-2, accumulate=accumulate)
        params, state = start, opt.tx.init(start)
        for _ in range(20):
            updates, state = opt.tx.update({"w": jnp.sin(params["w"])}, state, params)
            params = optax.apply_updates(params, updates)
        assert optax.tree.get(state, "mu")["w"].dtype == dtype
        assert optax.tree.get(state, "nu")["w"].dtype == "float32"
        found[dtype] = params["w"] - start["w"]
    apart = optax.tree.norm(found["bfloat16"] - found["float32"])
    assert 0 < apart < BFLOAT16 / (1 - 0.9) * optax.tree.norm(found["float32"])


def test_decay_spares_vectors_biases_and_scales():
    params = {
        "dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "blocks": {"scale": jnp.ones((4, 3)), "bias": jnp.ones((4, 3)), "kernel": jnp.ones((4, 3))},
        "temperature": jnp.ones(()),
    }
    assert decay_mask(params) == {
        "dense": {"kernel": True, "bias": False},
        "blocks": {"scale": False, "bias": False, "kernel": True},
        "temperature": False,
    }


def test_decay_spares_vectors_with_leading_axes_of_one():
    mask = decay_mask({"query": jnp.ones((1, 1, 8)), "positions": jnp.ones((4, 8))})
    assert mask == {"query": False, "positions": True}


def test_what_is_not_trained_is_kept_to_the_bit():
    """By any gradient, weight decay, and the rounding of moving averages."""
    params = {"a": {"kernel": jnp.full((2, 3), 0.3)}, "b": {"kernel": jnp.full((2, 3), 0.3)}}
    settings = config(optimizer=dict(learning_rate=0.1, weight_decay=0.5)).optimizer
    opt = make_optimizer(settings, 10, trainable=lambda path: not path.startswith("b/"))
    state, ema, now = opt.tx.init(params), params, params
    for step in range(1, 4):
        grads = opt.without_untrained(jax.tree.map(lambda p: p + 1, now))
        updates, state = opt.tx.update(grads, state, now)
        now = optax.apply_updates(now, updates)
        ema = ema_update(ema, now, 0.9, False, jnp.int32(step), opt)
    for tree in (now, ema):
        np.testing.assert_array_equal(tree["b"]["kernel"], params["b"]["kernel"])
        assert (tree["a"]["kernel"] != params["a"]["kernel"]).all()


def test_first_update_of_adamw():
    """With zero moments Adam's first step is lr * sign(grad); decay adds lr * wd * weight."""
    opt = optimizer(learning_rate=0.1, weight_decay=0.5, clip_norm=0.0, eps=1e-12)
    params = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full((2,), 2.0)}
    grads = {"kernel": jnp.array([[3.0, -4.0], [3.0, -4.0]]), "bias": jnp.array([1.0, -1.0])}
    updates, _ = opt.tx.update(grads, opt.tx.init(params), params)
    # 1 - b2 = 0.001 in float32 has a relative error of EPS / 0.002, of which the root halves it.
    error = 0.1 * EPS / 0.004
    np.testing.assert_allclose(updates["kernel"], [[-0.1 - 0.1, 0.1 - 0.1]] * 2, atol=error)
    np.testing.assert_allclose(updates["bias"], [-0.1, 0.1], atol=error)


def test_clipping_is_by_the_global_norm():
    opt = optimizer(clip_norm=1.0, b1=0.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, state = opt.tx.update(grads, opt.tx.init(params), params)
    moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose([moment["a"][0], moment["b"][0]], [0.6, 0.8], rtol=1e-6)


def test_schedule_counts_updates_not_batches():
    opt = optimizer(learning_rate=1.0, warmup_steps=3, accumulate=2, clip_norm=0.0, eps=1e-12)
    params = {"w": jnp.zeros(1)}
    state, moves = opt.tx.init(params), []
    for _ in range(6):
        updates, state = opt.tx.update({"w": jnp.ones(1)}, state, params)
        moves.append(float(updates["w"][0]))
    np.testing.assert_allclose(moves, [0, -0.25, 0, -0.5, 0, -0.75], atol=1e-4)
    assert [opt.num_updates(step) for step in range(5)] == [0, 0, 1, 1, 2]


def average(values, decay: float, warmup: bool, accumulate: int = 1) -> list[float]:
    opt, ema, found = optimizer(accumulate=accumulate), {"w": jnp.zeros(())}, []
    for step, value in enumerate(values, 1):
        ema = ema_update(ema, {"w": jnp.float32(value)}, decay, warmup, jnp.int32(step), opt)
        found.append(float(ema["w"]))
    return found


def test_moving_average_known_values():
    np.testing.assert_allclose(average([8, 8, 8], 0.5, False), [4, 6, 7], rtol=4 * EPS)


def test_moving_average_warms_up():
    first = 1 - 2 / 11  # (1 + 1) / (10 + 1) of the start, which is 0
    second = 3 / 12 * first + 9 / 12
    np.testing.assert_allclose(average([1, 1], 0.999, True), [first, second], rtol=1e-6)
    np.testing.assert_allclose(average([8, 8], 0.1, True), average([8, 8], 0.1, False), rtol=1e-6)


def test_moving_average_moves_with_updates_only():
    np.testing.assert_allclose(average([8, 8, 8, 8], 0.5, False, 2), [0, 4, 4, 6], rtol=4 * EPS)


def test_moving_average_of_what_stays_is_the_same_bit_for_bit():
    """As a prior's statistics, which are no weights."""
    opt, still = optimizer(), {"w": jnp.asarray(np.random.default_rng(0).normal(size=999), "f4")}
    ema = jax.jit(lambda e, n: ema_update(e, still, 0.7, False, n, opt))(still, jnp.int32(1))
    np.testing.assert_array_equal(ema["w"], still["w"])


def test_accumulate_must_be_positive():
    with pytest.raises(UserError, match=r"config.optimizer.accumulate must be .*, not 0"):
        optimizer(accumulate=0)


def test_state_shapes_need_no_memory():
    opt = optimizer()
    huge = {"w": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}
    assert optax.tree.get(jax.eval_shape(opt.tx.init, huge), "mu")["w"].shape == (2**20, 2**20)

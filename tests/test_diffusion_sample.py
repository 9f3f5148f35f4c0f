"""The loop: whose noise is whose, and what the network is told of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle2_jax.diffusion import sample, schedules, solvers
from dalle2_jax.types import Denoiser

S = schedules.respace(schedules.cosine(1000), 8)
SHAPE = (4, 4, 3)


def network(x_t: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.tanh(x_t) * (1 - t[:, None, None, None] / 2000)


def denoiser() -> Denoiser:
    return sample.denoiser_from(S, network, "eps", ("static", 1.0))


def run(keys: jax.Array, name: str = "ddpm") -> jax.Array:
    solver = solvers.make_solver(name, S)
    return sample.sample(solver, denoiser(), sample.init_noise(keys, SHAPE), keys, S)


jitted_run = jax.jit(run, static_argnums=1)
init_noise = jax.jit(sample.init_noise, static_argnums=1)
step_noise = jax.jit(sample.step_noise, static_argnums=2)


def keys_of(seed: int, n: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize("name", ["ddpm", "dpm++"])  # with noise, and with memory
def test_an_example_is_the_same_alone_and_in_any_batch(name: str) -> None:
    together = jitted_run(keys_of(0, 6), name)
    # To rounding: vector units compute the last elements of an array in another way. Of x_0 at the
    # first step, which is divided by sqrt(abar), it may have 1e-3, of which little is kept.
    turned = jitted_run(keys_of(0, 6)[::-1], name)
    np.testing.assert_allclose(turned, together[::-1], atol=1e-4)
    for i in (0, 5):
        alone = jitted_run(keys_of(0, 6)[i : i + 1], name)
        np.testing.assert_allclose(alone, together[i : i + 1], atol=1e-4)
    assert jnp.abs(together[0] - together[1]).max() > 0.1


def test_an_example_is_the_same_on_any_number_of_devices() -> None:
    devices = jax.devices()
    assert len(devices) > 1, "conftest.py sets their number"
    keys = keys_of(1, 2 * len(devices))
    spread = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
    many = jitted_run(jax.device_put(keys, spread))
    np.testing.assert_allclose(many, jitted_run(keys), atol=1e-4)


def test_the_noise_of_steps_and_of_the_start_differ() -> None:
    keys = keys_of(2, 2)
    drawn = [init_noise(keys, (500,))] + [step_noise(keys, t, (500,)) for t in (0, 1)]
    flat = np.stack([d for noise in drawn for d in np.asarray(noise)])
    correlation = np.corrcoef(flat) - np.eye(6)
    assert np.abs(correlation).max() < 0.25
    np.testing.assert_array_equal(drawn[1], step_noise(keys, jnp.int32(0), (500,)))


def test_noise_handed_in_is_in_the_order_of_sampling() -> None:
    keys = keys_of(3, 3)
    x_T = init_noise(keys, SHAPE)
    noise = jnp.stack([step_noise(keys, t, SHAPE) for t in range(7, -1, -1)])
    solver = solvers.DDPM(S)
    f = jax.jit(lambda x_T, z: sample.sample(solver, denoiser(), x_T, None, 8, noise=z))
    np.testing.assert_allclose(f(x_T, noise), jitted_run(keys), atol=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "dpm++"])  # with noise, and with memory
def test_chunks_of_steps_make_the_whole(name: str) -> None:
    keys = keys_of(4, 2)
    solver = solvers.make_solver(name, S)
    chunk = jax.jit(lambda *args: sample.advance(solver, denoiser(), *args))
    state = sample.begin(solver, init_noise(keys, SHAPE))
    for first, count in ((7, 5), (2, 2), (0, 1)):
        state = chunk(state, first, count, keys)
    assert chunk._cache_size() == 1
    np.testing.assert_allclose(state.x_t, jitted_run(keys, name), atol=1e-6)


def test_the_network_is_told_its_own_time() -> None:
    seen = []

    def spy(x_t: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
        return x_t

    x_T = jnp.zeros((2, 5))
    f = jax.jit(lambda k: sample.sample(solvers.DDIM(S), sample.denoiser_from(S, spy), x_T, k, S))
    f(keys_of(5, 2)).block_until_ready()
    jax.effects_barrier()
    assert all(t.dtype == np.int32 for t in seen)
    np.testing.assert_array_equal(seen, np.stack([S.timesteps[::-1]] * 2, axis=1))

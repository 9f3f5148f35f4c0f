"""Parts that the tasks of all diffusion stages share: sampler, loss, known parts, entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.diffusion import guidance
from dalle2_jax.diffusion.guidance import Apply
from dalle2_jax.diffusion.losses import sample_t, training_losses
from dalle2_jax.diffusion.process import Process
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import masks
from dalle2_jax.sampling.settings import Settings
from dalle2_jax.sampling.stage import StageSampler
from dalle2_jax.types import Array, Metrics
from dalle2_jax.validation.sections import construct, to_json_values

Sampler = TypeVar("Sampler", bound=StageSampler)


def make_sampler(
    cls: type[Sampler],
    config: Any,
    network: nn.Module,
    process: Process,
    measured: bool = False,
    **options: Any,
) -> Sampler:
    """Returns the sampler of previews and of the exported model, by `config.task.sampling`.

    What variance="analytic" needs is known only at the end of training, and only if it is
    `measured`; previews do without it. Raises UserError for settings that `process` cannot be
    sampled with, now rather than after training.
    """
    where = "config.task.sampling"
    settings = construct(Settings, config.task.get("sampling") or {}, where)
    if settings.variance == "analytic":
        if not measured:
            message = f'{where}.variance="analytic" is a prior\'s alone, whose training measures it'
            raise UserError(message)
        # Previews only: the exported entry takes the settings from the config, with "analytic".
        settings = dataclasses.replace(settings, variance="small")
    try:
        # Tried on a dummy, since Settings does not know the rules of clipping.
        guidance.threshold(jax.numpy.zeros((1, 1)), settings.clip)
        return cls(network, process, settings, **options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def denoising_loss(
    process: Process, apply: Apply, x_0: Array, key: Array, times: range | None = None
) -> tuple[Array, Metrics]:
    """Returns the mean loss at random t, and the metrics `mse` (and `vb`).

    The t of a batch are stratified: each is uniform, together they cover time evenly, so that the
    loss varies less from batch to batch.

    Args:
        apply: (x_t, t) -> the network's raw output.
        x_0: [b, ...].
        times: the t to train at; None: all.
    """
    key_t, key_noise = jax.random.split(key)
    times = range(process.num_timesteps) if times is None else times
    # `times` is a range of step 1, so its start and length say all.
    t = times.start + sample_t(key_t, x_0.shape[0], len(times), stratified=True)
    noise = jax.random.normal(key_noise, x_0.shape)
    losses = training_losses(
        process.training_schedule(),
        apply,
        x_0,
        t,
        noise,
        kind=process.prediction,
        learned_variance=process.learned_variance,
        weighting=process.weighting,
    )
    metrics = {name: value.mean() for name, value in losses.items() if name != "loss"}
    return losses["loss"].mean(), metrics


def known_in_part(
    key: Array, x_0: Array, nothing_known: float, most_moved: float = 0.0
) -> tuple[Array, Array]:
    """Makes known parts of images for training a network that inpaints.

    A share `nothing_known` of the images is given as entirely unknown. Half of the others are moved
    by up to `most_moved` of their sides: an extended canvas holds such parts.

    Args:
        x_0: [b, h, w, 3].

    Returns:
        (the images to be un-noised [b, h, w, 3], what the network is given of them [b, h, w, 4]).
    """
    key_mask, key_nothing, key_moved = jax.random.split(key, 3)
    b, size = x_0.shape[:2]
    # One number decides both:  [0, nothing_known) nothing is known,  [.., (1 + nothing_known) / 2)
    # known in place,  [.., 1) known and moved. So what is entirely unknown never moves.
    place = jax.random.uniform(key_nothing, (b, 1, 1, 1))
    if most_moved:
        moves = place >= (1 + nothing_known) / 2
        x_0 = jnp.where(moves, masks.random_shifts(key_moved, x_0, most_moved), x_0)
    mask = jnp.where(place >= nothing_known, masks.random_known_masks(key_mask, b, size), 0)
    return x_0, masks.partly_known(x_0, mask)


def stage_entry(config: Any, **extra: Any) -> Mapping[str, Any]:
    """Returns a diffusion stage's entry in `config.json`: what builds and samples it again."""
    sections = ("model", "diffusion")
    return {name: to_json_values(config[name]) for name in sections} | {
        "sampling": to_json_values(config.task.get("sampling") or {}),
        **to_json_values(extra),
    }

"""What the tasks of all diffusion stages share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax import masks
from dalle2_jax.diffusion import guidance
from dalle2_jax.diffusion.guidance import Apply
from dalle2_jax.diffusion.losses import sample_t
from dalle2_jax.diffusion.process import Process
from dalle2_jax.errors import UserError
from dalle2_jax.options import construct, plain
from dalle2_jax.sampling.stage import Settings, StageSampler
from dalle2_jax.types import Array, Metrics

Sampler = TypeVar("Sampler", bound=StageSampler)


def make_sampler(
    cls: type[Sampler], config: Any, network: nn.Module, process: Process, **options: Any
) -> Sampler:
    """How previews, and later the exported model, are drawn: with `config.task.sampling`.

    Raises UserError for what `process` cannot be sampled with: told now, not after training.
    """
    where = "config.task.sampling"
    settings = construct(Settings, config.task.get("sampling") or {}, where)
    if settings.variance == "analytic":  # known at the end of training alone
        settings = dataclasses.replace(settings, variance="small")
    try:
        guidance.threshold(jax.numpy.zeros((1, 1)), settings.clip)
        return cls(network, process, settings, **options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def denoising_loss(
    process: Process, apply: Apply, x_0: Array, key: Array, times: range | None = None
) -> tuple[Array, Metrics]:
    """Mean loss at random t, of all or of `times`, of x_0 [b, ...]; and the metrics `mse` (and
    `vb`).

    The t of a batch are stratified: each is uniform, together they cover time evenly, so that
    the loss varies less from batch to batch.
    """
    key_t, key_noise = jax.random.split(key)
    times = range(process.num_timesteps) if times is None else times
    t = times.start + sample_t(key_t, x_0.shape[0], len(times), stratified=True)
    noise = jax.random.normal(key_noise, x_0.shape)
    losses = process.losses(apply, x_0, t, noise)
    metrics = {name: value.mean() for name, value in losses.items() if name != "loss"}
    return losses["loss"].mean(), metrics


def known_in_part(key: Array, x_0: Array, nothing_known: float) -> Array:
    """Pictures [b, h, w, 3] -> [b, h, w, 4]: what of them a network for inpainting is told, by
    random masks; nothing of a share `nothing_known` of them, which are drawn as any."""
    key_mask, key_nothing = jax.random.split(key)
    b, size = x_0.shape[:2]
    mask = masks.random_masks(key_mask, b, size)
    told = jax.random.uniform(key_nothing, (b, 1, 1, 1)) >= nothing_known
    return masks.partly_known(x_0, jnp.where(told, mask, 0))


def stage_entry(config: Any, **extra: Any) -> Mapping[str, Any]:
    """A diffusion stage's entry in `config.json`: what builds and samples it again."""
    sections = ("model", "diffusion")
    return {name: plain(config[name]) for name in sections} | {
        "sampling": plain(config.task.get("sampling") or {}),
        **plain(extra),
    }

"""Sampling z_img code by code from a caption (unCLIP section 2.2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.nets.ar_prior import ARPrior
from dalle2_jax.nets.forward import forward
from dalle2_jax.sampling.prior import nearest_to
from dalle2_jax.sampling.stage import Events, StepsDone
from dalle2_jax.types import Array, Params
from dalle2_jax.validation.checks import LARGEST, number


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling of the codes; a model's defaults are in its folder's `config.json`.

    Attributes:
        temperature: of the codes; 0 takes the likeliest.
        top_p: samples from the likeliest codes that together have this probability; 1: from all.
        cfg_scale: guidance scale; 1 is off.
        dot_share: the dot product with z_txt, which is sampled first, comes from the highest share
            of its predicted distribution, for images that fit their caption better. The paper found
            the top half (0.5) best of 0.5, 0.3, 0.15 and 0.05.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    cfg_scale: float = 1.0
    dot_share: float = 0.5

    def __post_init__(self) -> None:
        for name, least, most in (
            ("temperature", 0, LARGEST),
            ("top_p", 1e-6, 1),
            ("cfg_scale", -LARGEST, LARGEST),
            ("dot_share", 1e-6, 1),
        ):
            number(name, getattr(self, name), least, most)


def top_share(logits: Array, share: float) -> Array:
    """Logits [b, k] of the highest `share` of a distribution over k rising values.

    The value on the bound keeps the part of its probability that lies above it.
    """
    p = jax.nn.softmax(logits, axis=-1)
    from_here = jnp.cumsum(p[:, ::-1], axis=-1)[:, ::-1]  # this value's and all higher ones'
    # from_here - p is the mass of all higher values. While it is below `share` a value keeps its
    # probability, or what is left of the share; beyond it, log 0 = -inf. Not normalised, which
    # sampling does not need.
    return jnp.log(jnp.clip(share - (from_here - p), 0.0, p))


def nucleus(logits: Array, top_p: float) -> Array:
    """Logits [b, k] without the unlikely values beyond a probability of `top_p` (1904.09751)."""
    if top_p >= 1:
        return logits
    p = jax.nn.softmax(logits, axis=-1)
    # Sort, add up, and sort back: argsort(order) is the inverse permutation. mass_above counts only
    # what is likelier, hence is 0 for the likeliest value, which therefore always stays.
    order = jnp.argsort(-p, axis=-1)
    mass = jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1)
    mass_above = jnp.take_along_axis(mass, jnp.argsort(order, axis=-1), axis=-1) - p
    return jnp.where(mass_above < top_p, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class ARPriorSampler:
    """Samples several z_img and keeps the one with the largest dot product with z_txt."""

    network: ARPrior
    settings: Settings
    candidates: int = 2
    unit_length: bool = True  # of z_img, as its CLIP has it
    stage: ClassVar[str] = "ar_prior"
    SETTINGS: ClassVar = Settings
    ENTRY_OPTIONS: ClassVar = {"candidates": 2}
    needs_clip: ClassVar[bool] = True

    @property
    def rows(self) -> int:
        """Number of samples for one image."""
        return self.candidates

    @property
    def evaluations(self) -> int:
        """Number of network evaluations for a batch: one for the captions, one a code."""
        return 1 + self.network.dims

    def __call__(
        self,
        params: Params,
        cond: Mapping[str, Any],
        keys: Array,
        noise: None = None,
        known: None = None,
    ) -> Events[Array]:
        """Samples z_img float32 [b, dim].

        Progress moves once: all codes are sampled in one program.

        Args:
            cond: the encoding of b captions (`TextEncoding._asdict`); the network learned a null.
            keys: typed keys [b].
            noise, known: unused.
        """
        del noise, known
        steps = self.network.dims
        yield StepsDone(0, steps)  # it compiles: a progress bar shows meanwhile
        z_img = sample_z_img(self, params, cond, keys)
        yield StepsDone(steps, steps, z_img)
        return z_img


# The settings are static here, unlike a diffusion stage's: another temperature compiles anew.
@functools.partial(jax.jit, static_argnums=0)
def sample_z_img(
    sampler: ARPriorSampler, params: Params, cond: Mapping[str, Array], keys: Array
) -> Array:
    """Samples z_img float32 [b, dim], see `ARPriorSampler`."""
    b, k = keys.shape[0], sampler.candidates
    keys = jax.vmap(lambda key: jax.random.split(key, k))(keys).reshape(b * k)
    cond_rows = jax.tree.map(lambda a: jnp.repeat(a, k, axis=0), cond)
    # [b k, 1 + dims]; the rows of one caption are neighbours, as `nearest_to` expects.
    codes = sample_codes(sampler, params, cond_rows, keys)
    z = forward(sampler.network, params, codes, method="to_z_img")
    return nearest_to(cond["z_txt"], z, sampler.unit_length)


def sample_codes(
    sampler: ARPriorSampler, params: Params, cond: Mapping[str, Array], keys: Array
) -> Array:
    """Samples codes int32 [b, 1 + dims] for b captions, from typed keys [b].

    Row i of the result depends on row i of its inputs alone.
    """
    network, settings = sampler.network, sampler.settings
    guided = settings.cfg_scale != 1
    text = [cond[name] for name in ("z_txt", "txt_enc", "txt_mask")]
    if guided:  # the rows again, without their captions
        # An empty txt_mask is "no caption": the network then puts its null in place of z_txt.
        null = [*text[:2], jnp.zeros_like(text[2])]
        text = [jnp.concatenate(pair) for pair in zip(text, null, strict=True)]

    def guide(logits: Array) -> Array:
        if not guided:
            return logits
        # [2 b, buckets] -> [b, buckets] each. The result is log p_null (p_cond / p_null)^w, not
        # normalised.
        cond_logp, null_logp = jnp.split(jax.nn.log_softmax(logits, axis=-1), 2)
        return null_logp + settings.cfg_scale * (cond_logp - null_logp)

    def pick(logits: Array, place: Array | int) -> Array:
        # A row's noise comes from its own key and the place, so it is the same in any batch.
        row_keys = jax.vmap(lambda key: jax.random.fold_in(key, place))(keys)
        return jax.vmap(jax.random.categorical)(row_keys, logits)

    def pick_code(logits: Array, place: Array) -> Array:
        if settings.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        return pick(nucleus(logits / settings.temperature, settings.top_p), place)

    def step(carry: tuple[Array, Any], place: Array) -> tuple[tuple[Array, Any], Array]:
        code, past = carry
        # Both halves read the same code: guidance compares them after the same past.
        rows = jnp.concatenate([code, code]) if guided else code
        logits, past = forward(network, params, rows, place, past, method="step")
        code = pick_code(guide(logits), place + 1)
        return (code, past), code

    logits, past = forward(network, params, *text, method="prefill")
    # Sampled at any temperature, which is that of the codes: candidates differ even at 0.
    dot = pick(top_share(guide(logits), settings.dot_share), 0)
    _, codes = jax.lax.scan(step, (dot, past), jnp.arange(network.dims))
    # The scan stacks codes by place, [dims, b].
    return jnp.concatenate([dot[:, None], codes.T], axis=1)

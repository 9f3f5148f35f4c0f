"""Drawing z_img code by code from a caption (unCLIP section 2.2)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.errors import UserError
from dalle2_jax.nets.ar_prior import ARPrior
from dalle2_jax.nets.clip import TextEncoding
from dalle2_jax.nets.forward import forward
from dalle2_jax.sampling.prior import nearest_to
from dalle2_jax.sampling.stage import Progress
from dalle2_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Settings:
    """How codes are drawn; the defaults of a model stand in its folder's `config.json`.

    The dot product with z_txt, which is drawn first, comes from the highest `dot_share` of its
    predicted distribution: pictures that fit their caption better. The paper found the top half
    (0.5) best of 0.5, 0.3, 0.15 and 0.05.
    """

    temperature: float = 1.0  # of the codes after it; 0 takes the likeliest
    top_p: float = 1.0  # the likeliest codes that together have this probability; 1: all
    cfg_scale: float = 1.0
    dot_share: float = 0.5

    def __post_init__(self) -> None:
        for name, least, most in (
            ("temperature", 0, math.inf),
            ("top_p", 1e-6, 1),
            ("cfg_scale", -math.inf, math.inf),
            ("dot_share", 1e-6, 1),
        ):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not least <= value <= most:
                bounds = f" within {least:g} and {most:g}" if math.isfinite(least) else ""
                raise UserError(f"{name} must be a finite number{bounds}, not {value!r}")


def top_share(logits: Array, share: float) -> Array:
    """Logits [b, k] of the highest `share` of a distribution over k rising values: of the value on
    the bound what lies above it."""
    p = jax.nn.softmax(logits, axis=-1)
    from_here = jnp.cumsum(p[:, ::-1], axis=-1)[:, ::-1]  # this value's and all higher ones'
    return jnp.log(jnp.clip(share - (from_here - p), 0.0, p))


def nucleus(logits: Array, top_p: float) -> Array:
    """Logits [b, k] without the unlikely values beyond a probability of `top_p` (1904.09751)."""
    if top_p >= 1:
        return logits
    p = jax.nn.softmax(logits, axis=-1)
    order = jnp.argsort(-p, axis=-1)
    likelier = jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1)
    likelier = jnp.take_along_axis(likelier, jnp.argsort(order, axis=-1), axis=-1) - p
    return jnp.where(likelier < top_p, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class ARPriorSampler:
    """Several z_img are drawn and the one with the largest dot product with z_txt is kept."""

    network: ARPrior
    settings: Settings
    candidates: int = 2
    unit_length: bool = True  # of z_img, as its CLIP has it
    stage: ClassVar[str] = "ar_prior"

    @property
    def rows(self) -> int:
        """How many are drawn for a picture."""
        return self.candidates

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated for a batch: once for the captions, once a code."""
        return 1 + self.network.dims

    def condition(self, text: TextEncoding, empty: TextEncoding | None = None) -> dict[str, Any]:
        """What the network is told of b captions; it learned what no caption is."""
        del empty
        return text._asdict()

    def __call__(
        self,
        params: Params,
        cond: Mapping[str, Any],
        keys: Array,
        progress: Progress | None = None,
        noise: None = None,
    ) -> Array:
        """The `condition` of b captions, typed keys [b] -> z_img float32 [b, dim].

        `progress` moves once: all codes are drawn in one program. There is no `noise`.
        """
        del noise
        steps = self.network.dims
        if progress is not None:
            progress(0, steps)  # it compiles: the bar is there meanwhile
        z_img = draw(self, params, cond, keys)
        if progress is not None:
            jax.block_until_ready(z_img)
            progress(steps, steps)
        return z_img


@functools.partial(jax.jit, static_argnums=0)
def draw(sampler: ARPriorSampler, params: Params, cond: Mapping[str, Array], keys: Array) -> Array:
    """See `ARPriorSampler.__call__`."""
    b, k = keys.shape[0], sampler.candidates
    keys = jax.vmap(lambda key: jax.random.split(key, k))(keys).reshape(b * k)
    each = jax.tree.map(lambda a: jnp.repeat(a, k, axis=0), cond)
    codes = draw_codes(sampler, params, each, keys)
    z = forward(sampler.network, params, codes, method="to_z_img")
    return nearest_to(cond["z_txt"], z, sampler.unit_length)


def draw_codes(
    sampler: ARPriorSampler, params: Params, cond: Mapping[str, Array], keys: Array
) -> Array:
    """The `condition` of b captions, typed keys [b] -> codes int32 [b, 1 + dims].

    Row i of the result depends on row i of its inputs alone.
    """
    network, settings = sampler.network, sampler.settings
    guided = settings.cfg_scale != 1
    text = [cond[name] for name in ("z_txt", "txt_enc", "txt_mask")]
    if guided:  # the rows again, without their captions
        null = [*text[:2], jnp.zeros_like(text[2])]
        text = [jnp.concatenate(pair) for pair in zip(text, null, strict=True)]

    def told(logits: Array) -> Array:
        if not guided:
            return logits
        of_caption, of_none = jnp.split(jax.nn.log_softmax(logits, axis=-1), 2)
        return of_none + settings.cfg_scale * (of_caption - of_none)

    def pick(logits: Array, place: Array | int) -> Array:
        own = jax.vmap(lambda key: jax.random.fold_in(key, place))(keys)
        return jax.vmap(jax.random.categorical)(own, logits)

    def pick_code(logits: Array, place: Array) -> Array:
        if settings.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        return pick(nucleus(logits / settings.temperature, settings.top_p), place)

    def step(carry: tuple[Array, Any], place: Array) -> tuple[tuple[Array, Any], Array]:
        code, past = carry
        rows = jnp.concatenate([code, code]) if guided else code
        logits, past = forward(network, params, rows, place, past, method="step")
        code = pick_code(told(logits), place + 1)
        return (code, past), code

    logits, past = forward(network, params, *text, method="prefill")
    dot = pick(top_share(told(logits), settings.dot_share), 0)
    _, codes = jax.lax.scan(step, (dot, past), jnp.arange(network.dims))
    return jnp.concatenate([dot[:, None], codes.T], axis=1)

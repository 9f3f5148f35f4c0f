"""The diffusion prior: a causal transformer that un-noises z_img (unCLIP section 2.2)."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.nets.layers import LayerNorm, TimestepMLP
from dalle2_jax.nets.transformer import Transformer, causal_mask
from dalle2_jax.types import Array


class DiffusionPrior(nn.Module):
    """The diffusion prior: a causal transformer over [txt_enc, z_txt, t, x_t, query].

    The output at the query predicts x_0, the un-noised z_img. Padding of captions is masked. A
    caption whose `txt_mask` is empty is "no caption".

    Attributes:
        dim: width of z_img.
        context_length: tokens of a caption.
        width, depth, heads: of the transformer.
        learned_null: a learned vector stands for the z_txt of "no caption"; otherwise no caption is
            the empty one's encoding.
        activation: see `transformer.ACTIVATIONS`.
        dtype: what the network computes in.
        remat: policy of `nets.remat` for the blocks.
        standardised: x_0 is z_img by the mean and standard deviation of each coordinate. These are
            parameters that are not trained; a fresh network has 0 and 1.
    """

    reads_text: ClassVar[bool] = True  # its shapes depend on the width of CLIP's text tower

    dim: int
    context_length: int
    width: int
    depth: int
    heads: int
    learned_null: bool = True
    activation: str = "gelu"
    dtype: Any = jnp.float32
    remat: str | bool = "none"
    standardised: bool = False

    def init_inputs(self, text_width: int) -> tuple[Array, ...]:
        """Returns zeros to call `init` with, for a CLIP whose text tower has `text_width`."""
        z, n = jnp.zeros((1, self.dim)), self.context_length
        txt_enc, txt_mask = jnp.zeros((1, n, text_width)), jnp.ones((1, n), bool)
        return z, jnp.zeros((1,), jnp.int32), z, txt_enc, txt_mask

    @nn.compact
    def __call__(
        self, x_t: Array, t: Array, z_txt: Array, txt_enc: Array, txt_mask: Array
    ) -> Array:
        """Predicts x_0 float32 [b, dim].

        Args:
            x_t: [b, dim], noised (scaled) z_img.
            t: int32 [b], of the training schedule.
            z_txt: [b, dim].
            txt_enc: [b, n, w], CLIP's hidden states of the caption.
            txt_mask: bool [b, n], True up to the caption's end.
        """
        b, n = txt_mask.shape

        def dense(name: str) -> nn.Dense:
            return nn.Dense(self.width, dtype=self.dtype, name=name)

        if self.learned_null:
            null = self.param("null_z_txt", nn.initializers.zeros, (self.dim,), jnp.float32)
            z_txt = jnp.where(txt_mask.any(axis=1)[:, None], z_txt, null[None])
        query = self.param("query", nn.initializers.normal(0.02), (1, 1, self.width), jnp.float32)
        sequence = [
            dense("txt_enc")(txt_enc),
            dense("z_txt")(z_txt)[:, None],
            TimestepMLP(self.width, self.width, self.dtype, name="time")(t)[:, None],
            dense("x_t")(x_t)[:, None],
            jnp.broadcast_to(query, (b, 1, self.width)).astype(self.dtype),
        ]
        x = jnp.concatenate(sequence, axis=1)  # b n+4 width
        shape = (self.context_length + 4, self.width)
        positions = self.param("positions", nn.initializers.normal(0.01), shape, jnp.float32)
        # The last four tokens (z_txt, t, x_t, query) keep their positions, however many tokens n
        # the caption is given with.
        places = jnp.concatenate([positions[:n], positions[-4:]])
        x = x + places[None].astype(self.dtype)
        keys = jnp.pad(txt_mask, ((0, 0), (0, 4)), constant_values=True)
        # [b, 1, n + 4, n + 4]. Where there is no caption, its places attend nowhere and become an
        # average of all values. No later token sees it, because they are masked as keys, too.
        mask = causal_mask(n + 4) & keys[:, None, None, :]
        x = Transformer(
            self.depth, self.heads, self.activation, self.dtype, self.remat, name="transformer"
        )(x, mask)
        x = LayerNorm(name="norm")(x[:, -1])  # the query's output [b, width]
        # Declared here, since a compact module declares parameters in one method only; the methods
        # below read them.
        if self.standardised:
            self.param("mean", nn.initializers.zeros, (self.dim,), jnp.float32)
            self.param("std", nn.initializers.ones, (self.dim,), jnp.float32)
        return nn.Dense(self.dim, dtype=self.dtype, name="out")(x).astype(jnp.float32)

    def to_x_0(self, z_img: Array) -> Array:
        """z_img float32 [b, dim] -> x_0 [b, dim], the quantity that is noised and predicted."""
        if not self.standardised:
            return z_img
        # No gradient: they are data, though they live among the parameters.
        mean, std = jax.lax.stop_gradient(self._statistics())
        return (z_img - mean) / std

    def to_z_img(self, x_0: Array) -> Array:
        """x_0 float32 [b, dim] as it is sampled -> z_img [b, dim], but for its length."""
        if not self.standardised:
            return x_0
        mean, std = self._statistics()
        return x_0 * std + mean

    def _statistics(self) -> tuple[Array, Array]:
        """Returns (mean, standard deviation), each [1, dim]."""
        mean, std = (self.get_variable("params", name)[None] for name in ("mean", "std"))
        return mean, std

"""Small layers that all networks share."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.parallel.shards import keep_rows_whole
from dalle2_jax.types import Array

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def timestep_embedding(t: Array, dim: int, max_period: float = 10_000.0) -> Array:
    """Sinusoids of t [b] -> float32 [b, dim], cosines first (ADM 2105.05233, code)."""
    half = dim // 2
    # From 1 down to about 1 / max_period. t is in steps (0, 1, 2, ...), never rescaled to 0..1, so
    # a respaced schedule must pass the t of training.
    freqs = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    args = t.astype(jnp.float32)[:, None] * freqs[None]
    emb = jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1)
    return jnp.pad(emb, ((0, 0), (0, dim % 2)))  # an odd dim ends in one zero


class TimestepMLP(nn.Module):
    """t [b] -> sinusoids [b, dim] -> two layers with SiLU between -> [b, out_dim]."""

    dim: int
    out_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: Array) -> Array:
        emb = timestep_embedding(t, self.dim)
        emb = nn.Dense(self.out_dim, dtype=self.dtype, name="fc1")(emb)
        return nn.Dense(self.out_dim, dtype=self.dtype, name="fc2")(nn.silu(emb))


# Both norms use PyTorch's epsilon (Flax's default is 1e-6): public weights were trained with it.
class GroupNorm(nn.Module):
    """Group normalisation in float32 over [b, h, w, c], then back to the input's dtype."""

    groups: int = 32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = nn.GroupNorm(self.groups, epsilon=self.epsilon, dtype=jnp.float32, name="norm")
        return norm(x).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation in float32 over the last axis, then back to the input's dtype."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.LayerNorm(self.epsilon, dtype=jnp.float32, name="norm")(x).astype(x.dtype)


def _conv(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


# On a CPU, at most FEW pixels (of the whole batch) under at least WIDE weights a tap are convolved
# by patches: 2.4 times as fast as XLA's convolution at 2 x 8 x 8 pixels of 1280 channels.
FEW, WIDE = 256, 2**19


@jax.custom_vjp
def conv3x3(x: Array, kernel: Array) -> Array:
    """Convolves with same padding: x [b, h, w, c], kernel [3, 3, c, d] -> [b, h, w, d].

    On CPUs the weight gradient is slow in XLA; there it is computed as three wide matrix products,
    twice as fast at 16 px. So is, when sampling, the convolution of few pixels with many channels,
    by patches. Accelerators keep XLA's own.
    """
    b, h, w, c = x.shape
    if b * h * w > FEW or c * kernel.shape[-1] < WIDE:
        return _conv(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=_conv_by_patches, default=_conv)


def _conv_by_patches(x: Array, kernel: Array) -> Array:
    # [b, h, w, c] -> [b, h, w, 9 c], the 3 x 3 neighbours in the order of the kernel's taps.
    _, h, w, c = x.shape
    x = keep_rows_whole(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
    patches = [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(9 * c, -1)


def _conv3x3_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    # No patches under differentiation: they are for sampling, and training has many pixels.
    return _conv(x, kernel), (x, kernel)


def _conv3x3_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    # A convolution is linear in x (and in the kernel), so its transpose is its gradient.
    # `jax.vjp` would trace the forward pass again.
    (dx,) = jax.linear_transpose(lambda x: _conv(x, kernel), x)(g)
    dkernel = jax.lax.platform_dependent(
        x, g, cpu=_kernel_gradient_by_matmuls, default=_kernel_gradient_by_conv
    )
    return dx, dkernel.astype(kernel.dtype)


def _kernel_gradient_by_conv(x: Array, g: Array) -> Array:
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], g.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda k: _conv(x, k), kernel)(g)[0]


def _kernel_gradient_by_matmuls(x: Array, g: Array) -> Array:
    """Computes one product a row of the kernel: x shifted by rows, times g shifted by columns."""
    _, h, w, c = x.shape
    d = g.shape[-1]
    # dK[i, j] = sum over b, y, u of  x[b, y + i - 1, u]^T  g[b, y, u - j + 1]      [c, d]
    #
    # Shifting x by columns as well would copy it nine times. With the column shift on g, which is
    # copied three times, each row i of the kernel is one product over all b h w pixels:
    #
    #     dK[i] = x[rows + i - 1]^T [c, b h w]  @  (g shifted for j = 0, 1, 2) [b h w, 3 d]
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    g = jnp.pad(g, ((0, 0), (0, 0), (1, 1), (0, 0)))
    g = keep_rows_whole(g)
    g = jnp.concatenate([g[:, :, 2 - j : 2 - j + w] for j in range(3)], axis=-1)
    g = g.reshape(-1, 3 * d)
    rows = [x[:, i : i + h].reshape(-1, c).T @ g for i in range(3)]
    return jnp.stack(rows).reshape(3, c, 3, d).transpose(0, 2, 1, 3)  # i c j d -> i j c d


conv3x3.defvjp(_conv3x3_fwd, _conv3x3_bwd)


class Conv3x3(nn.Module):
    """3x3 convolution; `zero` starts it at zero, as the last of a residual branch."""

    features: int
    zero: bool = False
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features), jnp.float32)
        # Parameters stay float32 for the optimiser; only the product is in `dtype`.
        out = conv3x3(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return out
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        # Ranks are matched by hand all over the package: the tests forbid implicit promotion.
        return out + bias.astype(self.dtype).reshape(1, 1, 1, -1)

"""Rematerialisation by a policy's name: what a block keeps for its backward pass."""

from __future__ import annotations

from typing import Any, TypeVar

import flax.linen as nn
import jax

from dalle2_jax.errors import UserError, near_miss

Layer = TypeVar("Layer", bound=type[nn.Module])


def _is_product(primitive: Any, *args: Any, **params: Any) -> bool:
    """Products with weights: convolutions, and matrix products without batch dimensions, which
    attention's have. Their results are some n d an example; attention's logits would be n n."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


# name -> what jax.checkpoint keeps within a block beside its inputs
POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,  # the block is not wrapped at all
    "full": jax.checkpoint_policies.nothing_saveable,  # each block is computed twice
    "dots": _is_product,  # all but products with weights is computed twice
}


def policy_name(remat: str | bool, setting: str = "remat") -> str:
    """A known policy's name; False and True, of older model folders, are "none" and "full".

    Raises UserError for any other, which names the `setting`.
    """
    name = {False: "none", True: "full"}.get(remat, remat) if isinstance(remat, bool) else remat
    if name not in POLICIES:
        raise UserError(f"{setting}: no policy {name!r}{near_miss(str(name), POLICIES)}")
    return name


def rematerialised(
    layer: Layer, remat: str | bool, static_argnums: tuple[int, ...] = (), scanned: bool = False
) -> Layer:
    """The class of `layer`, each call of which keeps what the policy `remat` says.

    `static_argnums` count self as 0. In the body of a scan (`scanned`) the compiler cannot undo
    the recomputation by finding it equal to the forward pass, and is spared the barriers against
    that.
    """
    name = policy_name(remat)
    if name == "none":
        return layer
    return nn.remat(
        layer, policy=POLICIES[name], prevent_cse=not scanned, static_argnums=static_argnums
    )

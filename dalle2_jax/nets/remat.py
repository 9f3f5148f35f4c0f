"""Rematerialisation by a policy's name: which results a block keeps for its backward pass.

The backward pass needs the results of the forward pass. Keeping all of them costs memory for every
block; keeping only a block's input costs computing the block again. "dots" is between: it keeps the
results of products with weights, which are the expensive ones, and computes norms, activations and
attention's softmax again.
"""

from __future__ import annotations

from typing import Any, TypeVar

import flax.linen as nn
import jax

from dalle2_jax.errors import UserError, near_miss

Layer = TypeVar("Layer", bound=type[nn.Module])


def _is_product(primitive: Any, *args: Any, **params: Any) -> bool:
    """Returns whether a primitive is a product with weights.

    These are convolutions, and matrix products without batch dimensions, which attention's products
    have. The results of the former have some n d elements an example, attention's logits would have
    n n.
    """
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
    """Returns a known policy's name; False and True, of older model folders, are "none" and "full".

    Raises UserError for any other; `setting` names in the message where it stands.
    """
    # Without isinstance 0 and 1 would be found too, since they equal False and True.
    name = {False: "none", True: "full"}.get(remat, remat) if isinstance(remat, bool) else remat
    if name not in POLICIES:
        raise UserError(f"{setting}: no policy {name!r}{near_miss(str(name), POLICIES)}")
    return name


def rematerialised(
    layer: Layer, remat: str | bool, static_argnums: tuple[int, ...] = (), scanned: bool = False
) -> Layer:
    """Returns the class `layer`, each call of which keeps what the policy `remat` says.

    Args:
        static_argnums: arguments that are no arrays, counting self as 0.
        scanned: the layer is the body of a scan. The compiler cannot undo the recomputation there
            by finding it equal to the forward pass, so no barriers against that are needed.
    """
    name = policy_name(remat)
    if name == "none":
        return layer
    return nn.remat(
        layer, policy=POLICIES[name], prevent_cse=not scanned, static_argnums=static_argnums
    )

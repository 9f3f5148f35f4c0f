"""Running a network on given parameters."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from dalle2_jax.types import Array, Params


def forward(
    network: nn.Module,
    params: Params,
    *args: Any,
    method: str | None = None,
    rngs: dict[str, Array] | None = None,
) -> Any:
    """Returns the output of `network` (its `__call__`, or `method`) for `args`.

    Flax's `apply` returns changed variables beside the output only if some are mutable; none are
    here.
    """
    return network.apply({"params": params}, *args, method=method, rngs=rngs)

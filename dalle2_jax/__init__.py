"""DALL-E 2 (unCLIP, arXiv 2204.06125) in JAX: train every stage, draw."""

from typing import TYPE_CHECKING, Any

from dalle2_jax.version import __version__

if TYPE_CHECKING:
    from dalle2_jax.pipelines.dalle2 import DALLE2

__all__ = ["DALLE2", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "DALLE2":  # late: the trainer and the data set builder need none of it
        from dalle2_jax.pipelines.dalle2 import DALLE2

        return DALLE2
    raise AttributeError(f"module 'dalle2_jax' has no attribute {name!r}")

"""DALL-E 2 (unCLIP, arXiv 2204.06125) in JAX: train every stage, generate and edit images.

from dalle2_jax import DALLE2
images = DALLE2.from_pretrained("tiny").generate("a flat emoji of a red apple")
"""

from typing import TYPE_CHECKING, Any

from dalle2_jax.version import __version__

if TYPE_CHECKING:
    from dalle2_jax.pipelines.dalle2 import DALLE2

__all__ = ["DALLE2", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "DALLE2":  # imported late: training and preparing data do not need it
        from dalle2_jax.pipelines.dalle2 import DALLE2

        return DALLE2
    raise AttributeError(f"module 'dalle2_jax' has no attribute {name!r}")

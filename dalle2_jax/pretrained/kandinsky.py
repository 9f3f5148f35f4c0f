"""Kandinsky's prior (kandinsky-community/kandinsky-2-2-prior), in the layout of diffusers.

It is Karlo's network over a larger CLIP. Kandinsky's decoder, a latent diffusion model, is another
network than unCLIP's: what is imported has no decoder, but a CLIP and a prior to train one on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dalle2_jax.pretrained import karlo_diffusers
from dalle2_jax.pretrained.sources import Stage

PIPELINES = ("KandinskyV22PriorPipeline", "KandinskyPriorPipeline")


def stages(folder: Path) -> Iterator[Stage]:
    """Yields the stages of the pipeline in `folder`, CLIP first; raises UserError for other
    networks.
    """
    yield karlo_diffusers.clip_stage(folder, "image_processor")
    yield karlo_diffusers.prior_stage(folder, "scheduler")

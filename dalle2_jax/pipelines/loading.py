"""Loading a cascade: which stages of a model folder it needs, and where their weights go.

A folder may hold more stages than a size needs, and has to hold REQUIRED. Stages are built from
config.json first, which is cheap, so that the sizes of all upsamplers are known before any of
their weights are read:

    clip, decoder     always
    prior, ar_prior   each one that the folder has: `Cascade.with_prior` chooses
    upsampler_<px>    those of the chain decoder -> ... up to the first that reaches `size`
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import jax

from dalle2_jax.errors import UserError
from dalle2_jax.nets.clip import CLIP
from dalle2_jax.pipelines import placement
from dalle2_jax.pipelines.cascade import Cascade, tokenizer_of
from dalle2_jax.pretrained import find
from dalle2_jax.sampling import load
from dalle2_jax.sampling.priors import NAMES
from dalle2_jax.storage import model_folder
from dalle2_jax.validation import checks

REQUIRED = ("clip", "decoder")


def load_cascade(
    weights: str | os.PathLike[str] = "tiny",
    dtype: str | None = None,
    offload: bool | None = None,
    size: int | None = None,
) -> Cascade:
    """Loads a cascade; arguments and errors are those of `DALLE2.from_pretrained`."""
    if not isinstance(weights, str | os.PathLike):
        raise UserError(f"weights must be 'tiny', a model folder or a hub id, not {weights!r}")
    folder = find.model(weights)
    for stage in REQUIRED:
        model_folder.read_stage(folder, stage)  # its error lists the stages that there are
    # TPUs multiply bfloat16 fastest; CPUs only emulate it.
    dtype = dtype or ("bfloat16" if jax.default_backend() == "tpu" else "float32")
    checks.one_of("dtype", dtype, ("float32", "bfloat16", "float16"))
    clip: CLIP = load.network(folder, "clip", dtype)
    entries = model_folder.read_config(folder)["stages"]

    def samplers_of(stages: Iterable[str]) -> dict[str, Any]:
        """Builds samplers from config.json alone."""
        return {stage: load.sampler(folder, stage, clip, dtype) for stage in stages}

    # Settings before tensors: what is wrong with them is reported before gigabytes are read.
    priors = samplers_of(stage for stage in NAMES.values() if stage in entries)
    (decoder,) = samplers_of(["decoder"]).values()
    upsamplers = samplers_of(load.upsampler_chain(entries, decoder.image_size))
    size = load.image_size(folder, size)
    sizes = [sampler.image_size for sampler in (decoder, *upsamplers.values())]
    # Upsamplers beyond the size that is asked for are not loaded; all priors are, so that another
    # can be chosen later without the folder.
    needed = list(upsamplers)[: load.num_upsamplers(size, sizes)]
    params = {
        stage: placement.cast(load.params(folder, stage), dtype)
        for stage in (*REQUIRED, *priors, *needed)
    }
    if offload is None:
        # A CPU reports no limit: taken as infinite, as its host is the device already.
        stats = jax.local_devices()[0].memory_stats() or {}
        offload = placement.should_offload(params, stats.get("bytes_limit", math.inf))
    return Cascade(
        tokenizer=tokenizer_of(clip.text),
        clip=clip,
        prior=next(iter(priors.values()), None),  # NAMES lists the default first
        priors=priors,
        decoder=decoder,
        upsamplers={stage: upsamplers[stage] for stage in needed},
        params=params if offload else jax.device_put(params, placement.replicated()),
        weights=str(weights),
        weights_hash=model_folder.weights_hash(folder),
        size=size,
    )

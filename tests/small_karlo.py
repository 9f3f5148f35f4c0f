"""A model folder of Karlo's networks at small width with random weights."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from dalle2_jax.sampling import load
from dalle2_jax.storage import model_folder

DIM, WIDTH, CONTEXT, VOCAB = 16, 24, 12, 600
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def _unet(**settings):
    return {"num_blocks": 1, "groups": 4, "head_channels": 8, **settings}


def _drawn(steps: int, cfg_scale: float, kind: str = "eps", variance: bool = False, bound=1.0):
    return {
        "diffusion": {
            "schedule": "cosine",
            "num_timesteps": 1000,
            "prediction": kind,
            "learned_variance": variance,
        },
        "sampling": {
            "steps": steps,
            "solver": "ddpm",
            "cfg_scale": cfg_scale,
            "clip": ["static", bound],
        },
    }


def entries(variations: bool = False) -> dict:
    tower = {"depth": 2, "heads": 2, "mlp_ratio": 2.0}
    image = {"image_size": 16, "patch_size": 8, "mean": MEAN, "std": STD, "resize": "bicubic"}
    made = {
        "clip": {
            "model": {
                "dim": DIM,
                "activation": "quick_gelu",
                "unit_length": False,
                "learned_temperature": False,
                "text": {**tower, "width": WIDTH, "context_length": CONTEXT, "vocab_size": VOCAB},
                "image": {**tower, "width": 32, **image} if variations else None,
            }
        },
        "decoder": {
            "model": {
                "dim": DIM,
                "context_length": CONTEXT,
                "unet": _unet(
                    channels=8, channel_mults=[1, 2], attention_levels=[1], scale_shift=True
                ),
                "text": None,
                "extra_tokens": 4,
                "learned_variance": True,
                "learned_null": False,
                "text_projection": 20,
                "z_txt_in_time": True,
                "unit_length": False,
            },
            "image_size": 8,
            **_drawn(25, 8.0, variance=True),
        },
        "upsampler_16": {
            "model": {
                "unet": _unet(
                    channels=8, channel_mults=[1, 2], attention_levels=[], scale_shift=False
                ),
                "learned_variance": False,
            },
            "image_size": 16,
            "low_size": 8,
            "separate_last_step": True,
            **_drawn(7, 1.0),
        },
    }
    if not variations:
        made["prior"] = {
            "model": {
                "dim": DIM,
                "context_length": CONTEXT,
                "width": 16,
                "depth": 2,
                "heads": 2,
                "learned_null": False,
                "standardised": True,
                "activation": "gelu",
            },
            "candidates": 1,
            **_drawn(25, 4.0, kind="x_0", bound=5.0),
        }
    return made


def weights(shapes, seed: int):
    """Every parameter is another number; layers keep the scale of what goes through them, so that
    images depend on all of them, but for what is cut off at the bounds."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "scale":
            return 1 + 0.1 * noise
        if path[-1].key != "kernel":
            return 0.3 * noise
        inputs = leaf.shape[:-1] if leaf.ndim == 4 else leaf.shape[-2:-1]  # else stacked layers
        return 1.5 * noise / np.sqrt(np.prod(inputs))

    return jax.tree_util.tree_map_with_path(one, shapes)


def write(
    folder: Path,
    variations: bool = False,
    dtype: model_folder.StorageDtype = "float32",
    seed: int = 0,
):
    """With `weights` of the seed."""
    found = entries(variations)
    for stage in sorted(found):  # CLIP comes first, upon which others stand
        shapes = load.expected_params(found, stage, "small")
        params = weights(shapes, seed)
        if stage in ("decoder", "prior"):
            found[stage]["clip"] = model_folder.stage_hash(folder, "clip")
        model_folder.write_stage(folder, stage, found[stage], params, dtype)
    return folder

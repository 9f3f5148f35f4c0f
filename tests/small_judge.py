"""A model folder with a small random CLIP, which serves tests as a judge."""

import jax
import numpy as np

from dalle2_jax.nets.clip import CLIP
from dalle2_jax.storage import model_folder

MODEL = dict(
    dim=24,
    image=dict(image_size=16, patch_size=8, width=16, depth=1, heads=2),
    text=dict(context_length=32, vocab_size=1024, width=16, depth=1, heads=2),
)


def write(folder, seed: int = 0, model=MODEL) -> str:
    """Writes the stage `clip` with random weights large enough to tell words apart."""
    images, tokens = np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 32), np.int32)
    params = jax.jit(CLIP(**model).init)(jax.random.key(seed), images, tokens)["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda p: p + 0.2 * rng.standard_normal(p.shape), params)
    model_folder.write_stage(folder, "clip", {"model": model}, params)
    return str(folder)

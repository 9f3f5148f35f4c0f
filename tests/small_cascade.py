"""The whole cascade at a toy size with random weights, as a model folder, for tests."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dalle2_jax import build
from dalle2_jax.storage import model_folder
from dalle2_jax.tokenizer import Tokenizer

DIM, CONTEXT, VOCAB, WIDTH = 16, 8, 520, 16
UNET = dict(channels=8, channel_mults=(1, 2), num_blocks=1, head_channels=8, groups=4)
DATA = dict(context_length=CONTEXT, vocab_size=VOCAB)
STATIC = ("static", 1.0)

CONFIGS = {
    "clip": dict(
        task=dict(name="clip", max_shift=1),
        model=dict(
            dim=DIM,
            image=dict(image_size=16, patch_size=8, width=WIDTH, depth=1, heads=2),
            text=dict(context_length=CONTEXT, vocab_size=VOCAB, width=WIDTH, depth=1, heads=2),
            activation="quick_gelu",
        ),
    ),
    "prior": dict(
        task=dict(
            name="prior",
            embedding_scale=2.2,
            drop_caption=0.1,
            sampling=dict(steps=4, solver="ddim", cfg_scale=1.0, clip=None),
        ),
        model=dict(dim=DIM, context_length=CONTEXT, width=WIDTH, depth=1, heads=2),
        diffusion=dict(schedule="cosine", num_timesteps=20, prediction="x_0"),
    ),
    "decoder": dict(
        task=dict(
            name="decoder",
            image_size=8,
            sampling=dict(steps=4, solver="ddim", cfg_scale=2.0, clip=STATIC),
        ),
        model=dict(
            unet=dict(UNET, attention_levels=(1,)),
            text=None,
            dim=DIM,
            context_length=CONTEXT,
            learned_variance=False,
        ),
        diffusion=dict(schedule="cosine", num_timesteps=20, prediction="v"),
    ),
    "upsampler": dict(
        task=dict(
            name="upsampler",
            low_size=8,
            image_size=16,
            crop_fraction=0.5,
            noise_std=0.1,
            sampling=dict(steps=2, solver="ddim", clip=STATIC),
        ),
        model=dict(unet=UNET),
        diffusion=dict(schedule="cosine", num_timesteps=20, prediction="v"),
    ),
}

# Not among those that `write` writes by default: most tests draw by the diffusion prior.
AR_PRIOR = dict(
    task=dict(name="ar_prior", drop_caption=0.1, sampling=dict(dot_share=0.5)),
    model=dict(dim=DIM, context_length=CONTEXT, width=WIDTH, depth=1, heads=2, dims=6, buckets=16),
)

KARLO = {  # what makes of these networks those that Karlo's are, as changes of `config`
    "clip": dict(model__unit_length=False, model__learned_temperature=False),
    "prior": dict(
        model__learned_null=False,
        model__standardised=True,
        task__embedding_scale=1.0,
        task__candidates=1,
        task__sampling__cfg_scale=2.0,
        diffusion__num_timesteps=30,
    ),
    "decoder": dict(
        model__learned_null=False,
        model__learned_variance=True,
        model__text_projection=12,
        model__z_txt_in_time=True,
        model__unit_length=False,
        diffusion__learned_variance=True,
        diffusion__num_timesteps=30,
        diffusion__prediction="eps",
    ),
    "upsampler": dict(
        model__unet__scale_shift=False,
        task__separate_last_step=True,
        diffusion__num_timesteps=30,
        diffusion__prediction="eps",
    ),
}


def config(stage: str, clip_from: str = "", **changes) -> ConfigDict:
    """A stage's complete config; `changes` as {"model__unet__dropout": 0.5}."""
    made = AR_PRIOR if stage == "ar_prior" else CONFIGS[stage]
    given = ConfigDict({**made, "data": DATA, "clip_from": clip_from, "batch_size": 4})
    with given.ignore_type(), given.unlocked():
        for path, value in changes.items():
            section, (*parents, last) = given, path.split("__")
            for name in parents:
                section = section[name]
            section[last] = value
    return build.complete(given)


def randomised(params, seed: int = 0, std: float = 0.2):
    """`params` plus noise, so that none of them is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(p + std * rng.standard_normal(p.shape), jnp.float32), params
    )


def random_params(init, seed: int = 0, std: float = 0.2):
    """Parameters as `init(key)` makes them, plus noise, so that none of them is zero.

    Layers that start at zero would hide what is behind them. Only shapes are traced: to compile an
    initialisation takes longer than most tests.
    """
    shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def leaf(path, shape) -> jax.Array:
        noise = rng.standard_normal(shape.shape)
        return jnp.asarray(_initial(path[-1].key, shape.shape, rng) + std * noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _initial(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray | float:
    """An initial value of a parameter of this name, as the layers of `dalle2_jax.nets` have it."""
    if name == "kernel":
        return rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))
    if name == "components":
        return np.eye(*shape)
    ones = dict(scale=1.0, std=1.0, high=1.0, low=-1.0, logit_scale=np.log(1 / 0.07))
    return ones.get(name, 0.0)


def batch(size: int = 4, image_size: int = 16) -> dict[str, jax.Array]:
    """Images of noise with captions of several lengths."""
    images = np.random.default_rng(1).integers(0, 256, (size, image_size, image_size, 3))
    tokens = Tokenizer(CONTEXT, VOCAB)([f"{'abcdefg'[i % 7]} " * (i % 4 + 1) for i in range(size)])
    return {"image": jnp.asarray(images, jnp.uint8), "tokens": jnp.asarray(tokens)}


def write(folder, stages=tuple(CONFIGS)) -> str:
    """Writes the stages with random weights through the tasks' own export."""
    return written_with(folder, {}, stages)


def written_with(folder, changes, stages) -> str:
    """As `write`, each stage's config with its `changes`."""
    for i, stage in enumerate(stages):
        task = build.task(config(stage, clip_from=str(folder), **changes.get(stage, {})))
        params = random_params(task.init, seed=i)
        entry, tensors = task.export(params)
        model_folder.write_stage(folder, task.stage, entry, tensors)
    return str(folder)

"""Karlo (kakaobrain/karlo-v1-alpha and its image variations), in the layout of diffusers.

Each network's settings are read from its own config.json, so that whatever was saved by
UnCLIPPipeline or UnCLIPImageVariationPipeline is read alike, at any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dalle2_jax.pretrained import names_diffusers
from dalle2_jax.pretrained.names import within
from dalle2_jax.pretrained.sources import Config, Stage, read_json

PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")


def stages(folder: Path) -> Iterator[Stage]:
    """Yields the stages of the pipeline in `folder`, CLIP first; raises UserError for other
    networks.
    """
    kind = read_json(folder / "model_index.json")["_class_name"]
    images = kind == "UnCLIPImageVariationPipeline"
    yield clip_stage(folder, "feature_extractor" if images else None)
    if kind == "UnCLIPPipeline":
        yield prior_stage(folder, "prior_scheduler")
    yield _decoder(folder)
    yield _upsampler(folder)


def _config(folder: Path, name: str) -> Config:
    return Config(folder / name / "config.json")


def _inside(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    return {name: folder / name for name in names}


def clip_stage(folder: Path, processor: str | None) -> Stage:
    """CLIP's text tower in a pipeline's folder; its image tower too, where `processor` names the
    folder that says how its images are prepared. UserError: it is another network."""
    text = _config(folder, "text_encoder")
    model = {
        "dim": text.whole("projection_dim"),
        "activation": text.text("hidden_act", "quick_gelu"),
        "unit_length": False,
        "learned_temperature": False,
        "text": text_tower(text),
        "image": None,
    }
    parts, rules = ["text_encoder"], within("text_encoder/", "", names_diffusers.CLIP_TEXT)
    if processor:
        image = _config(folder, "image_encoder")
        image.expect(projection_dim=model["dim"], hidden_act=model["activation"])
        prepared = Config(folder / processor / "preprocessor_config.json")
        model["image"] = image_tower(image, prepared)
        parts += ["image_encoder"]
        rules += within("image_encoder/", "", names_diffusers.CLIP_IMAGE)
    return Stage("clip", {"model": model}, _inside(folder, parts), rules)


def tower(settings: Config) -> dict[str, Any]:
    """Returns our settings of either tower of CLIP from those of transformers."""
    settings.expect(hidden_act=("gelu", "quick_gelu"), layer_norm_eps=1e-5)
    width = settings.whole("hidden_size")
    return {
        "width": width,
        "depth": settings.whole("num_hidden_layers"),
        "heads": settings.whole("num_attention_heads"),
        "mlp_ratio": settings.whole("intermediate_size") / width,
    }


def text_tower(settings: Config) -> dict[str, Any]:
    """Returns our settings of CLIP's text tower from those of transformers."""
    lengths = {"context_length": settings.whole("max_position_embeddings", 77)}
    return {**tower(settings), **lengths, "vocab_size": settings.whole("vocab_size")}


def image_tower(settings: Config, processor: Config) -> dict[str, Any]:
    """Returns our settings of the image tower, and how CLIPImageProcessor prepares its images."""
    size = settings.whole("image_size")
    crop = processor.values.get("crop_size", size)
    # A number in files of older versions, {"height": ..., "width": ...} in newer ones.
    crop = crop.get("height") if isinstance(crop, Mapping) else crop
    if crop != size:
        raise processor.error(f"images of {crop} px for a tower of {size} px")
    processor.expect(
        resample=3,  # Pillow's number of bicubic
        do_center_crop=True,
        do_normalize=True,
        size=(size, {"shortest_edge": size}),
    )
    return {
        **tower(settings),
        "image_size": size,
        "patch_size": settings.whole("patch_size"),
        "mean": processor.numbers("image_mean"),
        "std": processor.numbers("image_std"),
        "resize": "bicubic",
    }


def prior_stage(folder: Path, scheduler: str) -> Stage:
    """Returns the prior of a pipeline's folder, sampled as the folder `scheduler` says.

    Raises UserError if it is another network.
    """
    settings = _config(folder, "prior")
    heads, channels = settings.whole("num_attention_heads"), settings.whole("attention_head_dim")
    settings.expect(
        additional_embeddings=4,  # z_txt, time, x_t and the query, after the caption's tokens
        dropout=0.0,
        time_embed_act_fn="silu",
        norm_in_type=None,
        embedding_proj_norm_type=None,
        encoder_hid_proj_type="linear",
        added_emb_type="prd",
        time_embed_dim=(None, heads * channels),
    )
    dim, length = settings.whole("embedding_dim"), settings.whole("num_embeddings")
    entry = prior_entry(dim, length, heads * channels, settings.whole("num_layers"), heads)
    entry |= _schedule(folder / scheduler, "x_0", False, steps=25, cfg_scale=4.0)
    return Stage(
        "prior", entry, _inside(folder, ["prior"]), within("prior/", "", names_diffusers.PRIOR)
    )


def prior_entry(dim: int, length: int, width: int, depth: int, heads: int) -> dict[str, Any]:
    """Returns the prior's entry, but for how it is sampled."""
    model = {
        "dim": dim,
        "context_length": length,
        "width": width,
        "depth": depth,
        "heads": heads,
        "learned_null": False,  # without a caption it reads the empty one
        "standardised": True,  # z_img less its mean, over its std, both saved with the weights
        "activation": "gelu",
    }
    return {"model": model, "candidates": 1}


def _decoder(folder: Path) -> Stage:
    settings, text = _config(folder, "decoder"), _config(folder, "text_proj")
    settings.expect(
        in_channels=3,
        out_channels=6,  # eps and the interpolation of log variances (2102.09672, eq. 15)
        class_embed_type="identity",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        addition_embed_type=None,
        encoder_hid_dim_type=None,
    )
    extra_tokens = text.whole("clip_extra_context_tokens", 4)
    entry = decoder_entry(
        text.whole("clip_embeddings_dim"),
        _config(folder, "text_encoder").whole("max_position_embeddings", 77),
        _unet(settings),
        extra_tokens,
        text.whole("cross_attention_dim"),
        settings.whole("sample_size"),
    )
    entry |= _schedule(folder / "decoder_scheduler", "eps", True, steps=25, cfg_scale=8.0)
    rules = within("decoder/", "", names_diffusers.UNET)
    rules += within("text_proj/", "", names_diffusers.text_projection(extra_tokens))
    return Stage("decoder", entry, _inside(folder, ["decoder", "text_proj"]), rules)


def decoder_entry(
    dim: int, length: int, unet: Mapping[str, Any], extra_tokens: int, width: int, size: int
) -> dict[str, Any]:
    """Returns the decoder's entry, but for how it is sampled."""
    model = {
        "dim": dim,
        "context_length": length,
        "unet": unet,
        "text": None,
        "extra_tokens": extra_tokens,
        "learned_variance": True,
        "learned_null": False,
        "text_projection": width,
        "z_txt_in_time": True,
        "unit_length": False,
    }
    return {"model": model, "image_size": size}


def _upsampler(folder: Path) -> Stage:
    """Returns the upsampler, whose last step is taken by a network of its own."""
    first, last = (_config(folder, f"super_res_{part}") for part in ("first", "last"))
    first.expect(in_channels=6, out_channels=3, add_attention=False, class_embed_type=None)
    unet = _unet(first)
    if unet != _unet(last):
        raise last.error("the two networks of the upsampler are not of one size")
    size = first.whole("sample_size")
    low_size = _config(folder, "decoder").whole("sample_size")
    entry = upsampler_entry(unet, size, low_size)
    entry |= _schedule(folder / "super_res_scheduler", "eps", False, steps=7, cfg_scale=1.0)
    rules = within("super_res_first/", "first.", names_diffusers.UNET)
    rules += within("super_res_last/", "last.", names_diffusers.UNET)
    parts = _inside(folder, ("super_res_first", "super_res_last"))
    return Stage(f"upsampler_{size}", entry, parts, rules)


def upsampler_entry(unet: Mapping[str, Any], size: int, low_size: int) -> dict[str, Any]:
    """Returns the upsampler's entry, but for how it is sampled."""
    return {
        "model": {"unet": unet, "learned_variance": False},
        "image_size": size,
        "low_size": low_size,
        "separate_last_step": True,
    }


def _unet(settings: Config) -> dict[str, Any]:
    """Returns our U-Net's settings from those of UNet2DConditionModel or UNet2DModel."""
    settings.expect(
        act_fn="silu",
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
        center_input_sample=False,
        time_embedding_type="positional",
        resnet_skip_time_act=False,
        mid_block_scale_factor=1,
        dropout=0.0,
        only_cross_attention=False,
        dual_cross_attention=False,
        use_linear_projection=False,
        resnet_time_scale_shift=("default", "scale_shift"),
    )
    simple = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
    down, widths = settings.texts("down_block_types"), settings.wholes("block_out_channels")
    if unknown := set(down) - set(simple):
        raise settings.error(f"a block {sorted(unknown)[0]!r} is not read here")
    # Our U-Net is symmetric and has one width a level, a multiple of the first.
    if down != [name.replace("Up", "Down") for name in reversed(settings.texts("up_block_types"))]:
        raise settings.error("up_block_types do not mirror down_block_types")
    if len(down) != len(widths) or any(width % widths[0] for width in widths):
        raise settings.error(
            f"block_out_channels {widths} are no multiples of the first, one a block"
        )
    return {
        "channels": widths[0],
        "channel_mults": [width // widths[0] for width in widths],
        "num_blocks": settings.whole("layers_per_block"),
        "attention_levels": [i for i, name in enumerate(down) if name == simple[1]],
        "head_channels": settings.whole("attention_head_dim", 8),
        "scale_shift": settings.text("resnet_time_scale_shift", "default") == "scale_shift",
        "groups": settings.whole("norm_num_groups", 32),
    }


def _schedule(
    folder: Path, prediction: str, learned_variance: bool, steps: int, cfg_scale: float
) -> dict[str, Any]:
    """Returns UnCLIPScheduler's settings as a stage's diffusion and sampling.

    Raises UserError if they are of a network that predicts something else.
    """
    settings = Config(folder / "scheduler_config.json")
    settings.expect(_class_name="UnCLIPScheduler", beta_schedule="squaredcos_cap_v2")
    # A setting that is missing has the scheduler's own default, which need not be this network's.
    wanted = {
        "prediction_type": ("epsilon", {"eps": "epsilon", "x_0": "sample"}[prediction]),
        "variance_type": (
            "fixed_small_log",
            "learned_range" if learned_variance else "fixed_small_log",
        ),
    }
    for key, (default, value) in wanted.items():
        if (setting := settings.text(key, default)) != value:
            raise settings.error(
                f"{key} is {setting!r}, but of this network {value!r}: copy it again"
            )
    bound = settings.number("clip_sample_range", 1.0)
    return schedule(
        prediction,
        learned_variance,
        steps,
        cfg_scale,
        bound if settings.values.get("clip_sample", True) else None,
        settings.whole("num_train_timesteps", 1000),
    )


def schedule(
    prediction: str,
    learned_variance: bool,
    steps: int,
    cfg_scale: float,
    bound: float | None,
    num_timesteps: int = 1000,
) -> dict[str, Any]:
    """Returns a stage's diffusion and sampling as Karlo and UnCLIPScheduler have them.

    x_0 is kept within the `bound`.
    """
    return {
        "diffusion": {
            "schedule": "cosine",
            "num_timesteps": num_timesteps,
            "prediction": prediction,
            "learned_variance": learned_variance,
        },
        "sampling": {
            "steps": steps,
            "solver": "ddpm",
            "cfg_scale": cfg_scale,
            "clip": None if bound is None else ["static", bound],
        },
    }

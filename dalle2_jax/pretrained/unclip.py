"""Karlo (kakaobrain/karlo-v1-alpha and its image variations), in the layout of diffusers.

Each network's settings are read from its own config.json, so that whatever was saved by
UnCLIPPipeline or UnCLIPImageVariationPipeline is read alike, at any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dalle2_jax.errors import UserError
from dalle2_jax.pretrained import diffusers
from dalle2_jax.pretrained.names import within
from dalle2_jax.pretrained.sources import Stage, expect, need, read_json

PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")


def stages(folder: Path) -> Iterator[Stage]:
    """What the pipeline in `folder` consists of, CLIP first. UserError: it is another network."""
    kind = read_json(folder / "model_index.json")["_class_name"]
    pictures = kind == "UnCLIPImageVariationPipeline"
    yield clip_stage(folder, "feature_extractor" if pictures else None)
    if kind == "UnCLIPPipeline":
        yield prior_stage(folder, "prior_scheduler")
    yield _decoder(folder)
    yield _upsampler(folder)


def clip_stage(folder: Path, processor: str | None) -> Stage:
    """CLIP's text tower in a pipeline's folder; its image tower too, where `processor` names the
    folder that says how its pictures are prepared. UserError: it is another network."""
    text = clip_tower(folder / "text_encoder")
    (context_length, vocab_size) = need(
        text.where, text.settings, "max_position_embeddings", "vocab_size"
    )
    model = {
        "dim": text.dim,
        "activation": text.activation,
        "unit_length": False,
        "learned_temperature": False,
        "text": {**text.sizes, "context_length": context_length, "vocab_size": vocab_size},
        "image": None,
    }
    parts, rules = ["text_encoder"], within("text_encoder/", "", diffusers.CLIP_TEXT)
    if processor:
        image = clip_tower(folder / "image_encoder")
        if (image.dim, image.activation) != (text.dim, text.activation):
            raise UserError(f"{image.where} and {text.where} are not of one CLIP")
        model["image"] = image_section(image, folder / processor)
        parts += ["image_encoder"]
        rules += within("image_encoder/", "", diffusers.CLIP_IMAGE)
    return Stage("clip", {"model": model}, _inside(folder, parts), rules)


class Tower(NamedTuple):
    where: str
    settings: Mapping[str, Any]
    dim: int
    activation: str
    sizes: dict[str, Any]


def clip_tower(folder: Path) -> Tower:
    """What transformers' settings say of a tower of CLIP."""
    where, settings = str(folder / "config.json"), read_json(folder / "config.json")
    expect(where, settings, hidden_act=("gelu", "quick_gelu"), layer_norm_eps=1e-5)
    dim, width, wide, depth, heads, activation = need(
        where,
        settings,
        "projection_dim",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
    )
    sizes = {"width": width, "depth": depth, "heads": heads, "mlp_ratio": wide / width}
    return Tower(where, settings, dim, activation, sizes)


def image_section(tower: Tower, extractor: Path) -> dict[str, Any]:
    """The config of the image tower, with what the processor does to a picture."""
    size, patch = need(tower.where, tower.settings, "image_size", "patch_size")
    told = read_json(extractor / "preprocessor_config.json")
    where = str(extractor / "preprocessor_config.json")
    expect(where, told, resample=3, do_center_crop=True, do_normalize=True)
    crop = told.get("crop_size", size)
    crop = crop.get("height") if isinstance(crop, Mapping) else crop
    if crop != size:
        raise UserError(f"{where}: pictures of {crop} px for a tower of {size} px")
    mean, std = need(where, told, "image_mean", "image_std")
    return {
        **tower.sizes,
        "image_size": size,
        "patch_size": patch,
        "mean": mean,
        "std": std,
        "resize": "bicubic",
    }


def prior_stage(folder: Path, scheduler: str) -> Stage:
    """The prior in a pipeline's folder, drawn as the folder `scheduler` says. UserError: it is
    another network."""
    where, told = str(folder / "prior" / "config.json"), read_json(folder / "prior" / "config.json")
    expect(
        where,
        told,
        additional_embeddings=4,
        dropout=0.0,
        time_embed_act_fn="silu",
        norm_in_type=None,
        embedding_proj_norm_type=None,
        encoder_hid_proj_type="linear",
        added_emb_type="prd",
        time_embed_dim=(
            None,
            told.get("num_attention_heads", 0) * told.get("attention_head_dim", 0),
        ),
    )
    dim, heads, channels, depth, length = need(
        where,
        told,
        "embedding_dim",
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "num_embeddings",
    )
    entry = prior_entry(dim, length, heads * channels, depth, heads)
    entry |= _schedule(folder / scheduler, steps=25, cfg_scale=4.0)
    return Stage("prior", entry, _inside(folder, ["prior"]), within("prior/", "", diffusers.PRIOR))


def prior_entry(dim: int, length: int, width: int, depth: int, heads: int) -> dict[str, Any]:
    """The prior's entry, but for how it is drawn."""
    model = {
        "dim": dim,
        "context_length": length,
        "width": width,
        "depth": depth,
        "heads": heads,
        "learned_null": False,
        "standardised": True,
        "activation": "gelu",
    }
    return {"model": model, "candidates": 1}


def _decoder(folder: Path) -> Stage:
    where = str(folder / "decoder" / "config.json")
    told, text = (read_json(folder / name / "config.json") for name in ("decoder", "text_proj"))
    expect(
        where,
        told,
        in_channels=3,
        out_channels=6,
        class_embed_type="identity",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        addition_embed_type=None,
        encoder_hid_dim_type=None,
    )
    extra_tokens = text.get("clip_extra_context_tokens", 4)
    dim, width = need(where, text, "clip_embeddings_dim", "cross_attention_dim")
    tower = read_json(folder / "text_encoder" / "config.json")
    length = tower.get("max_position_embeddings", 77)
    size = need(where, told, "sample_size")[0]
    entry = decoder_entry(dim, length, _unet(where, told), extra_tokens, width, size)
    entry |= _schedule(folder / "decoder_scheduler", steps=25, cfg_scale=8.0)
    rules = within("decoder/", "", diffusers.UNET)
    rules += within("text_proj/", "", diffusers.text_projection(extra_tokens))
    return Stage("decoder", entry, _inside(folder, ["decoder", "text_proj"]), rules)


def decoder_entry(
    dim: int, length: int, unet: Mapping[str, Any], extra_tokens: int, text_width: int, size: int
) -> dict[str, Any]:
    """The decoder's entry, but for how it is drawn."""
    model = {
        "dim": dim,
        "context_length": length,
        "unet": unet,
        "text": None,
        "extra_tokens": extra_tokens,
        "learned_variance": True,
        "learned_null": False,
        "text_projection": text_width,
        "z_txt_in_time": True,
        "unit_length": False,
    }
    return {"model": model, "image_size": size}


def _upsampler(folder: Path) -> Stage:
    """The last of its steps is taken by a network of its own."""
    names = ("super_res_first", "super_res_last")
    first, last = (read_json(folder / name / "config.json") for name in names)
    where = str(folder / names[0] / "config.json")
    expect(where, first, in_channels=6, out_channels=3, add_attention=False, class_embed_type=None)
    unet = _unet(where, first)
    if unet != _unet(str(folder / names[1] / "config.json"), last):
        raise UserError(f"{where}: the two networks of the upsampler are not of one size")
    size = need(where, first, "sample_size")[0]
    low_size = read_json(folder / "decoder" / "config.json")["sample_size"]
    entry = upsampler_entry(unet, size, low_size)
    entry |= _schedule(folder / "super_res_scheduler", steps=7, cfg_scale=1.0)
    rules = within("super_res_first/", "first.", diffusers.UNET)
    rules += within("super_res_last/", "last.", diffusers.UNET)
    return Stage(f"upsampler_{size}", entry, _inside(folder, names), rules)


def upsampler_entry(unet: Mapping[str, Any], size: int, low_size: int) -> dict[str, Any]:
    """The upsampler's entry, but for how it is drawn."""
    return {
        "model": {"unet": unet, "learned_variance": False},
        "image_size": size,
        "low_size": low_size,
        "separate_last_step": True,
    }


def _inside(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    return {name: folder / name for name in names}


def _unet(where: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """UNet2DConditionModel's or UNet2DModel's settings -> ours."""
    simple = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
    expect(
        where,
        told,
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
    down, up, blocks, widths = need(
        where, told, "down_block_types", "up_block_types", "layers_per_block", "block_out_channels"
    )
    if list(down) != [name.replace("Up", "Down") for name in reversed(up)]:
        raise UserError(f"{where}: up_block_types do not mirror down_block_types")
    if unknown := set(down) - set(simple):
        raise UserError(f"{where}: a block {sorted(unknown)[0]!r} is not read here")
    if any(width % widths[0] for width in widths):
        raise UserError(f"{where}: block_out_channels {widths} are no multiples of the first")
    return {
        "channels": widths[0],
        "channel_mults": [width // widths[0] for width in widths],
        "num_blocks": blocks,
        "attention_levels": [i for i, name in enumerate(down) if name == simple[1]],
        "head_channels": told.get("attention_head_dim") or 8,
        "scale_shift": told.get("resnet_time_scale_shift") == "scale_shift",
        "groups": told.get("norm_num_groups", 32),
    }


def _schedule(folder: Path, steps: int, cfg_scale: float) -> dict[str, Any]:
    """UnCLIPScheduler's settings as a stage's diffusion and sampling."""
    where = str(folder / "scheduler_config.json")
    told = read_json(folder / "scheduler_config.json")
    expect(
        where,
        told,
        _class_name="UnCLIPScheduler",
        beta_schedule="squaredcos_cap_v2",
        variance_type=("fixed_small_log", "learned_range"),
        prediction_type=("epsilon", "sample"),
    )
    predictions = {"epsilon": "eps", "sample": "x_0"}
    return schedule(
        predictions[told.get("prediction_type", "epsilon")],
        told.get("variance_type") == "learned_range",
        steps,
        cfg_scale,
        told.get("clip_sample_range", 1.0) if told.get("clip_sample", True) else None,
        told.get("num_train_timesteps", 1000),
    )


def schedule(
    prediction: str,
    learned_variance: bool,
    steps: int,
    cfg_scale: float,
    bound: float | None,
    num_timesteps: int = 1000,
) -> dict[str, Any]:
    """A stage's diffusion and sampling, as Karlo's own code and diffusers' UnCLIPScheduler have it;
    x_0 is kept within the `bound`."""
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
            "spacing": "even",
            "variance": "small",
        },
    }

"""Karlo as its authors saved it (kakaobrain/karlo): a checkpoint a stage, and CLIP's statistics.

No settings lie beside the tensors: sizes are read from their shapes, all else is what configs/ and
karlo/sampler/template.py (its "fast" setting) of that repository say.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dalle2_jax.errors import UserError
from dalle2_jax.pretrained import karlo_diffusers, names_adm
from dalle2_jax.pretrained.clip import openai_stage
from dalle2_jax.pretrained.names import SAME, within
from dalle2_jax.pretrained.sources import Stage, network, sizes_of

PRIOR, DECODER, UPSAMPLER = "prior*.ckpt", "decoder*.ckpt", "improved-sr*.ckpt"
CLIP = "ViT-L-14.pt"
STATISTICS = "*stats.th"  # mean and standard deviation of z_img
IMAGE_SIZE, UPSAMPLED_SIZE = 64, 256


def is_here(folder: Path) -> bool:
    """Returns whether the folder holds one of Karlo's checkpoints."""
    return any(any(folder.glob(pattern)) for pattern in (PRIOR, DECODER, UPSAMPLER))


def stages(folder: Path) -> Iterator[Stage]:
    """Yields the stages of the model in `folder`, CLIP first.

    Raises UserError if a file is missing or holds another network.
    """
    files = [_one(folder, pattern) for pattern in (PRIOR, STATISTICS, DECODER, UPSAMPLER)]
    prior, statistics, decoder, upsampler = files
    clip = clip_stage(folder)
    yield clip
    yield _prior(prior, statistics)
    yield _decoder(decoder, clip.entry["model"]["text"]["context_length"])
    yield _upsampler(upsampler)


def clip_stage(folder: Path) -> Stage:
    """The CLIP beside the checkpoints: OpenAI's file, or its text tower as transformers saves it.
    UserError: there is neither."""
    if (folder / "text_encoder").is_dir():
        return karlo_diffusers.clip_stage(folder, None)
    if not (folder / CLIP).is_file():
        raise UserError(
            f"{folder}/{CLIP} is missing: put OpenAI's file or transformers' text_encoder there"
        )
    return openai_stage(folder / CLIP, unit_length=False)


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"{folder}/{pattern} is missing: copy the whole model again")
    if len(found) > 1:
        raise UserError(f"{folder}/{pattern} are {len(found)} files: leave one of them there")
    return found[0]


def _prior(path: Path, statistics: Path) -> Stage:
    shapes = _shapes(path, "model.")
    with sizes_of(path):
        length, width = shapes["positional_embedding"][1:]
        depth = len([name for name in shapes if name.endswith(".ln_1.weight")])
        dim, heads = shapes["out_proj.weight"][0], width // names_adm.HEAD_CHANNELS
        entry = karlo_diffusers.prior_entry(dim, length - 4, width, depth, heads)
    entry |= karlo_diffusers.schedule("x_0", False, steps=25, cfg_scale=4.0, bound=10.0)
    rules = within("prior/model.", "", names_adm.PRIOR)
    rules += [("statistics/0", "mean", SAME), ("statistics/1", "std", SAME)]
    return Stage("prior", entry, {"prior": path, "statistics": statistics}, rules)


def _decoder(path: Path, context_length: int) -> Stage:
    shapes = _shapes(path, "model.")
    with sizes_of(path):
        unet = names_adm.unet_section(shapes)
        width, dim = shapes["text_seq_proj.0.weight"][0], shapes["clip_emb.weight"][1]
        extra_tokens = shapes["clip_tok_proj.weight"][0] // width
    args = (dim, context_length, unet, extra_tokens, width, IMAGE_SIZE)
    entry = karlo_diffusers.decoder_entry(*args)
    entry |= karlo_diffusers.schedule("eps", True, steps=25, cfg_scale=8.0, bound=1.0)
    rules = [*names_adm.unet(unet), *names_adm.conditions(extra_tokens)]
    return Stage("decoder", entry, {"decoder": path}, within("decoder/model.", "", rules))


def _upsampler(path: Path) -> Stage:
    """The last of its steps is taken by a network of its own."""
    parts = {"model_first_steps.": "first.", "model_last_step.": "last."}
    rules, unets = [], []
    for theirs, ours in parts.items():
        with sizes_of(path):
            unets.append(names_adm.unet_section(_shapes(path, theirs)))
        rules += within(f"upsampler/{theirs}", ours, names_adm.unet(unets[-1]))
    if unets[0] != unets[1]:
        raise UserError(f"{path}: the two networks of the upsampler are not of one size")
    entry = karlo_diffusers.upsampler_entry(unets[0], UPSAMPLED_SIZE, IMAGE_SIZE)
    entry |= karlo_diffusers.schedule("eps", False, steps=7, cfg_scale=1.0, bound=1.0)
    return Stage(f"upsampler_{UPSAMPLED_SIZE}", entry, {"upsampler": path}, rules)


def _shapes(path: Path, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors below a name."""
    read: dict[str, Any] = {k: v for k, v in network(path).items() if k.startswith(prefix)}
    return {name.removeprefix(prefix): tensor().shape for name, tensor in read.items()}

"""The decoder: un-noising small pictures given z_img and the caption (unCLIP section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax import images
from dalle2_jax.diffusion.process import Process
from dalle2_jax.nets.clip import normalise, text_mask
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.forward import forward
from dalle2_jax.options import check_range, construct
from dalle2_jax.sampling.decoder import DecoderSampler
from dalle2_jax.sampling.stage import Settings
from dalle2_jax.tasks import previews
from dalle2_jax.tasks.denoising import denoising_loss, make_sampler, stage_entry
from dalle2_jax.tasks.frozen_clip import (
    FrozenCLIP,
    check_captions,
    check_pictures,
    check_transformer,
)
from dalle2_jax.types import Array, Batch, Metrics, Params


@dataclasses.dataclass(frozen=True)
class DecoderTask:
    network: Decoder
    process: Process
    clip: FrozenCLIP
    sampler: DecoderSampler
    entry: Mapping[str, Any]
    image_size: int
    drop_z_img: float = 0.1
    drop_caption: float = 0.5
    noise_z_img: float = 0.0  # most that z_img is disturbed in training, see `disturb`
    stage: str = dataclasses.field(default="decoder", init=False)
    SECTIONS: ClassVar = {"sampling": Settings}

    def __post_init__(self) -> None:
        drops = {"drop_z_img": self.drop_z_img, "drop_caption": self.drop_caption}
        check_range("config.task", 0, 1, **drops)
        check_range("config.task", 0, noise_z_img=self.noise_z_img)
        check_range("config.task", 1, image_size=self.image_size)

    def init(self, key: Array) -> Params:
        inputs = self.network.init_inputs(self.clip.network.text["width"])
        return self.network.init(key, *inputs)["params"]

    def frozen(self) -> Params:
        return {"clip": self.clip.params()}

    @property
    def vocab_size(self) -> int:
        return (self.network.text or self.clip.network.text)["vocab_size"]

    def condition(self, frozen: Params, batch: Batch) -> dict[str, Array]:
        """What `nets.decoder.Decoder` is told of a batch, nothing dropped."""
        pictures, tokens = images.to_float(batch["image"]), batch["tokens"]
        cond = {
            "z_img": self.clip.encode_image(frozen["clip"], pictures),
            "z_mask": jnp.ones(tokens.shape[:1], bool),
            "txt_mask": text_mask(tokens, self.vocab_size - 1),
        }
        if self.network.text is None:
            return cond | {"txt_enc": self.clip.encode_text(frozen["clip"], tokens).txt_enc}
        return cond | {"tokens": tokens}

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        key_z, key_txt, key_loss, key_dropout, key_noise = jax.random.split(key, 5)
        cond = self.condition(frozen, batch)
        if train:
            b = batch["tokens"].shape[0]
            keep_z = jax.random.uniform(key_z, (b,)) >= self.drop_z_img
            keep_txt = jax.random.uniform(key_txt, (b,)) >= self.drop_caption
            cond["z_mask"] &= keep_z
            cond["txt_mask"] &= keep_txt[:, None]
            if self.noise_z_img:
                cond["z_img"] = disturb(key_noise, cond["z_img"], self.noise_z_img)

        def apply(x_t: Array, t: Array) -> Array:
            rngs = {"dropout": key_dropout}
            return forward(self.network, params, x_t, t, cond, train, rngs=rngs)

        x_0 = images.resize(images.to_float(batch["image"]), self.image_size, "area")
        return denoising_loss(self.process, apply, x_0, key_loss)

    def preview(
        self, params: Params, frozen: Params, batch: Batch, key: Array, rows: int
    ) -> dict[str, Array]:
        """Each true picture beside the one drawn from its z_img and caption."""
        batch = previews.first(batch, rows)
        keys = jax.random.split(key, batch["tokens"].shape[0])
        drawn = self.sampler(params, self.condition(frozen, batch), keys)
        true = images.resize(images.to_float(batch["image"]), self.image_size, "area")
        return {"decoder": previews.side_by_side(true, drawn)}

    def export(self, params: Params) -> tuple[Mapping[str, Any], Params]:
        return self.entry, params


def disturb(key: Array, z: Array, most: float) -> Array:
    """Unit vectors [b, dim] moved by noise of a length drawn from [0, most], and unit again.

    A prior errs, the more the less it knows what is asked; a decoder that has seen true z_img alone
    follows its errors and heeds the caption little (conditioning augmentation, 2106.15282).
    """
    key_length, key_direction = jax.random.split(key)
    length = jax.random.uniform(key_length, (z.shape[0], 1), maxval=most)
    return normalise(z + length * jax.random.normal(key_direction, z.shape) / z.shape[1] ** 0.5)


SECTIONS = {"task": DecoderTask, "model": Decoder, "diffusion": Process}


def from_config(config: Any) -> DecoderTask:
    options = {key: config.task[key] for key in config.task if key not in ("name", "sampling")}
    network = construct(Decoder, config.model, "config.model")
    if network.text is not None:
        check_captions(config, network.text, "config.model.text")
        activation = network.text.get("activation", "gelu")
        check_transformer("config.model.text", network.text, activation)
    process = construct(Process, config.diffusion, "config.diffusion")
    size = {"image_size": config.task.get("image_size", 1)}  # `construct` tells where it lacks
    task = construct(
        DecoderTask,
        options,
        "config.task",
        network=network,
        process=process,
        clip=FrozenCLIP.load(config, reads_captions=network.text is None),
        sampler=make_sampler(DecoderSampler, config, network, process, **size),
        entry={},
    )
    check_pictures(config, task.image_size, "config.task")
    entry = stage_entry(config, image_size=task.image_size, clip=task.clip.hash)
    return dataclasses.replace(task, entry=entry)

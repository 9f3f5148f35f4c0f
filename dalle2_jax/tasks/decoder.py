"""The decoder: un-noising small pictures given z_img and the caption (unCLIP section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax import images
from dalle2_jax.diffusion.process import Process
from dalle2_jax.nets.clip import text_mask
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.forward import forward
from dalle2_jax.options import check_range, construct
from dalle2_jax.sampling.decoder import DecoderSampler
from dalle2_jax.sampling.stage import Settings
from dalle2_jax.tasks.denoising import denoising_loss, sampling_settings, side_by_side, stage_entry
from dalle2_jax.tasks.frozen_clip import FrozenCLIP, check_captions, check_transformer
from dalle2_jax.types import Array, Batch, Metrics, Params


@dataclasses.dataclass(frozen=True)
class DecoderTask:
    network: Decoder
    process: Process
    clip: FrozenCLIP
    sampling: Settings
    entry: Mapping[str, Any]
    image_size: int
    drop_z_img: float = 0.1
    drop_caption: float = 0.5
    stage: str = dataclasses.field(default="decoder", init=False)
    SECTIONS: ClassVar = {"sampling": Settings}

    def __post_init__(self) -> None:
        drops = {"drop_z_img": self.drop_z_img, "drop_caption": self.drop_caption}
        check_range("config.task", 0, 1, **drops)
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
        key_z, key_txt, key_loss, key_dropout = jax.random.split(key, 4)
        cond = self.condition(frozen, batch)
        if train:
            b = batch["tokens"].shape[0]
            keep_z = jax.random.uniform(key_z, (b,)) >= self.drop_z_img
            keep_txt = jax.random.uniform(key_txt, (b,)) >= self.drop_caption
            cond["z_mask"] &= keep_z
            cond["txt_mask"] &= keep_txt[:, None]

        def apply(x_t: Array, t: Array) -> Array:
            rngs = {"dropout": key_dropout}
            return forward(self.network, params, x_t, t, cond, train, rngs=rngs)

        x_0 = images.resize(images.to_float(batch["image"]), self.image_size, "area")
        return denoising_loss(self.process, apply, x_0, key_loss)

    def preview(self, params: Params, frozen: Params, batch: Batch, key: Array) -> dict[str, Array]:
        """Each true picture beside the one drawn from its z_img and caption."""
        sampler = DecoderSampler(self.network, self.process, self.sampling, self.image_size)
        keys = jax.random.split(key, batch["tokens"].shape[0])
        drawn = sampler(params, self.condition(frozen, batch), keys)
        true = images.resize(images.to_float(batch["image"]), self.image_size, "area")
        return {"decoder": side_by_side(true, drawn)}

    def export(self, params: Params) -> tuple[Mapping[str, Any], Params]:
        return self.entry, params


SECTIONS = {"task": DecoderTask, "model": Decoder, "diffusion": Process}


def from_config(config: Any) -> DecoderTask:
    options = {key: config.task[key] for key in config.task if key not in ("name", "sampling")}
    network = construct(Decoder, config.model, "config.model")
    if network.text is not None:
        check_captions(config, network.text, "config.model.text")
        activation = network.text.get("activation", "gelu")
        check_transformer("config.model.text", network.text, activation)
    process = construct(Process, config.diffusion, "config.diffusion")
    task = construct(
        DecoderTask,
        options,
        "config.task",
        network=network,
        process=process,
        clip=FrozenCLIP.load(config, reads_captions=network.text is None),
        sampling=sampling_settings(config, process),
        entry={},
    )
    entry = stage_entry(config, image_size=task.image_size, clip=task.clip.hash)
    return dataclasses.replace(task, entry=entry)

"""The decoder: un-noising small images given z_img and the caption (unCLIP section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion.process import Process
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import arrays
from dalle2_jax.nets.clip import normalise
from dalle2_jax.nets.conditioning import decoder_condition
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.forward import forward
from dalle2_jax.nets.unet import KNOWN
from dalle2_jax.sampling.decoder import DecoderSampler
from dalle2_jax.sampling.settings import Settings
from dalle2_jax.sampling.stage import finish
from dalle2_jax.tasks.shared import previews
from dalle2_jax.tasks.shared.denoising import (
    denoising_loss,
    known_in_part,
    make_sampler,
    stage_entry,
)
from dalle2_jax.tasks.shared.frozen_clip import (
    FrozenCLIP,
    check_captions,
    check_images,
    check_transformer,
)
from dalle2_jax.types import Array, Batch, Metrics, Params
from dalle2_jax.validation.sections import check_numbers, check_whole_numbers, construct


@dataclasses.dataclass(frozen=True)
class DecoderTask:
    """Trains the decoder.

    Attributes:
        image_size: side of its images in pixels.
        drop_z_img, drop_caption: shares that are left out in training, for guidance.
        noise_z_img: most that z_img is disturbed in training, see `disturb`.
        nothing_known: with model.inpaints, share of the images of which nothing is known.
        most_moved: with model.inpaints, most that the others are moved over white, as a share of
            the side; for images of single things on white.
    """

    network: Decoder
    process: Process
    clip: FrozenCLIP
    sampler: DecoderSampler
    entry: Mapping[str, Any]
    image_size: int
    drop_z_img: float = 0.1
    drop_caption: float = 0.5
    noise_z_img: float = 0.0
    nothing_known: float = 0.5
    most_moved: float = 0.0
    stage: str = dataclasses.field(default="decoder", init=False)
    SECTIONS: ClassVar = {"sampling": Settings}

    def __post_init__(self) -> None:
        check_numbers(
            "config.task",
            0,
            1,
            drop_z_img=self.drop_z_img,
            drop_caption=self.drop_caption,
            nothing_known=self.nothing_known,
            most_moved=self.most_moved,
        )
        check_numbers("config.task", 0, noise_z_img=self.noise_z_img)
        check_whole_numbers("config.task", 1, image_size=self.image_size)

    def init(self, key: Array) -> Params:
        inputs = self.network.init_inputs(self.clip.network.text["width"])
        return self.network.init(key, *inputs)["params"]

    @property
    def optional_layer(self) -> str:
        return KNOWN if self.network.inpaints else ""

    def trainable(self, path: str) -> bool:
        return True

    def frozen(self) -> Params:
        return {"clip": self.clip.params()}

    def condition(
        self, frozen: Params, batch: Batch, keep_txt: Array | None = None, guided: bool = False
    ) -> dict[str, Any]:
        """Returns the condition of `nets.decoder.Decoder` for a batch.

        Captions are left out where `keep_txt` [b] is False. `guided`: the condition also carries
        what guidance moves away from.
        """
        clip, tokens = frozen["clip"], batch["tokens"]
        z_img = self.clip.encode_image(clip, arrays.to_float(batch["image"]))
        text, empty, learned = None, None, self.network.learned_null
        if self.network.text is None:
            # Without a learned null a dropped caption is the empty one, encoded. With one,
            # `decoder_condition` clears its mask.
            text = self.clip.encode_text(clip, tokens, None if learned else keep_txt)
        if guided and not learned:
            empty = self.clip.encode_text(clip, tokens, jnp.zeros(z_img.shape[:1], bool))
        return decoder_condition(self.network, z_img, text, tokens, keep_txt, empty)

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        key_z, key_txt, key_loss, key_dropout, key_noise, key_known = jax.random.split(key, 6)
        b = batch["tokens"].shape[0]
        keep_txt = jax.random.uniform(key_txt, (b,)) >= self.drop_caption
        # Nothing is dropped in evaluation: its loss is that of the conditional network.
        cond = self.condition(frozen, batch, keep_txt if train else None)
        if train:
            # Independent of the caption's: the network learns all four combinations.
            cond["z_mask"] &= jax.random.uniform(key_z, (b,)) >= self.drop_z_img
            if self.noise_z_img:
                cond["z_img"] = disturb(key_noise, cond["z_img"], self.noise_z_img)
        x_0 = arrays.resize(arrays.to_float(batch["image"]), self.image_size, "area")
        if train and self.network.inpaints:
            shares = self.nothing_known, self.most_moved
            # z_img stays that of the unmoved image.
            x_0, cond["known"] = known_in_part(key_known, x_0, *shares)

        def apply(x_t: Array, t: Array) -> Array:
            rngs = {"dropout": key_dropout}
            return forward(self.network, params, x_t, t, cond, train, rngs=rngs)

        return denoising_loss(self.process, apply, x_0, key_loss)

    def preview(
        self, params: Params, frozen: Params, batch: Batch, key: Array, rows: int
    ) -> dict[str, Array]:
        """Shows each true image beside the one sampled from its z_img and caption."""
        batch = previews.first(batch, rows)
        keys = jax.random.split(key, batch["tokens"].shape[0])
        cond = self.condition(frozen, batch, guided=True)
        samples = finish(self.sampler(params, cond, keys))
        true = arrays.resize(arrays.to_float(batch["image"]), self.image_size, "area")
        return {"decoder": previews.side_by_side(true, samples)}

    def export(self, params: Params) -> tuple[Mapping[str, Any], Params]:
        return self.entry, params


def disturb(key: Array, z: Array, most: float) -> Array:
    """Moves z [b, dim] by noise of up to `most` of its length, and scales it to that length again.

    A prior errs, and the more the less it knows of what is asked for; a decoder that has seen only
    true z_img follows its errors and pays little attention to the caption (conditioning
    augmentation, 2106.15282).
    """
    key_length, key_direction = jax.random.split(key)
    share = jax.random.uniform(key_length, (z.shape[0], 1), maxval=most)
    # Of length about 1, since each of dim coordinates has variance 1 / dim.
    noise = jax.random.normal(key_direction, z.shape) / z.shape[1] ** 0.5
    return jnp.linalg.norm(z, axis=1, keepdims=True) * normalise(normalise(z) + share * noise)


SECTIONS = {"task": DecoderTask, "model": Decoder, "diffusion": Process}


def from_config(config: Any) -> DecoderTask:
    options = {key: config.task[key] for key in config.task if key not in ("name", "sampling")}
    network = construct(Decoder, config.model, "config.model")
    if network.text is not None:
        check_captions(config, network.text, "config.model.text")
        activation = network.text.get("activation", "gelu")
        check_transformer("config.model.text", network.text, activation)
        if network.z_txt_in_time or not network.learned_null:
            raise UserError(
                "config.model.text is a text encoder of the decoder's own, but z_txt_in_time and a "
                "null that is not learned (learned_null) are of CLIP's: set text to None"
            )
    process = construct(Process, config.diffusion, "config.diffusion")
    clip = FrozenCLIP.load(config, reads_captions=network.text is None)
    if network.unit_length != clip.network.unit_length:
        raise UserError(
            f"config.model.unit_length={network.unit_length}, but the CLIP of {clip.folder} has "
            f"{clip.network.unit_length}: set --config.model.unit_length={clip.network.unit_length}"
        )
    size = {"image_size": config.task.get("image_size", 1)}  # if missing, `construct` says so
    task = construct(
        DecoderTask,
        options,
        "config.task",
        network=network,
        process=process,
        clip=clip,
        sampler=make_sampler(DecoderSampler, config, network, process, **size),
        entry={},
    )
    check_images(config, task.image_size, "config.task")
    entry = stage_entry(config, image_size=task.image_size, clip=task.clip.hash)
    return dataclasses.replace(task, entry=entry)

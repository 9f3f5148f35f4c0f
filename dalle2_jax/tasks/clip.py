"""CLIP: symmetric cross-entropy over the pairs of a batch (2103.00020, section 2.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import arrays
from dalle2_jax.nets.clip import CLIP
from dalle2_jax.nets.forward import forward
from dalle2_jax.tasks.shared import previews, sam
from dalle2_jax.tasks.shared.contrastive import contrast
from dalle2_jax.tasks.shared.frozen_clip import check_captions, check_images, check_transformer
from dalle2_jax.types import Array, Batch, Metrics, Params
from dalle2_jax.validation.sections import (
    check_numbers,
    check_whole_numbers,
    construct,
    to_json_values,
)


@dataclasses.dataclass(frozen=True)
class CLIPTask:
    """Trains CLIP by its contrastive loss over the global batch, with SAM if `sam_rho` is set.

    Attributes:
        max_shift: images are shifted at random by up to this many pixels, with edges repeated.
        sam_rho: how far SAM moves the weights before the gradient is taken; 0 is off.
        sam_replica_batch: pairs of a replica, for which SAM moves the weights together; those of
            one chip.
        sam_recompute: recomputes moved weights instead of keeping them, see `sam`.
    """

    network: CLIP
    model: Mapping[str, Any]
    max_shift: int = 0
    sam_rho: float = 0.0
    sam_replica_batch: int = 64
    sam_recompute: bool = False
    stage: str = dataclasses.field(default="clip", init=False)
    optional_layer: str = dataclasses.field(default="", init=False)

    def __post_init__(self) -> None:
        check_numbers("config.task", 0, max_shift=self.max_shift, sam_rho=self.sam_rho)
        check_whole_numbers("config.task", 2, sam_replica_batch=self.sam_replica_batch)

    def init(self, key: Array) -> Params:
        return self.network.init(key, *self.network.init_inputs())["params"]

    def trainable(self, path: str) -> bool:
        return True

    def frozen(self) -> Params:
        return {}

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        """Returns the loss over all pairs of the global batch, however devices split it.

        With SAM it is the loss at the moved weights, and the scale the mean over replicas.
        """
        images = arrays.to_float(batch["image"])
        if train and self.max_shift:
            images = random_shift(key, images, self.max_shift)
        # After the shift, which therefore may be a fraction of a pixel of what CLIP sees.
        images = arrays.resize(images, self.network.image["image_size"], "area")
        inputs = images, batch["tokens"]
        if train and self.sam_rho:
            z_img, z_txt, scale = sam.encode_perturbed(
                self._encode,
                lambda out: contrast(*out).loss,
                params,
                inputs,
                self.sam_rho,
                self.sam_replica_batch,
                self.network.dtype,
                self.sam_recompute,
            )
        else:
            z_img, z_txt, scale = self._encode(params, inputs)
        # With SAM, too, over the global batch: replicas meet again here, each with its own scale.
        loss, image_to_text, text_to_image = contrast(z_img, z_txt, scale)
        metrics = {"image_to_text": image_to_text, "text_to_image": text_to_image}
        return loss, {**metrics, "logit_scale": scale.mean()}

    def _encode(self, params: Params, inputs: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """(images, tokens) -> (z_img [b, d], z_txt [b, d], scale [b])."""
        z_img, z_txt, scale = forward(self.network, params, *inputs)
        return z_img, z_txt, jnp.broadcast_to(scale, z_img.shape[:1])

    def preview(
        self, params: Params, frozen: Params, batch: Batch, key: Array, rows: int
    ) -> dict[str, Array]:
        """Shows each caption's own image, then those of the batch that CLIP finds nearest to it."""
        images = arrays.to_float(batch["image"])
        small = arrays.resize(images, self.network.image["image_size"], "area")
        z_img, z_txt, _ = forward(self.network, params, small, batch["tokens"])
        return {"clip": previews.nearest(images, z_img, z_txt[:rows])}

    def export(self, params: Params) -> tuple[Mapping[str, Any], Params]:
        return {"model": self.model}, params


def random_shift(key: Array, images: Array, most: int) -> Array:
    """Moves each image [b, h, w, c] by up to `most` pixels either way, edges repeated."""
    # Corner (most, most) is the unmoved image.
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * most + 1)
    return arrays.crop(padded, corners, images.shape[1])


SECTIONS = {"task": CLIPTask, "model": CLIP}


def from_config(config: Any) -> CLIPTask:
    if config.batch_size < 2:
        raise UserError(
            f"config.batch_size={config.batch_size}: a contrastive loss needs 2 at least"
        )
    options = {key: value for key, value in config.task.items() if key != "name"}
    network = construct(CLIP, config.model, "config.model")
    check_captions(config, network.text, "config.model.text")
    check_images(config, network.image["image_size"], "config.model.image")
    for name in ("image", "text"):
        check_transformer(f"config.model.{name}", config.model[name], network.activation)
    task = construct(
        CLIPTask, options, "config.task", network=network, model=to_json_values(config.model)
    )
    # That each chip's part is a multiple as well can only be checked on a mesh: `encode_perturbed`
    # does.
    if task.sam_rho and config.batch_size % task.sam_replica_batch:
        raise UserError(
            f"config.batch_size={config.batch_size} is not a multiple of "
            f"config.task.sam_replica_batch={task.sam_replica_batch}"
        )
    return task

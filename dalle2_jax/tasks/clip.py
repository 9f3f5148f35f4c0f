"""CLIP: symmetric cross-entropy over the pairs of a batch (2103.00020, section 2.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle2_jax import images
from dalle2_jax.errors import UserError
from dalle2_jax.nets.clip import CLIP
from dalle2_jax.nets.forward import forward
from dalle2_jax.options import check_range, construct, plain
from dalle2_jax.tasks import previews
from dalle2_jax.tasks.frozen_clip import check_captions, check_pictures, check_transformer
from dalle2_jax.types import Array, Batch, Metrics, Params


@dataclasses.dataclass(frozen=True)
class CLIPTask:
    network: CLIP
    model: Mapping[str, Any]
    max_shift: int = 0  # pictures are moved at random by up to so many pixels, edges repeated
    stage: str = dataclasses.field(default="clip", init=False)

    def __post_init__(self) -> None:
        check_range("config.task", 0, max_shift=self.max_shift)

    def init(self, key: Array) -> Params:
        return self.network.init(key, *self.network.init_inputs())["params"]

    def frozen(self) -> Params:
        return {}

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        """Under jit the batch is global, and so are the logits: b x b over all devices."""
        pictures = images.to_float(batch["image"])
        if train and self.max_shift:
            pictures = random_shift(key, pictures, self.max_shift)
        pictures = images.resize(pictures, self.network.image["image_size"], "area")
        z_img, z_txt, scale = forward(self.network, params, pictures, batch["tokens"])
        logits = scale * z_img @ z_txt.T  # image by text
        labels = jnp.arange(logits.shape[0])
        both = (logits, logits.T)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        losses = [cross_entropy(side, labels).mean() for side in both]
        hits = [(jnp.argmax(side, axis=1) == labels).mean() for side in both]
        metrics = {"image_to_text": hits[0], "text_to_image": hits[1], "logit_scale": scale}
        return (losses[0] + losses[1]) / 2, metrics

    def preview(
        self, params: Params, frozen: Params, batch: Batch, key: Array, rows: int
    ) -> dict[str, Array]:
        """Each caption's own picture, then those of the batch that CLIP finds nearest to it."""
        pictures = images.to_float(batch["image"])
        small = images.resize(pictures, self.network.image["image_size"], "area")
        z_img, z_txt, _ = forward(self.network, params, small, batch["tokens"])
        return {"clip": previews.nearest(pictures, z_img, z_txt[:rows])}

    def export(self, params: Params) -> tuple[Mapping[str, Any], Params]:
        return {"model": self.model}, params


def random_shift(key: Array, pictures: Array, most: int) -> Array:
    """Moves each picture [b, h, w, c] by up to `most` pixels either way, edges repeated."""
    padded = jnp.pad(pictures, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (pictures.shape[0], 2), 0, 2 * most + 1)
    return images.crop(padded, corners, pictures.shape[1])


SECTIONS = {"task": CLIPTask, "model": CLIP}


def from_config(config: Any) -> CLIPTask:
    if config.batch_size < 2:
        raise UserError(
            f"config.batch_size={config.batch_size}: a contrastive loss needs 2 at least"
        )
    options = {key: value for key, value in config.task.items() if key != "name"}
    network = construct(CLIP, config.model, "config.model")
    check_captions(config, network.text, "config.model.text")
    check_pictures(config, network.image["image_size"], "config.model.image")
    for name in ("image", "text"):
        check_transformer(f"config.model.{name}", config.model[name], network.activation)
    return construct(CLIPTask, options, "config.task", network=network, model=plain(config.model))

"""The diffusion prior: mean squared error on z_img itself (unCLIP section 2.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from dalle2_jax import images
from dalle2_jax.diffusion.process import Process
from dalle2_jax.nets.clip import TextEncoding
from dalle2_jax.nets.forward import forward
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.options import check_range, construct
from dalle2_jax.sampling.prior import PriorSampler
from dalle2_jax.sampling.stage import Settings
from dalle2_jax.tasks import previews
from dalle2_jax.tasks.denoising import denoising_loss, make_sampler, stage_entry
from dalle2_jax.tasks.frozen_clip import FrozenCLIP, check_transformer
from dalle2_jax.types import Array, Batch, Metrics, Params


@dataclasses.dataclass(frozen=True)
class PriorTask:
    """x_0 is z_img * embedding_scale, which brings a coordinate to a deviation of about 0.54,
    as pixels in [-1, 1] have it: 17.2 at 1,024 dimensions (section 2.2), 0.54 sqrt(dim) at others.
    """

    network: DiffusionPrior
    process: Process
    clip: FrozenCLIP
    sampler: PriorSampler
    entry: Mapping[str, Any]
    embedding_scale: float
    drop_caption: float = 0.1
    stage: str = dataclasses.field(default="prior", init=False)
    SECTIONS: ClassVar = {"sampling": Settings}

    def __post_init__(self) -> None:
        check_range("config.task", 0, 1, drop_caption=self.drop_caption)
        check_range("config.task", 1e-6, embedding_scale=self.embedding_scale)

    def init(self, key: Array) -> Params:
        inputs = self.network.init_inputs(self.clip.network.text["width"])
        return self.network.init(key, *inputs)["params"]

    def frozen(self) -> Params:
        return {"clip": self.clip.params()}

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        z_img = self.clip.encode_image(frozen["clip"], images.to_float(batch["image"]))
        text: TextEncoding = self.clip.encode_text(frozen["clip"], batch["tokens"])
        key_drop, key_loss = jax.random.split(key)
        keep = jax.random.uniform(key_drop, (z_img.shape[0],)) >= self.drop_caption
        txt_mask = text.txt_mask & keep[:, None] if train else text.txt_mask

        def apply(x_t: Array, t: Array) -> Array:
            return forward(self.network, params, x_t, t, text.z_txt, text.txt_enc, txt_mask)

        return denoising_loss(self.process, apply, z_img * self.embedding_scale, key_loss)

    def preview(
        self, params: Params, frozen: Params, batch: Batch, key: Array, rows: int
    ) -> dict[str, Array]:
        """Each caption's own picture, then those of the batch nearest to the z_img drawn for it."""
        pictures = images.to_float(batch["image"])
        z_img = self.clip.encode_image(frozen["clip"], pictures)
        text = self.clip.encode_text(frozen["clip"], batch["tokens"][:rows])
        keys = jax.random.split(key, text.z_txt.shape[0])
        z = self.sampler(params, self.sampler.condition(text), keys)
        return {"prior": previews.nearest(pictures, z_img, z)}

    def export(self, params: Params) -> tuple[Mapping[str, Any], Params]:
        return self.entry, params


SECTIONS = {"task": PriorTask, "model": DiffusionPrior, "diffusion": Process}


def from_config(config: Any) -> PriorTask:
    options = {key: config.task[key] for key in config.task if key not in ("name", "sampling")}
    network = construct(DiffusionPrior, config.model, "config.model")
    check_transformer("config.model", config.model, network.activation)
    process = construct(Process, config.diffusion, "config.diffusion")
    task = construct(
        PriorTask,
        options,
        "config.task",
        network=network,
        process=process,
        clip=FrozenCLIP.load(config),
        sampler=make_sampler(PriorSampler, config, network, process),
        entry={},
    )
    entry = stage_entry(config, embedding_scale=task.embedding_scale, clip=task.clip.hash)
    return dataclasses.replace(task, entry=entry)

"""The diffusion prior: mean squared error on z_img itself (unCLIP section 2.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion import analytic
from dalle2_jax.diffusion.guidance import Apply
from dalle2_jax.diffusion.process import Process
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import arrays
from dalle2_jax.nets.conditioning import prior_condition
from dalle2_jax.nets.forward import forward
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.sampling.prior import PriorSampler
from dalle2_jax.sampling.settings import Settings
from dalle2_jax.sampling.stage import finish
from dalle2_jax.tasks.shared import previews
from dalle2_jax.tasks.shared.denoising import denoising_loss, make_sampler, stage_entry
from dalle2_jax.tasks.shared.frozen_clip import FrozenCLIP, check_transformer
from dalle2_jax.types import Array, Batch, Metrics, Params
from dalle2_jax.validation.sections import check_numbers, check_whole_numbers, construct


@dataclasses.dataclass(frozen=True)
class PriorTask:
    """Trains the diffusion prior.

    x_0 is z_img * embedding_scale, which brings a coordinate to a standard deviation of about 0.54,
    as pixels in [-1, 1] have it: 17.2 at 1,024 dimensions (unCLIP section 2.2), 0.54 sqrt(dim) at
    others. A network whose x_0 is standardised needs no scale: `embedding_scale` is 1.

    Attributes:
        embedding_scale: see above.
        drop_caption: share of captions that are left out in training, for guidance.
        candidates: z_img that are sampled for an image, of which the best is kept.
    """

    network: DiffusionPrior
    process: Process
    clip: FrozenCLIP
    sampler: PriorSampler
    entry: Mapping[str, Any]
    embedding_scale: float
    drop_caption: float = 0.1
    candidates: int = PriorSampler.candidates
    stage: str = dataclasses.field(default="prior", init=False)
    optional_layer: str = dataclasses.field(default="", init=False)
    SECTIONS: ClassVar = {"sampling": Settings}

    def __post_init__(self) -> None:
        check_numbers("config.task", 0, 1, drop_caption=self.drop_caption)
        check_numbers("config.task", 1e-6, embedding_scale=self.embedding_scale)
        check_whole_numbers("config.task", 1, candidates=self.candidates)
        # Nothing divides samples by the scale. It only disappears where `nearest_to` brings them to
        # unit length.
        keeps_length = self.network.standardised or not self.clip.network.unit_length
        if keeps_length and self.embedding_scale != 1:
            raise UserError(
                f"config.task.embedding_scale={self.embedding_scale} must be 1 where z_img is "
                "standardised or has no unit length: what is sampled is not scaled back"
            )

    def init(self, key: Array) -> Params:
        inputs = self.network.init_inputs(self.clip.network.text["width"])
        return self.network.init(key, *inputs)["params"]

    def trainable(self, path: str) -> bool:
        return path not in ("mean", "std")  # the statistics of a standardised z_img

    def frozen(self) -> Params:
        return {"clip": self.clip.params()}

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        key_drop, key_loss = jax.random.split(key)
        keep = jax.random.uniform(key_drop, batch["tokens"].shape[:1]) >= self.drop_caption
        apply, x_0 = self._posed(params, frozen, batch, keep if train else jnp.ones_like(keep))
        return denoising_loss(self.process, apply, x_0, key_loss)

    def _posed(
        self, params: Params, frozen: Params, batch: Batch, keep: Array
    ) -> tuple[Apply, Array]:
        """Returns the network as a function of (x_t, t), and x_0 [b, dim].

        Captions are left out where `keep` [b] is False.
        """
        z_img = self.clip.encode_image(frozen["clip"], arrays.to_float(batch["image"]))
        cond = self.condition(frozen, batch["tokens"], keep)

        def apply(x_t: Array, t: Array) -> Array:
            return forward(
                self.network, params, x_t, t, cond["z_txt"], cond["txt_enc"], cond["txt_mask"]
            )

        # to_x_0 standardises, if the network does; otherwise it is the identity.
        return apply, forward(self.network, params, z_img * self.embedding_scale, method="to_x_0")

    def condition(self, frozen: Params, tokens: Array, keep: Array) -> Mapping[str, Array]:
        """Returns the condition of b captions, and of "no caption" where `keep` [b] is False."""
        learned = self.network.learned_null
        text = self.clip.encode_text(frozen["clip"], tokens, None if learned else keep)
        if learned:
            # An empty mask is "no caption": the network replaces z_txt as well.
            text = text._replace(txt_mask=text.txt_mask & keep[:, None])
        return prior_condition(self.network, text)

    def measure(self, params: Params, frozen: Params, batch: Batch, key: Array) -> dict[str, Array]:
        """Measures the errors of variance="analytic", see `diffusion.analytic.measure`."""
        everyone = jnp.ones(batch["tokens"].shape[:1], bool)
        apply, x_0 = self._posed(params, frozen, batch, everyone)
        return {"x_0_error": analytic.measure(self.process, apply, x_0, key)}

    def preview(
        self, params: Params, frozen: Params, batch: Batch, key: Array, rows: int
    ) -> dict[str, Array]:
        """Shows each caption's own image, then those of the batch nearest to its sampled z_img."""
        images = arrays.to_float(batch["image"])
        z_img = self.clip.encode_image(frozen["clip"], images)
        tokens = batch["tokens"][:rows]
        text = self.clip.encode_text(frozen["clip"], tokens)
        empty = None
        if not self.network.learned_null:
            empty = self.clip.encode_text(frozen["clip"], tokens, jnp.zeros(len(tokens), bool))
        keys = jax.random.split(key, len(tokens))
        z = finish(self.sampler(params, prior_condition(self.network, text, empty), keys))
        return {"prior": previews.nearest(images, z_img, z)}

    def export(self, params: Params) -> tuple[Mapping[str, Any], Params]:
        return self.entry, params


SECTIONS = {"task": PriorTask, "model": DiffusionPrior, "diffusion": Process}


def from_config(config: Any) -> PriorTask:
    options = {key: config.task[key] for key in config.task if key not in ("name", "sampling")}
    network = construct(DiffusionPrior, config.model, "config.model")
    check_transformer("config.model", config.model, network.activation)
    process = construct(Process, config.diffusion, "config.diffusion")
    clip = FrozenCLIP.load(config)
    sampler_options = {
        "candidates": config.task.candidates,
        "unit_length": clip.network.unit_length,
    }
    task = construct(
        PriorTask,
        options,
        "config.task",
        network=network,
        process=process,
        clip=clip,
        sampler=make_sampler(
            PriorSampler, config, network, process, measured=True, **sampler_options
        ),
        entry={},
    )
    extra = {"embedding_scale": task.embedding_scale, "candidates": task.candidates}
    entry = stage_entry(config, **extra, clip=task.clip.hash)
    return dataclasses.replace(task, entry=entry)

"""An upsampler: un-noising crops of large images given the small one (unCLIP section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion.process import Process
from dalle2_jax.errors import UserError, near_miss
from dalle2_jax.imaging import arrays, degradation
from dalle2_jax.nets.forward import forward
from dalle2_jax.nets.unet import KNOWN
from dalle2_jax.nets.upsampler import Upsampler
from dalle2_jax.sampling.settings import Settings
from dalle2_jax.sampling.stage import finish
from dalle2_jax.sampling.upsampler import UpsamplerSampler
from dalle2_jax.tasks.shared import previews
from dalle2_jax.tasks.shared.denoising import (
    denoising_loss,
    known_in_part,
    make_sampler,
    stage_entry,
)
from dalle2_jax.tasks.shared.frozen_clip import check_images
from dalle2_jax.types import Array, Batch, Metrics, Params
from dalle2_jax.validation.sections import check_numbers, check_whole_numbers, construct

PARTS = ("first", "last")
DEGRADATIONS = ("blur", *degradation.STRENGTHS)


@dataclasses.dataclass(frozen=True)
class UpsamplerTask:
    """Trains an upsampler on crops.

    The low-resolution image is corrupted in training, so that the decoder's faults do not matter:
    by a gaussian blur or by BSR degradation and, in this project's tiny cascade, by noise as well.

    With `separate_last_step` there are two networks, {"first", "last"}: each is trained on every
    batch, "last" at the one t of the sampler's last step and "first" at all others.

    Attributes:
        low_size, image_size: sides of the small and the large image in pixels.
        crop_fraction: side of the crops, as a share of image_size.
        degradation: "blur", or "bsr" or "bsr_light", as in `degradation.STRENGTHS`.
        degraded_share: share of the images that BSR degrades; the others stay as they are.
        blur_sigma: of a 3x3 kernel, in pixels of the small image; 0: none.
        noise_std: most standard deviation of gaussian noise on the small image.
        nothing_known: with model.inpaints, share of the crops of which nothing is known.
        separate_last_step: see above.
        learns: which of the two networks are trained.
    """

    network: Upsampler
    process: Process
    sampler: UpsamplerSampler
    entry: Mapping[str, Any]
    low_size: int
    image_size: int
    crop_fraction: float = 0.25
    degradation: str = "blur"
    degraded_share: float = 1.0
    blur_sigma: float = 0.6
    noise_std: float = 0.0
    nothing_known: float = 0.5
    separate_last_step: bool = False
    learns: tuple[str, ...] = PARTS
    SECTIONS: ClassVar = {"sampling": Settings}

    def __post_init__(self) -> None:
        check_whole_numbers("config.task", 1, low_size=self.low_size, image_size=self.image_size)
        check_numbers(
            "config.task",
            0,
            1,
            crop_fraction=self.crop_fraction,
            degraded_share=self.degraded_share,
            nothing_known=self.nothing_known,
        )
        check_numbers("config.task", 0, blur_sigma=self.blur_sigma, noise_std=self.noise_std)
        if self.degradation not in DEGRADATIONS:
            near = near_miss(str(self.degradation), DEGRADATIONS)
            raise UserError(f"config.task.degradation={self.degradation!r} is unknown{near}")
        # Crops of both sizes must show the same window, so they must start and end on whole pixels
        # of the small image.
        factor, rest = divmod(self.image_size, self.low_size)
        if rest:
            raise UserError(
                f"config.task.image_size={self.image_size} must be a multiple of "
                f"config.task.low_size={self.low_size}"
            )
        if not self.crop_size or self.crop_size % factor:
            raise UserError(
                f"config.task.crop_fraction={self.crop_fraction} of image_size={self.image_size} "
                f"makes crops of {self.crop_size} px: they must be a multiple of {factor}, "
                "which is one pixel of the small image"
            )
        if tuple(self.learns) not in (PARTS, *((part,) for part in PARTS)):
            raise UserError(f"config.task.learns={self.learns} must be {PARTS} or one of them")
        if not self.separate_last_step and tuple(self.learns) != PARTS:
            raise UserError("config.task.learns goes with separate_last_step: leave it out")
        if self.separate_last_step and self.sampler.settings.num_steps < 2:
            raise UserError(
                "config.task.sampling.steps=1 leaves no step to the first network of "
                "separate_last_step"
            )

    def init(self, key: Array) -> Params:
        def network(key: Array) -> Params:
            return self.network.init(key, *self.network.init_inputs())["params"]

        if not self.separate_last_step:
            return network(key)
        return {part: network(k) for part, k in zip(PARTS, jax.random.split(key), strict=True)}

    @property
    def optional_layer(self) -> str:
        return KNOWN if self.network.inpaints else ""

    @property
    def stage(self) -> str:
        return f"upsampler_{self.image_size}"

    @property
    def crop_size(self) -> int:
        return int(self.image_size * self.crop_fraction)

    def trainable(self, path: str) -> bool:
        return not self.separate_last_step or path.split("/")[0] in self.learns

    def frozen(self) -> Params:
        return {}

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        key_corrupt, key_loss, key_dropout, key_known = jax.random.split(key, 4)
        low, x_0 = self.corrupted_crops(batch["image"], key_corrupt)
        low_res = arrays.resize(low, self.crop_size, "bicubic")
        known = None
        if train and self.network.inpaints:
            # x_0 stays as it is: without `most_moved` no image is moved.
            _, known = known_in_part(key_known, x_0, self.nothing_known)

        def loss_of(
            network: Params, keys: Sequence[Array], times: range | None = None
        ) -> tuple[Array, Metrics]:
            key_loss, key_dropout = keys

            def apply(x_t: Array, t: Array) -> Array:
                rngs = {"dropout": key_dropout}
                return forward(self.network, network, x_t, t, low_res, train, known, rngs=rngs)

            return denoising_loss(self.process, apply, x_0, key_loss, times)

        if not self.separate_last_step:
            return loss_of(params, (key_loss, key_dropout))
        # The networks share no parameter, so the gradient of the sum is each one's own.
        total, metrics = jnp.float32(0), {}
        keys = (jax.random.split(key, len(self.learns)) for key in (key_loss, key_dropout))
        for part, *part_keys in zip(self.learns, *keys, strict=True):
            loss, part_metrics = loss_of(params[part], part_keys, self.times[part])
            total += loss
            metrics |= {f"{part}_{name}": value for name, value in part_metrics.items()}
        return total, metrics

    def corrupted_crops(self, images: Array, key: Array) -> tuple[Array, Array]:
        """Returns the same random window of the corrupted small images and of the large ones.

        uint8 [b, h, w, 3] -> [b, crop / f, crop / f, 3] and [b, crop, crop, 3] in [-1, 1], where
        f = image_size / low_size.
        """
        key_crop, key_blur, key_noise = jax.random.split(key, 3)
        high = arrays.resize(arrays.to_float(images), self.image_size, "area")
        low = arrays.resize(high, self.low_size, "area")
        if self.degradation == "blur" and self.blur_sigma:
            # From next to none up to the full blur: the true small image is then a case of it.
            sigma = jax.random.uniform(key_blur, (low.shape[0],), minval=0.05, maxval=1.0)
            low = arrays.gaussian_blur(low, 3, sigma * self.blur_sigma)
        # After the blur, which would see the edges of crops as borders.
        low, x_0 = arrays.random_crop_pair(key_crop, low, high, self.crop_size)
        if self.degradation != "blur":
            # Of the crop alone, as in latent diffusion; its cost grows with side^3.
            key_blur, key_share = jax.random.split(key_blur)
            strength = degradation.STRENGTHS[self.degradation]
            # BSR's operations are made for factors up to 4, so larger crops are reduced first.
            crops = arrays.resize(x_0, min(self.crop_size, 4 * low.shape[1]), "area")
            bsr_low = degradation.bsr(key_blur, crops, low.shape[1], strength)
            is_degraded = (
                jax.random.uniform(key_share, (low.shape[0], 1, 1, 1)) < self.degraded_share
            )
            low = jnp.where(is_degraded, bsr_low, low)
        if self.noise_std:
            key_std, key_noise = jax.random.split(key_noise)
            # Each image has its own level, from none up: clean images stay within what is learned.
            std = self.noise_std * jax.random.uniform(key_std, (low.shape[0], 1, 1, 1))
            low = low + std * jax.random.normal(key_noise, low.shape)
        return low, x_0

    @property
    def times(self) -> dict[str, range]:
        """The t that each of the two networks serves."""
        # The first t of the sampled schedule is its cleanest, which is sampled last. With some
        # spacings it depends on the number of steps: then "last" serves no other number.
        last = int(self.sampler.settings.schedule(self.process).timesteps[0])
        return {"first": range(last + 1, self.process.num_timesteps), "last": range(last, last + 1)}

    def preview(
        self, params: Params, frozen: Params, batch: Batch, key: Array, rows: int
    ) -> dict[str, Array]:
        """Shows, for each example, the small image, the one sampled from it and the true one."""
        images = arrays.to_float(previews.first(batch, rows)["image"])
        true = arrays.resize(images, self.image_size, "area")
        low = arrays.resize(true, self.low_size, "area")
        samples = finish(self.sampler(params, low, jax.random.split(key, low.shape[0])))
        low_enlarged = arrays.resize(low, self.image_size, "nearest")
        return {self.stage: previews.side_by_side(low_enlarged, samples, true)}

    def export(self, params: Params) -> tuple[Mapping[str, Any], Params]:
        return self.entry, params


SECTIONS = {"task": UpsamplerTask, "model": Upsampler, "diffusion": Process}


def from_config(config: Any) -> UpsamplerTask:
    options = {key: config.task[key] for key in config.task if key not in ("name", "sampling")}
    process = construct(Process, config.diffusion, "config.diffusion")
    network = construct(Upsampler, config.model, "config.model")
    if network.residual and process.prediction != "x_0":
        raise UserError(
            "config.model.residual=True goes with config.diffusion.prediction='x_0', not "
            f"{process.prediction!r}: the small image is added to what is predicted"
        )
    sampler_options = {
        "image_size": config.task.get("image_size", 1),  # if missing, `construct` says so
        "separate_last_step": config.task.separate_last_step,
    }
    task = construct(
        UpsamplerTask,
        options,
        "config.task",
        network=network,
        process=process,
        sampler=make_sampler(UpsamplerSampler, config, network, process, **sampler_options),
        # The entry needs the finished task, whose checks come first: it is put in below.
        entry={},
    )
    check_images(config, task.image_size, "config.task")
    sizes = {"image_size": task.image_size, "low_size": task.low_size}
    entry = stage_entry(config, **sizes, separate_last_step=task.separate_last_step)
    return dataclasses.replace(task, entry=entry)

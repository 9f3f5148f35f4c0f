"""`DALLE2`, the model as a user holds it: load a model folder, generate and edit images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np

from dalle2_jax.pipelines import edits, inversion
from dalle2_jax.pipelines.cascade import Cascade
from dalle2_jax.pipelines.edits import Ranked
from dalle2_jax.pipelines.events import ProgressCallback, collect, images_of, result_of
from dalle2_jax.pipelines.inversion import Latents
from dalle2_jax.pipelines.loading import load_cascade
from dalle2_jax.sampling.overrides import SamplingOptions

__all__ = ["DALLE2", "Latents", "Ranked"]


@dataclasses.dataclass(frozen=True)
class DALLE2:
    """DALL-E 2: generates images from texts, and edits images.

        model = DALLE2.from_pretrained("tiny")
        images = model.with_settings(steps=20).generate("a flat emoji of a red apple", n=4)
        more = model.variations(images[:1], n=3)

    Images are uint8 [b, h, w, 3], one image is [h, w, 3]. Input images may have any size; of one
    that is not square the middle is used (`inpaint` and `outpaint` say otherwise). Generated images
    are square, with sides of `image_size`.

    Arguments that many methods share:

    - `steps`: the decoder's steps to invert an image, and again to decode it. None: 50. More steps
      keep an image better.
    - `batch_size`: how many images are generated at a time; it is rounded up to a multiple of the
      devices.
    - `progress`: called with (stage, steps done, steps in all) while a method runs.

    Every method raises UserError for an argument of another type or range.

    Attributes:
        cascade: the networks, their settings and parameters.
    """

    cascade: Cascade

    @classmethod
    def from_pretrained(
        cls,
        weights: str | os.PathLike[str] = "tiny",
        dtype: str | None = None,
        offload: bool | None = None,
        size: int | None = None,
    ) -> Self:
        """Loads a model.

        Args:
            weights: "tiny" (inside the package), a model folder, or a hub id; also Karlo as
                diffusers saves it, which is imported into the user's cache, once.
            dtype: what the networks compute in; None is bfloat16 on a TPU, else float32.
            offload: whether weights wait in the host's memory until their stage runs, which costs
                their transfer in every batch. None: if they would fill more than half of the
                device's memory.
            size: side of the images in pixels, from the decoder's to the last upsampler's. Only the
                stages that reach it are loaded; a larger result is averaged down. None: as the
                folder's config.json says ("tiny": 128), or else the largest.

        Raises:
            UserError: an unknown name; a folder that is missing or damaged, or lacks a stage; a
                size that no stage reaches.
        """
        return cls(load_cascade(weights, dtype, offload, size))

    @property
    def image_size(self) -> int:
        """Side of the generated images in pixels."""
        return self.cascade.image_size

    @property
    def weights(self) -> str:
        """The name that the model was loaded by."""
        return self.cascade.weights

    @property
    def weights_hash(self) -> str:
        """16 hex digits that identify the model's configuration and tensors."""
        return self.cascade.weights_hash

    @property
    def inpaints(self) -> bool:
        """True if the decoder was trained to inpaint.

        Otherwise `inpaint` and `outpaint` repeat every step (RePaint, 2201.09865), which takes
        longer and fits less well.
        """
        return edits.inpaints(self.cascade)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Returns how each stage is sampled, {stage: {setting: plain value}}."""
        samplers = self.cascade.samplers()
        return {name: dataclasses.asdict(s.settings) for name, s in samplers.items()}

    def with_settings(
        self,
        steps: int | Sequence[int] | Mapping[str, int | Sequence[int]] | None = None,
        cfg_scale: float | Mapping[str, float] | None = None,
        solver: str | Mapping[str, str] | None = None,
        eta: float | Mapping[str, float] | None = None,
        cfg_interval: tuple[float, float] | Mapping[str, tuple[float, float]] | None = None,
        cfg_rescale: float | Mapping[str, float] | None = None,
        variance: str | Mapping[str, str] | None = None,
    ) -> Self:
        """Returns the same model, sampled differently. None keeps what the model has.

        Each argument is {stage: value}, or one value: `solver` then is that of every stage, any
        other argument that of the decoder. `sampling.settings.Settings` explains them.

        Args:
            steps: sampling steps; several numbers are the steps in each equal part of time, from
                the cleanest to the noisiest.
            cfg_scale: guidance scale; 1 is off.
            solver: one of `diffusion.solvers.NAMES`.
            eta: DDIM's noise, 0 to 1.
            cfg_interval: (low, high) of sigma / alpha within which guidance acts.
            cfg_rescale: 0 to 1, how far guidance keeps the contrast.
            variance: of DDPM's noise: "small", "large" or "analytic".

        Raises:
            UserError: an unknown stage or solver, or a value out of range.
        """
        options = SamplingOptions(
            steps=steps,
            cfg_scale=cfg_scale,
            solver=solver,
            eta=eta,
            cfg_interval=cfg_interval,
            cfg_rescale=cfg_rescale,
            variance=variance,
        )
        return dataclasses.replace(self, cascade=self.cascade.with_options(options))

    def with_prior(self, name: str | None) -> Self:
        """Returns the same model with the prior "diffusion", "ar" or "none".

        "none" decodes z_txt in place of z_img; None keeps the present prior. Raises UserError if
        the folder has no such prior.
        """
        return dataclasses.replace(self, cascade=self.cascade.with_prior(name))

    def at_size(self, size: int) -> Self:
        """Returns the same model, generating images of `size` px.

        At most the size it was loaded for (`from_pretrained`); raises UserError for a larger one,
        and for one that is smaller than the decoder's.
        """
        return dataclasses.replace(self, cascade=self.cascade.at_size(size))

    def generate(
        self,
        prompts: str | Sequence[str] | None,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        best_of: int | None = None,
        z_img: np.ndarray | None = None,
        noise: Mapping[str, np.ndarray] | None = None,
        batch_size: int = 8,
        progress: ProgressCallback | None = None,
    ) -> np.ndarray:
        """Generates n images of each prompt: uint8 [len(prompts) * n, h, w, 3], prompt by prompt.

        Image i of a prompt depends on the seed, on i and on the prompt alone: it is the same (but
        for rounding) generated alone, in any batch and on any number of devices.

        Args:
            prompts: one text or several; text beyond the context length is cut off. None decodes
                `z_img` without captions, n images of each of its rows.
            n: images for each prompt, at most 2**32. `generate` holds all in memory, `stream` does
                not.
            seed: an integer from 0 to 2**32 - 1, or one for each prompt. Images i of two prompts
                with one seed begin from the same noise.
            best_of: generate so many of each prompt and return the n best, see `rank`.
            z_img, noise: see `stream`; not with `best_of`.
            batch_size, progress: see the class.
        """
        if best_of is None:
            images = self.stream(
                prompts,
                n,
                seed,
                z_img=z_img,
                noise=noise,
                batch_size=batch_size,
                progress=progress,
            )
            return np.concatenate(list(images))
        rows = self.rank(prompts or "", n, best_of, seed, batch_size=batch_size, progress=progress)
        return np.stack([one.image for row in rows for one in row])

    def stream(
        self,
        prompts: str | Sequence[str] | None,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        z_img: np.ndarray | None = None,
        noise: Mapping[str, np.ndarray] | None = None,
        batch_size: int = 8,
        progress: ProgressCallback | None = None,
    ) -> Iterator[np.ndarray]:
        """Yields the images of `generate` batch by batch as they are done.

        Args:
            prompts, n, seed, batch_size, progress: see `generate`.
            z_img: [len(prompts) * n, dim] in place of what the prior samples, or one row a prompt
                for all of its n images. If CLIP's z_img have unit length, rows are scaled to it.
            noise: {stage: standard normal [1 + steps, len(prompts) * n, ...]}: x_T and then the
                noise of each step, in place of the seed's; [1, ...] is x_T alone. For the prior
                there is a row for each of its candidates, image by image.
        """
        events = self.cascade.generate(
            prompts, n, seed, z_img=z_img, noise=noise, batch_size=batch_size
        )
        yield from images_of(events, progress)

    def rank(
        self,
        prompts: str | Sequence[str],
        n: int,
        best_of: int,
        seed: int | Sequence[int] = 0,
        *,
        batch_size: int = 8,
        progress: ProgressCallback | None = None,
    ) -> Iterator[list[Ranked]]:
        """Yields, prompt by prompt, the n of `best_of` images that CLIP finds nearest to it.

        The nearest comes first (reranking, as DALL-E 1 did: 2102.12092, section 2.6). No more than
        a batch and n images are held in memory. Arguments are those of `generate`. Raises UserError
        for a model that cannot read images, too.
        """
        for event in edits.rank(self.cascade, prompts, n, best_of, seed, batch_size=batch_size):
            if isinstance(event, list):
                yield event
            elif progress is not None:
                progress(event.stage, event.done, event.total)

    def sample_prior(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        batch_size: int = 8,
        progress: ProgressCallback | None = None,
    ) -> np.ndarray:
        """Samples the n z_img of each prompt that `generate` decodes: float32 [b * n, dim]."""
        steps = self.cascade.sample_prior(prompts, n, seed, batch_size=batch_size)
        return result_of(steps, progress)

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """Returns CLIP's z_img float32 [b, dim] of images uint8 [b, h, w, 3].

        Raises UserError for a model without image tower, too.
        """
        return self.cascade.encode_image(images)

    def encode_text(self, captions: Sequence[str]) -> np.ndarray:
        """Returns CLIP's z_txt float32 [b, dim] of b captions."""
        return self.cascade.encode_text(captions)

    def invert(
        self,
        images: np.ndarray,
        *,
        steps: int | None = None,
        iterations: int = 1,
        batch_size: int = 8,
        progress: ProgressCallback | None = None,
    ) -> Latents:
        """Finds the latents (z_img, x_T) of images, from which `decode` samples them again.

        The decoder's DDIM is run backwards under z_img, without a caption and without guidance
        (unCLIP section 3).

        Args:
            images: uint8 [b, h, w, 3]. They are inverted at the decoder's size.
            steps: see the class; `decode` must have the same.
            iterations: network evaluations a step; 2 or more come nearer to its exact inverse.
            batch_size, progress: see the class.
        """
        steps_to_latents = inversion.invert(self.cascade, images, steps, iterations, batch_size)
        return result_of(steps_to_latents, progress)

    def decode(
        self,
        latents: Latents,
        *,
        steps: int | None = None,
        batch_size: int = 8,
        progress: ProgressCallback | None = None,
    ) -> np.ndarray:
        """Decodes b latents without caption, guidance or noise; returns uint8 [b, h, w, 3].

        The inverse of `invert` with the same `steps`.
        """
        return collect(inversion.decode(self.cascade, latents, steps, batch_size), progress)

    def reconstruct(
        self,
        images: np.ndarray,
        *,
        steps: int | None = None,
        batch_size: int = 8,
        progress: ProgressCallback | None = None,
    ) -> np.ndarray:
        """Inverts images uint8 [b, h, w, 3] and decodes them again: how well are they kept?"""
        return collect(edits.reconstruct(self.cascade, images, steps, batch_size), progress)

    def variations(
        self,
        images: np.ndarray,
        n: int = 4,
        seed: int | Sequence[int] = 0,
        *,
        eta: float = 0.6,
        steps: int | None = None,
        cfg_scale: float | None = None,
        batch_size: int = 8,
        progress: ProgressCallback | None = None,
    ) -> np.ndarray:
        """Generates n variations of each of b images, image by image (unCLIP section 3.1).

        What z_img holds stays, the rest is sampled again.

        Args:
            images: uint8 [b, h, w, 3].
            n, seed: as in `generate`.
            eta: DDIM's noise, from 0, which changes least (unguided it reconstructs the image), to
                1, which changes most.
            cfg_scale: guidance scale of the decoder; None: the model's.
            steps, batch_size, progress: see the class.

        Returns:
            uint8 [b * n, h, w, 3].
        """
        events = edits.variations(
            self.cascade,
            images,
            n,
            seed,
            eta=eta,
            steps=steps,
            cfg_scale=cfg_scale,
            batch_size=batch_size,
        )
        return collect(events, progress)

    def interpolate(
        self,
        a: np.ndarray,
        b: np.ndarray | str,
        frames: int = 7,
        seed: int = 0,
        *,
        x_T: Literal["slerp", "fixed"] = "slerp",
        steps: int | None = None,
        batch_size: int = 8,
        progress: ProgressCallback | None = None,
    ) -> np.ndarray:
        """Generates `frames` images from image `a` to image or text `b` (unCLIP section 3.2).

        z_img moves along the sphere (slerp).

        Args:
            a: uint8 [h, w, 3].
            b: uint8 [h, w, 3], or a text, for which the prior samples z_img.
            frames: number of images, both ends included.
            seed: of the text's z_img, or of a fixed x_T.
            x_T: between two images, "slerp" moves x_T too, so that the ends are their
                reconstructions; "fixed" keeps one x_T, sampled from `seed`. To a text, x_T stays
                that of the image.
            steps, batch_size, progress: see the class.
        """
        events = edits.interpolate(
            self.cascade, a, b, frames, seed, x_T=x_T, steps=steps, batch_size=batch_size
        )
        return collect(events, progress)

    def text_diff(
        self,
        image: np.ndarray,
        new: str,
        old: str = "a photo",
        frames: int = 7,
        *,
        theta: float = 0.5,
        steps: int | None = None,
        batch_size: int = 8,
        progress: ProgressCallback | None = None,
    ) -> np.ndarray:
        """Generates `frames` images from the image towards the text `new` (unCLIP section 3.3).

        z_img turns towards the difference of the two texts' embeddings, by 0 to `theta` of the
        angle; x_T stays.

        Args:
            image: uint8 [h, w, 3].
            new: what the image is to show.
            old: what it shows now.
            frames: number of images; the first is the reconstruction.
            theta: share of the angle, 0 to 1; the paper goes to 0.25 .. 0.50.
            steps, batch_size, progress: see the class.
        """
        events = edits.text_diff(
            self.cascade, image, new, old, frames, theta=theta, steps=steps, batch_size=batch_size
        )
        return collect(events, progress)

    def probe(
        self,
        image: np.ndarray,
        dims: Sequence[int | None] | None = None,
        *,
        steps: int | None = None,
        batch_size: int = 8,
        progress: ProgressCallback | None = None,
    ) -> np.ndarray:
        """Generates the image from ever more of its z_img (unCLIP section 4).

        z_img is projected on its first k principal directions, those of the autoregressive prior,
        for each k of `dims`; x_T stays.

        Args:
            image: uint8 [h, w, 3].
            dims: numbers of directions; None in the list is all of z_img, the reconstruction.
                None in place of a list: `probe_dims()`.
            steps, batch_size, progress: see the class.
        """
        events = edits.probe(self.cascade, image, dims, steps=steps, batch_size=batch_size)
        return collect(events, progress)

    def probe_dims(self) -> list[int | None]:
        """Returns 20, 40, ... up to all known principal directions, then None: all of z_img."""
        return edits.probe_dims(self.cascade)

    def inpaint(
        self,
        image: np.ndarray,
        edit_mask: np.ndarray,
        prompt: str | None = None,
        n: int = 1,
        seed: int = 0,
        *,
        feather: int | None = None,
        batch_size: int = 8,
        progress: ProgressCallback | None = None,
    ) -> np.ndarray:
        """Regenerates a part of an image, n times (GLIDE 2112.10741, section 2.3).

        Args:
            image: uint8 [h, w, 3], of any size; the middle square is used. Pixels outside the mask
                are kept exactly, at the size of the result.
            edit_mask: bool [h, w], True where pixels are regenerated.
            prompt: what the whole image then shows; None: what it shows now.
            n, seed: as in `generate`.
            feather: width in pixels, within the regenerated part, over which the step in colour at
                its edge is spread out; None: a 16th of the side.
            batch_size, progress: see the class.

        Returns:
            uint8 [n, h, w, 3].
        """
        events = edits.inpaint(
            self.cascade,
            image,
            edit_mask,
            prompt,
            n,
            seed,
            feather=feather,
            batch_size=batch_size,
        )
        return collect(events, progress)

    def outpaint(
        self,
        image: np.ndarray,
        prompt: str | None = None,
        n: int = 1,
        seed: int = 0,
        *,
        left: int = 0,
        right: int = 0,
        up: int = 0,
        down: int = 0,
        overlap: float = 0.5,
        feather: int | None = None,
        batch_size: int = 8,
        progress: ProgressCallback | None = None,
    ) -> np.ndarray:
        """Extends an image beyond its sides, n times.

        Returns uint8 [n, up + h + down, left + w + right, 3]. Frames of `image_size` are generated
        one after the other, each fitting what is there already.

        Args:
            image: uint8 [h, w, 3], of any size and shape, kept exactly.
            prompt: what each frame shows; None: what the image shows.
            n, seed: as in `generate`.
            left, right, up, down: pixels to add.
            overlap: share of a frame that is known before it is generated, where possible.
            feather: as in `inpaint`.
            batch_size, progress: see the class.
        """
        events = edits.outpaint(
            self.cascade,
            image,
            prompt,
            n,
            seed,
            margins=(left, right, up, down),
            overlap=overlap,
            feather=feather,
            batch_size=batch_size,
        )
        return collect(events, progress)

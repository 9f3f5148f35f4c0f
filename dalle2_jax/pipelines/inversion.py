"""An image as the pair (z_img, x_T), from which the decoder samples it again (unCLIP section 3).

    image --CLIP--> z_img                    what the image shows
    x_0 = image at the decoder's size
    for t from clean to noisy:               DDIM backwards, under z_img, unguided
        eps = decoder(x_t, t, z_img)
        x_{t+1} = DDIM's step from x_t with this eps, the other way
    x_T                                      all that z_img leaves open

DDIM at eta 0 is a discretised differential equation, so its steps can be taken in either direction.
Backwards, eps is evaluated at the wrong end of each step; more steps, or `iterations` that evaluate
it again where the step arrives, make the error smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from dalle2_jax.errors import UserError
from dalle2_jax.pipelines import limits, placement
from dalle2_jax.pipelines.cascade import Cascade
from dalle2_jax.pipelines.events import Event, Steps, run_stage
from dalle2_jax.sampling.overrides import SamplingOptions
from dalle2_jax.sampling.preprocess import middle, shrunk
from dalle2_jax.validation import arguments

DEFAULT_STEPS = 50  # of the decoder, to invert and again to decode


class Latents(NamedTuple):
    """The latents of b images, from which the decoder samples them again.

    Attributes:
        z_img: float32 [b, dim], what the images show.
        x_T: float32 [b, s, s, 3] at the decoder's size s, all that z_img leaves open.
    """

    z_img: np.ndarray
    x_T: np.ndarray


def for_inversion(cascade: Cascade, steps: int | None = None) -> Cascade:
    """Returns the cascade whose decoder is invertible: DDIM at eta 0, without guidance.

    Guidance is left out because only unguided DDIM is invertible. `steps` None is 50, since keeping
    an image takes more steps than generating one.
    """
    if steps is None:
        steps = min(DEFAULT_STEPS, cascade.decoder.process.num_timesteps)
    # Repeated steps are for inpainting, where part of an image is known.
    settings = dataclasses.replace(cascade.decoder.settings, repeats=1)
    decoder = dataclasses.replace(cascade.decoder, settings=settings)
    options = SamplingOptions(steps=steps, cfg_scale=1.0, solver={"decoder": "ddim"}, eta=0.0)
    return dataclasses.replace(cascade, decoder=decoder).with_options(options)


def invert(
    cascade: Cascade,
    images: np.ndarray,
    steps: int | None = None,
    iterations: int = 1,
    batch_size: int = 8,
) -> Steps[Latents]:
    """Finds the latents of images, yielding progress; see `DALLE2.invert`."""
    z_img, squares = cascade.encode_image(images), middle(arguments.images(images))
    iterations = limits.whole_number("iterations", iterations)
    decoder, x_T = for_inversion(cascade, steps).decoder, []
    total, batches = len(squares), list(placement.batches(len(squares), batch_size))
    # All batches have one size, so one set of empty captions, encoded once, serves them all.
    no_captions = cascade.captions([None] * len(batches[0][1]))
    with placement.visible(placement.mesh()):
        text, empty = cascade.encode_captions(no_captions)
    for number, (start, places) in enumerate(batches):
        z_rows, rows = jax.device_put((z_img[places], squares[places]), placement.by_batch())
        condition = cascade.decoder_condition(z_rows, no_captions, text, empty)
        x_0 = shrunk(rows, decoder.image_size)
        inversion = decoder.invert(cascade.stage_params("decoder"), condition, x_0, iterations)
        noise = yield from run_stage("decoder", inversion, number, len(batches))
        x_T.append(np.asarray(noise)[: total - start])
    return Latents(z_img, np.concatenate(x_T))


def decode(
    cascade: Cascade, latents: Latents, steps: int | None = None, batch_size: int = 8
) -> Iterator[Event]:
    """Generates images from latents, yielding events; see `DALLE2.decode`."""
    if not isinstance(latents, Latents):
        raise UserError(f"latents must be Latents(z_img, x_T), not {type(latents).__name__}")
    x_T = arguments.finite_array("x_T", latents.x_T)[None]
    return for_inversion(cascade, steps).generate(
        None, z_img=latents.z_img, noise={"decoder": x_T}, batch_size=batch_size
    )

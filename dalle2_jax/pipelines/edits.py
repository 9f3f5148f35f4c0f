"""Editing images (unCLIP section 3; GLIDE 2112.10741, section 2.3), as generators of events.

Inversion describes an image by a pair (z_img, x_T): CLIP's embedding, which says what the image
shows, and the noise from which the decoder samples exactly this image under it. The edits of unCLIP
are movements of one or both, followed by decoding:

    edit         z_img                                              x_T
    reconstruct  stays                                              stays
    variations   stays                                              stays, but DDIM adds noise: eta
    interpolate  slerp(z_a, z_b, share)                             slerp(x_a, x_b, share)
    text_diff    slerp(z_img, z_new - z_old, share * theta)         stays
    probe        mean + its first k principal directions            stays

Inpainting and outpainting are another thing: they keep some pixels and generate the others.

Each function yields the events of all networks that it runs and, as a `Batch`, its images. The
arguments are documented at the methods of `DALLE2` with the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import canvas, masks
from dalle2_jax.pipelines import limits
from dalle2_jax.pipelines.cascade import Cascade
from dalle2_jax.pipelines.embeddings import normalise, project, slerp
from dalle2_jax.pipelines.events import Batch, Event, StageProgress, Steps
from dalle2_jax.pipelines.inversion import Latents, decode, for_inversion, invert
from dalle2_jax.pipelines.limits import MAX_RETURNED
from dalle2_jax.pipelines.modes import MARGINS, X_T_CHOICES
from dalle2_jax.sampling.overrides import SamplingOptions
from dalle2_jax.validation import arguments, checks

_REPEATS = 5  # how often a decoder that was not trained to inpaint takes each step


class Ranked(NamedTuple):
    """One of the best images of a prompt.

    Attributes:
        image: uint8 [h, w, 3].
        index: number among all images generated for its prompt.
        score: cosine of CLIP's embeddings of image and prompt.
    """

    image: np.ndarray
    index: int
    score: float


def rank(
    cascade: Cascade,
    prompts: str | Sequence[str],
    n: int,
    best_of: int,
    seed: int | Sequence[int] = 0,
    *,
    batch_size: int = 8,
) -> Iterator[StageProgress | list[Ranked]]:
    """Yields progress and, prompt by prompt, the n of `best_of` images nearest to the prompt."""
    n = limits.whole_number("n", n)
    best_of = limits.whole_number("best_of", best_of, lowest=n)
    if prompts is None:
        raise UserError("best_of ranks images by their prompt: give prompts")
    if cascade.clip.image is None:
        raise UserError(f"{cascade.weights} has no image tower: it cannot rank images")
    prompts = arguments.prompts(prompts)
    # `place` counts the images of all prompts, `best` holds those of the present prompt.
    z_txt, best, place = None, [], 0
    for event in cascade.generate(prompts, best_of, seed, batch_size=batch_size):
        if not isinstance(event, Batch):
            yield event
            continue
        z_img = normalise(cascade.encode_image(event.images))
        for image, z in zip(event.images, z_img, strict=True):
            prompt, index = divmod(place, best_of)
            if index == 0:
                (z_txt,) = normalise(cascade.encode_text([prompts[prompt]]))
            # A copy, or each kept image would hold the memory of its whole batch.
            best.append(Ranked(image.copy(), index, float(np.vdot(z, z_txt))))
            # Only n images are held. The sort is stable: of equal ones the earlier stays.
            best = sorted(best, key=lambda one: -one.score)[:n]
            place += 1
            if place % best_of == 0:
                yield best
                best = []


def reconstruct(
    cascade: Cascade, images: np.ndarray, steps: int | None = None, batch_size: int = 8
) -> Iterator[Event]:
    """Inverts images and decodes them again; see `DALLE2.reconstruct`."""
    latents = yield from invert(cascade, images, steps, batch_size=batch_size)
    yield from decode(cascade, latents, steps, batch_size)


def for_variations(
    cascade: Cascade, eta: float, steps: int | None = None, cfg_scale: float | None = None
) -> Cascade:
    """Returns the cascade with the settings that `variations` decodes with.

    Those of inversion, but for the noise that DDIM adds, and guidance.
    """
    cfg_scale = cascade.decoder.settings.cfg_scale if cfg_scale is None else cfg_scale
    options = SamplingOptions(cfg_scale=cfg_scale, eta=eta)
    return for_inversion(cascade, steps).with_options(options)


def variations(
    cascade: Cascade,
    images: np.ndarray,
    n: int,
    seed: int | Sequence[int],
    *,
    eta: float,
    steps: int | None = None,
    cfg_scale: float | None = None,
    batch_size: int = 8,
) -> Iterator[Event]:
    """Decodes images again with noise; see `DALLE2.variations`."""
    # Mistakes are reported before the inversion, which takes long.
    varying = for_variations(cascade, eta, steps, cfg_scale)
    n = limits.whole_number("n", n, highest=MAX_RETURNED)
    images = arguments.images(images)
    seeds = arguments.seeds(seed, len(images)).tolist()
    latents = yield from invert(cascade, images, steps, batch_size=batch_size)
    # The n variations of an image share its x_T; the noise of the steps, which eta scales, differs.
    x_T = np.repeat(latents.x_T, n, axis=0)[None]
    yield from varying.generate(
        None, n, seeds, z_img=latents.z_img, noise={"decoder": x_T}, batch_size=batch_size
    )


def interpolate(
    cascade: Cascade,
    a: np.ndarray,
    b: np.ndarray | str,
    frames: int,
    seed: int,
    *,
    x_T: str,
    steps: int | None = None,
    batch_size: int = 8,
) -> Iterator[Event]:
    """Goes from image `a` to image or text `b`; see `DALLE2.interpolate`."""
    checks.one_of("x_T", x_T, X_T_CHOICES)
    shares = np.linspace(0, 1, limits.whole_number("frames", frames, lowest=2))
    seed, a = limits.whole_number("seed", seed), arguments.image("a", a)
    if isinstance(b, str):
        z_b = yield from cascade.sample_prior(b, 1, seed, batch_size=batch_size)
        z_a, x_a = yield from invert(cascade, a, steps, batch_size=batch_size)
        x_b = x_a  # a text has no x_T of its own
    else:
        b = arguments.image("b", b)
        z_a, x_a = yield from invert(cascade, a, steps, batch_size=batch_size)
        z_b, x_b = yield from invert(cascade, b, steps, batch_size=batch_size)
        if x_T == "fixed":
            # Noise of the right distribution, for decoders whose inverted x_T is far from normal.
            x_a = x_b = np.random.default_rng(seed).standard_normal(x_a.shape, np.float32)
    z_img = _between("the two embeddings", z_a, z_b, shares)
    latents = Latents(z_img, _between("x_T", x_a, x_b, shares))
    yield from decode(cascade, latents, steps, batch_size)


def text_diff(
    cascade: Cascade,
    image: np.ndarray,
    new: str,
    old: str,
    frames: int,
    *,
    theta: float,
    steps: int | None = None,
    batch_size: int = 8,
) -> Iterator[Event]:
    """Turns the image towards a text; see `DALLE2.text_diff`."""
    frames = limits.whole_number("frames", frames)
    shares = np.linspace(0, limits.number("theta", theta), frames)
    # z_d = norm(z_new - z_old), and z_img turns towards it by slerp (unCLIP, section 3.3).
    z_new, z_old = normalise(cascade.encode_text([new, old]))
    if np.allclose(z_new, z_old, atol=1e-6):
        raise UserError(
            f"{new!r} and {old!r} have the same embedding: write what differs from one to the other"
        )
    z_img, x_T = yield from invert(
        cascade, arguments.image("image", image), steps, batch_size=batch_size
    )
    # The difference of two unit vectors has another length than z_img: only its direction counts.
    towards = (z_new - z_old)[None] * np.linalg.norm(z_img)
    z_img = _between("the image and the difference of the texts", z_img, towards, shares)
    latents = Latents(z_img, np.repeat(x_T, len(shares), axis=0))
    yield from decode(cascade, latents, steps, batch_size)


def probe(
    cascade: Cascade,
    image: np.ndarray,
    dims: Sequence[int | None] | None,
    *,
    steps: int | None = None,
    batch_size: int = 8,
) -> Iterator[Event]:
    """Decodes ever more of the image's z_img; see `DALLE2.probe`."""
    dims = probe_dims(cascade) if dims is None else dims
    mean, components = _directions(cascade)
    if not isinstance(dims, Sequence | np.ndarray) or not len(dims):
        raise UserError(f"dims must list how many directions are kept, as [20, 40], not {dims}")
    counts = [k if k is None else checks.whole_number("dims", k, 0, len(components)) for k in dims]
    z_img, x_T = yield from invert(
        cascade, arguments.image("image", image), steps, batch_size=batch_size
    )
    # With k directions z_img is its projection onto the first k principal components (section 4,
    # figure 7); x_T stays, so that only what the embedding holds changes.
    z = [z_img[0] if k is None else project(z_img[0], mean, components[:k]) for k in counts]
    latents = Latents(np.stack(z), np.repeat(x_T, len(z), axis=0))
    yield from decode(cascade, latents, steps, batch_size)


def probe_dims(cascade: Cascade) -> list[int | None]:
    """Returns 20, 40, ... and the number of known principal directions, then None: all of z_img.

    The directions may leave out a little of z_img, so the last two differ.
    """
    count = len(_directions(cascade)[1])
    return [*range(20, count, 20), count, None]


def _directions(cascade: Cascade) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean [dim] of z_img and its principal directions [k, dim].

    The AR prior, which models z_img by its principal components, was trained with them.
    """
    if "ar_prior" not in cascade.params:
        raise UserError(
            f"{cascade.weights} has no ar_prior, which holds the directions of z_img: train one "
            "into that folder with configs/ar_prior.py"
        )
    statistics = cascade.params["ar_prior"]["statistics"]
    return np.asarray(statistics["mean"]), np.asarray(statistics["components"], np.float32)


def inpaints(cascade: Cascade) -> bool:
    """Returns whether the decoder was trained with the known part of an image as input."""
    return cascade.decoder.network.inpaints


def for_inpainting(cascade: Cascade) -> Cascade:
    """Returns the cascade with the settings that parts of images are generated with.

    A decoder that was not trained to inpaint repeats every step, by DDIM (RePaint, 2201.09865).
    """
    if inpaints(cascade):
        return cascade
    settings = dataclasses.replace(
        cascade.decoder.settings, solver="ddim", eta=0.0, repeats=_REPEATS
    )
    decoder = dataclasses.replace(cascade.decoder, settings=settings)
    return dataclasses.replace(cascade, decoder=decoder)


def inpaint(
    cascade: Cascade,
    image: np.ndarray,
    edit_mask: np.ndarray,
    prompt: str | None,
    n: int,
    seed: int,
    *,
    feather: int | None = None,
    batch_size: int = 8,
) -> Iterator[Event]:
    """Regenerates the pixels of `edit_mask`; see `DALLE2.inpaint`."""
    image = arguments.image("image", image)[0]
    edit_mask = arguments.edit_mask(edit_mask, image.shape)
    image, edit_mask = canvas.fit_square(image, edit_mask, cascade.image_size)
    n = limits.whole_number("n", n, highest=MAX_RETURNED)
    prompt = None if prompt is None else arguments.prompt(prompt)
    z_img = cascade.encode_image(image[None]) if prompt is None else None
    # Without a prompt the image's own embedding says what the hole is to show.
    images = yield from _fill(
        cascade,
        np.repeat(image[None], n, axis=0),
        ~edit_mask,
        prompt,
        z_img,
        seed,
        feather,
        batch_size,
    )
    yield Batch(0, images)


def outpaint(
    cascade: Cascade,
    image: np.ndarray,
    prompt: str | None,
    n: int,
    seed: int,
    *,
    margins: Sequence[int],
    overlap: float,
    feather: int | None = None,
    batch_size: int = 8,
) -> Iterator[Event]:
    """Extends an image beyond its sides; see `DALLE2.outpaint`.

    The canvas grows frame by frame:

        canvas, known_mask = the image with margins, True where the image is
        for each window of image_size, chosen by `canvas.frames`:
            canvas[window] = generated where known_mask[window] is False
            known_mask[window] = True

    Args:
        margins: (left, right, up, down) in pixels.
    """
    image = arguments.image("image", image)[0]
    sides = zip(MARGINS, margins, strict=True)
    margins = [limits.whole_number(side, margin) for side, margin in sides]
    if not any(margins):
        raise UserError("nothing is to be added: give left, right, up or down, in pixels")
    overlap = limits.number("overlap", overlap)
    seed, size = limits.whole_number("seed", seed), cascade.image_size
    n = limits.whole_number("n", n, highest=MAX_RETURNED)
    prompt = None if prompt is None else arguments.prompt(prompt)
    # A canvas of at least one frame; where it is larger than the result, `window_of_result` cuts.
    extended, known_mask, window_of_result = canvas.extend(image, margins, size)
    # All n canvases have one known_mask, so their frames are generated as one batch of n rows.
    images = np.repeat(extended[None], n, axis=0)
    if prompt is None:
        z_img = cascade.encode_image(image[None])
    else:  # sampled once, because all frames are to show one thing
        z_img = yield from cascade.sample_prior(prompt, n, seed, batch_size=batch_size)
    for frame, window in enumerate(canvas.frames(known_mask, size, overlap)):
        # Each frame has a seed of its own: with one seed all would begin from the same noise, and
        # look alike.
        (frame_seed,) = np.random.SeedSequence([seed, frame]).generate_state(1)
        images[:, *window] = yield from _fill(
            cascade,
            images[:, *window],
            known_mask[window],
            prompt,
            z_img,
            int(frame_seed),
            feather,
            batch_size,
        )
        known_mask[window] = True
    yield Batch(0, images[:, *window_of_result])


def _fill(
    cascade: Cascade,
    images: np.ndarray,
    known_mask: np.ndarray,
    prompt: str | None,
    z_img: np.ndarray | None,
    seed: int,
    feather: int | None,
    batch_size: int,
) -> Steps[np.ndarray]:
    """Generates the unknown pixels of images, yielding progress.

    Args:
        images: uint8 [n, s, s, 3] of `image_size` s.
        known_mask: bool [s, s], True where pixels are kept.
        feather: see `DALLE2.inpaint`.
        prompt, z_img, seed, batch_size: see `Cascade.generate`.

    Returns:
        uint8 [n, s, s, 3], equal to `images` where known_mask is True.
    """
    n, size = len(images), cascade.image_size
    feather = size // 16 if feather is None else limits.whole_number("feather", feather)
    # Known pixels travel as RGBA, the known_mask as alpha, so that one array is cut into batches.
    alpha = np.broadcast_to(known_mask[..., None] * np.uint8(255), (n, size, size, 1))
    known_images = np.concatenate([images, alpha], axis=-1)
    generated = []
    events = for_inpainting(cascade).generate(
        prompt, n, seed, z_img=z_img, known_images=known_images, batch_size=batch_size
    )
    for event in events:
        if isinstance(event, Batch):
            generated.append(event.images)
        else:
            yield event
    # The network only comes near to the known pixels: pasting makes them exact.
    return masks.paste(images, known_mask, np.concatenate(generated), feather)


def _between(name: str, a: np.ndarray, b: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Returns rows [frames, ...] from a [1, ...] to b [1, ...], each slerped as one vector."""
    try:
        rows: Any = slerp(a.reshape(1, -1), b.reshape(1, -1), shares)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return rows.reshape(-1, *a.shape[1:])

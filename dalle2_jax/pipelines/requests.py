"""Answering a `Request`: `run` generates what a person asks for, whoever carries the request.

The command line maps flags to a Request and writes files; a server maps JSON and forms to a Request
and streams. Neither knows how a mode works, and nothing here knows of flags, folders or HTTP.

    for event in run(model, Request(prompts=("a cat",), n=4), preview_every=5):
        StageProgress   a stage has done some of its steps: for a progress bar
        Preview         what the images look like so far: for impatient people
        Generated       an image is done, with its metadata: write or send it

The metadata of a generated image are its Request, so that it can be generated again (`metadata`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import arrays
from dalle2_jax.imaging.crops import crop_resize
from dalle2_jax.pipelines import edits, limits
from dalle2_jax.pipelines.cascade import Cascade
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.pipelines.events import Batch, Event, StageProgress
from dalle2_jax.pipelines.inversion import for_inversion
from dalle2_jax.pipelines.metadata import to_metadata
from dalle2_jax.pipelines.modes import GENERATE
from dalle2_jax.pipelines.request import Request
from dalle2_jax.sampling.stage import StageSampler
from dalle2_jax.version import __version__


class Preview(NamedTuple):
    """The images of the running batch as a stage predicts them now.

    Attributes:
        stage, done, total: as in `StageProgress`.
        images: uint8 [b, s, s, 3] at the size s of the stage.
    """

    stage: str
    done: int
    total: int
    images: np.ndarray


class Generated(NamedTuple):
    """A finished image.

    Attributes:
        image: uint8 [h, w, 3].
        row: number of the prompt or input image that it belongs to.
        index: number within the row; with `best_of`, the number among all that were generated.
        label: a few words on what distinguishes it in its row.
        metadata: plain JSON values: the request, and what `_generated` adds.
    """

    image: np.ndarray
    row: int
    index: int
    label: str
    metadata: dict[str, Any]


def run(
    model: DALLE2,
    request: Request,
    *,
    preview_every: int = 0,
    only: tuple[int, int] | None = None,
) -> Iterator[StageProgress | Preview | Generated]:
    """Answers a request, event by event. Closing the iterator cancels the work.

    Args:
        model: the model; the request's options, prior and size are applied to it.
        preview_every: yield a Preview after every so many steps of each image stage; 0: none.
        only: (row, index) of the one image to generate; None: all. It is generated in the batch
            that it was part of, so that it comes out the same to the bit.

    Raises:
        UserError: something that the model cannot do, or the request has no image `only`.
    """
    model = prepare(model, request)
    if preview_every:
        steps = limits.whole_number("preview_every", preview_every)
        model = dataclasses.replace(model, cascade=_reporting(model.cascade, steps))
    # One image of many needs no ranking: its number says which of the `best_of` it is.
    if request.mode == GENERATE and (request.best_of is None or only is not None):
        events = _generate(model, request, only)
    elif request.mode == GENERATE:
        events = _rank(model, request)
    else:
        events = _edit(model, request)
    # Whether the request has an image `only` shows when all events have passed.
    is_found = only is None
    steps_before: dict[str, int] = {}  # stage -> steps done at its last event
    for event in events:
        if isinstance(event, Generated):
            if only is None or (event.row, event.index) == only:
                is_found = True
                yield event
            continue
        yield event
        # ndim 4: images. A prior's x_0 [b, dim] cannot be shown.
        if preview_every and event.x_0 is not None and event.x_0.ndim == 4:
            # Events may come more often than `preview_every` steps: show one for each multiple.
            if event.done // preview_every > steps_before.get(event.stage, 0) // preview_every:
                images = np.asarray(arrays.to_uint8(event.x_0))
                yield Preview(event.stage, event.done, event.total, images)
            steps_before[event.stage] = event.done
    if not is_found:
        raise UserError(f"the request has no image (row, index) = {only}")


def prepare(model: DALLE2, request: Request) -> DALLE2:
    """Returns the model with the request's size, prior and options; raises UserError."""
    if request.size is not None:
        model = model.at_size(request.size)
    model = model.with_prior(request.prior)
    return dataclasses.replace(model, cascade=model.cascade.with_options(request.options))


def _reporting(cascade: Cascade, steps: int) -> Cascade:
    """Returns the cascade whose samplers report after at most so many steps.

    A sampler reports between calls of its compiled program, which takes `steps_a_call` steps. This
    number is an argument of the program, so changing it does not recompile the program.
    """
    samplers = cascade.samplers()
    for stage, sampler in samplers.items():
        if isinstance(sampler, StageSampler):
            steps_a_call = min(sampler.steps_a_call, steps)
            samplers[stage] = dataclasses.replace(sampler, steps_a_call=steps_a_call)
    return cascade.with_samplers(samplers)


def _generate(
    model: DALLE2, request: Request, only: tuple[int, int] | None
) -> Iterator[StageProgress | Generated]:
    """Generates images from prompts; they come batch by batch."""
    n = request.n if request.best_of is None else request.best_of
    # Batches before that of `only` are not generated; those after it are not reached.
    skip = 0 if only is None else only[0] * n + only[1]
    events = model.cascade.generate(
        request.prompts, n, request.seed, batch_size=request.batch_size, skip=skip
    )
    for event in events:
        if not isinstance(event, Batch):
            yield event
            continue
        for place, image in enumerate(event.images, event.start):
            row, index = divmod(place, n)
            yield _generated(model, request, image, row, index, request.prompts[row])
        if only is not None and event.start + len(event.images) > skip:
            return


def _rank(model: DALLE2, request: Request) -> Iterator[StageProgress | Generated]:
    """Generates `best_of` images of each prompt; the best n come prompt by prompt."""
    assert request.best_of is not None
    events = edits.rank(
        model.cascade,
        request.prompts,
        request.n,
        request.best_of,
        request.seed,
        batch_size=request.batch_size,
    )
    # Each list is a whole prompt's, in the order of the prompts, the best image first.
    row = 0
    for event in events:
        if not isinstance(event, list):
            yield event
            continue
        for one in event:
            label = request.prompts[row]
            yield _generated(model, request, one.image, row, one.index, label, score=one.score)
        row += 1


def _edit(model: DALLE2, request: Request) -> Iterator[StageProgress | Generated]:
    """Runs a mode that edits images; the results come batch by batch."""
    # Computed first, as both report mistakes in the request before anything is generated.
    settings = _for_mode(model, request).settings()
    labels = _labels(model, request)
    for event in _edit_events(model, request):
        if not isinstance(event, Batch):
            yield event
            continue
        for place, image in enumerate(event.images, event.start):
            row, index = divmod(place, len(labels))
            yield _generated(model, request, image, row, index, labels[index], settings=settings)


def _edit_events(model: DALLE2, request: Request) -> Iterator[Event]:
    """Returns the events of the request's edit: its fields as arguments of the function."""
    cascade, batch_size, steps = model.cascade, request.batch_size, _decoder_steps(request)
    if request.mode == "inpaint":
        return edits.inpaint(
            cascade,
            request.images[0].pixels,
            request.edit_mask,
            request.prompt,
            request.n,
            request.seed,
            feather=request.feather,
            batch_size=batch_size,
        )
    if request.mode == "outpaint":
        return edits.outpaint(
            cascade,
            request.images[0].pixels,
            request.prompt,
            request.n,
            request.seed,
            margins=request.margins,
            overlap=request.overlap,
            feather=request.feather,
            batch_size=batch_size,
        )
    images = _squares(model, request)
    if request.mode == "reconstruct":
        return edits.reconstruct(cascade, images, steps, batch_size)
    if request.mode == "variations":
        return edits.variations(
            cascade,
            images,
            request.n,
            request.seed,
            eta=request.eta,
            steps=steps,
            batch_size=batch_size,
        )
    if request.mode == "interpolate":
        # Two images, or an image and a text: `Request` has checked that they are two.
        a, b = [*images, *request.prompts]
        return edits.interpolate(
            cascade,
            a,
            b,
            request.frames,
            request.seed,
            x_T=request.x_T,
            steps=steps,
            batch_size=batch_size,
        )
    if request.mode == "text_diff":
        return edits.text_diff(
            cascade,
            images[0],
            request.prompts[0],
            request.old_prompt,
            request.frames,
            theta=request.theta,
            steps=steps,
            batch_size=batch_size,
        )
    return edits.probe(cascade, images[0], None, steps=steps, batch_size=batch_size)


def _for_mode(model: DALLE2, request: Request) -> DALLE2:
    """Returns the model with the settings that the request's mode samples with.

    The metadata hold these settings. The edits choose them themselves, by the same functions.
    """
    cascade, steps = model.cascade, _decoder_steps(request)
    if request.mode == "variations":
        cascade = edits.for_variations(cascade, request.eta, steps)
    elif request.mode in ("inpaint", "outpaint"):
        cascade = edits.for_inpainting(cascade)
    elif request.mode != GENERATE:
        cascade = for_inversion(cascade, steps)
    return dataclasses.replace(model, cascade=cascade)


def _decoder_steps(request: Request) -> Any:
    """Returns the decoder's steps in the request's options; None: the default of the mode."""
    steps = request.options.steps
    return steps.get("decoder") if isinstance(steps, Mapping) else steps


def _squares(model: DALLE2, request: Request) -> np.ndarray:
    """Returns the middle squares of the input images at one size, uint8 [b, s, s, 3].

    The size is the larger of what the model generates and of what CLIP reads, so that neither sees
    less of them than it can.
    """
    tower = model.cascade.clip.image or {}
    side = max(model.image_size, tower.get("image_size", 0))
    return np.stack([crop_resize(image.pixels, side) for image in request.images])


def _labels(model: DALLE2, request: Request) -> list[str]:
    """Returns what distinguishes the images of a row."""
    shares = np.linspace(0, 1, max(request.frames, 1))
    if request.mode == "reconstruct":
        return ["reconstruction"]
    if request.mode == "variations":
        return [f"variation {i}" for i in range(request.n)]
    if request.mode == "interpolate":
        return [f"{share:.2f}" for share in shares]
    if request.mode == "text_diff":
        return [f"theta {share:.2f}" for share in request.theta * shares]
    if request.mode == "probe":
        return ["all" if k is None else f"{k} directions" for k in model.probe_dims()]
    return [f"edit {i}" for i in range(request.n)]


def _generated(
    model: DALLE2,
    request: Request,
    image: np.ndarray,
    row: int,
    index: int,
    label: str,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> Generated:
    """Returns a finished image with its metadata: the request, and how it was answered.

    Args:
        settings: how each stage was sampled; None: by the model's settings.
        **more: further metadata.
    """
    metadata = {
        **to_metadata(request),
        "row": row,
        "index": index,
        "settings": model.settings() if settings is None else settings,
        "size": model.image_size,
        "weights": model.weights,
        "hash": model.weights_hash,
        "version": __version__,
        **more,
    }
    # A row of "generate" is a prompt; in other modes the label says what an image is.
    if request.mode == GENERATE:
        metadata["prompt"] = request.prompts[row]
    else:
        metadata["label"] = label
    return Generated(image, row, index, label, metadata)

"""Answering a `Request`: `run` generates what a person asks for, whoever carries the request.

The command line maps flags to a Request and writes files; a server maps JSON and forms to a Request
and streams. Neither knows how a mode works, and nothing here knows of flags, places of files or
HTTP.

    for event in run(model, request):       StageProgress, Preview or Generated, as they come

The metadata of a generated image are its Request, so that it can be generated again (`metadata`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dalle2_jax.imaging import arrays, canvas
from dalle2_jax.imaging.crops import crop_resize
from dalle2_jax.pipelines import edits
from dalle2_jax.pipelines.cascade import Cascade
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.pipelines.events import Batch, Event, StageProgress
from dalle2_jax.pipelines.inversion import for_inversion
from dalle2_jax.pipelines.metadata import to_metadata
from dalle2_jax.pipelines.modes import GENERATE
from dalle2_jax.pipelines.request import Request
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.validation import checks
from dalle2_jax.version import __version__

_MANY_FRAMES = 20


class Preview(NamedTuple):
    """The present predictions of the images of a batch, uint8 [b, h, w, 3], while a stage runs."""

    stage: str
    done: int
    total: int
    images: np.ndarray


class Generated(NamedTuple):
    """A finished image."""

    image: np.ndarray  # uint8 [h, w, 3]
    row: int  # number of the prompt or of the given image that it belongs to
    index: int  # number within the row; of best_of images, that among all of them
    label: str  # a few words on what distinguishes it in its row
    metadata: dict[str, Any]  # plain JSON


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
        UserError: an argument out of range, or something that the model cannot do.
    """
    model = prepare(model, request)
    if preview_every:
        steps = checks.whole_number("preview_every", preview_every, 1)
        model = dataclasses.replace(model, cascade=_reporting(model.cascade, steps))
    if request.mode == GENERATE and (request.best_of is None or only is not None):
        events = _generate(model, request, only)
    elif request.mode == GENERATE:
        events = _rank(model, request)
    else:
        events = _edit(model, request)
    previewed: dict[str, int] = {}
    for event in events:
        if isinstance(event, Generated):
            if only is None or (event.row, event.index) == only:
                yield event
            continue
        yield event
        if preview_every and event.x_0 is not None and event.x_0.ndim == 4:
            if event.done // preview_every > previewed.get(event.stage, 0) // preview_every:
                images = np.asarray(arrays.to_uint8(event.x_0))
                yield Preview(event.stage, event.done, event.total, images)
            previewed[event.stage] = event.done


def prepare(model: DALLE2, request: Request) -> DALLE2:
    """Returns the model with the request's size, prior and options; raises UserError."""
    if request.size is not None:
        model = model.at_size(request.size)
    model = model.with_prior(request.prior)
    return dataclasses.replace(model, cascade=model.cascade.with_options(request.options))


def _reporting(cascade: Cascade, steps: int) -> Cascade:
    """Returns the cascade whose samplers report after at most so many steps."""
    samplers = {
        name: dataclasses.replace(s, steps_a_call=min(s.steps_a_call, steps))
        if hasattr(s, "steps_a_call")
        else s
        for name, s in cascade.samplers().items()
    }
    return cascade.with_samplers(samplers)


def _generate(
    model: DALLE2, request: Request, only: tuple[int, int] | None
) -> Iterator[StageProgress | Generated]:
    n = request.n if request.best_of is None else request.best_of
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
    assert request.best_of is not None
    events = edits.rank(
        model.cascade,
        request.prompts,
        request.n,
        request.best_of,
        request.seed,
        batch_size=request.batch_size,
    )
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
    """Runs a mode that edits; its images come after all of its stages."""
    settings = for_mode(model, request).settings()
    labels = _labels(model, request)
    for event in _edit_events(model, request):
        if not isinstance(event, Batch):
            yield event
            continue
        for place, image in enumerate(event.images, event.start):
            row, index = divmod(place, len(labels))
            yield _generated(model, request, image, row, index, labels[index], settings=settings)


def _edit_events(model: DALLE2, request: Request) -> Iterator[Event]:
    cascade, size = model.cascade, request.batch_size
    options: dict[str, Any] = {"batch_size": size}
    if request.mode not in ("inpaint", "outpaint"):
        options["steps"] = decoder_steps(request)
    if request.mode == "reconstruct":
        return edits.reconstruct(cascade, squares(model, request), **options)
    if request.mode == "variations":
        images = squares(model, request)
        return edits.variations(
            cascade, images, request.n, request.seed, eta=request.eta, **options
        )
    if request.mode == "interpolate":
        a, b = [*squares(model, request), *request.prompts]
        return edits.interpolate(
            cascade, a, b, request.frames, request.seed, x_T=request.x_T, **options
        )
    if request.mode == "text_diff":
        (image,) = squares(model, request)
        return edits.text_diff(
            cascade,
            image,
            request.prompts[0],
            request.old_prompt,
            request.frames,
            theta=request.theta,
            **options,
        )
    if request.mode == "probe":
        (image,) = squares(model, request)
        return edits.probe(cascade, image, None, **options)
    image = request.images[0].pixels
    options["feather"] = request.feather
    if request.mode == "inpaint":
        return edits.inpaint(
            cascade,
            image,
            request.edit_mask,
            request.prompt,
            request.n,
            request.seed,
            **options,
        )
    return edits.outpaint(
        cascade,
        image,
        request.prompt,
        request.n,
        request.seed,
        margins=request.margins,
        overlap=request.overlap,
        **options,
    )


def for_mode(model: DALLE2, request: Request) -> DALLE2:
    """Returns the model with the settings that the request's mode samples with."""
    cascade, steps = model.cascade, decoder_steps(request)
    if request.mode == "variations":
        cascade = edits.for_variations(cascade, request.eta, steps)
    elif request.mode in ("inpaint", "outpaint"):
        cascade = edits.for_inpainting(cascade)
    elif request.mode != GENERATE:
        cascade = for_inversion(cascade, steps)
    return dataclasses.replace(model, cascade=cascade)


def decoder_steps(request: Request) -> Any:
    """Returns the decoder's steps that the request asks for; None: the default."""
    steps = request.options.steps
    return steps.get("decoder") if isinstance(steps, Mapping) else steps


def squares(model: DALLE2, request: Request) -> np.ndarray:
    """Returns the middle squares of the given images, at one size: uint8 [b, s, s, 3]."""
    tower = model.cascade.clip.image or {}
    side = max(model.image_size, tower.get("image_size", 0))
    return np.stack([crop_resize(i.pixels, side) for i in request.images])


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
    if request.mode == GENERATE:
        metadata["prompt"] = request.prompts[row]
    else:
        metadata["label"] = label
    return Generated(image, row, index, label, metadata)


def notes(model: DALLE2, request: Request) -> list[str]:
    """Returns lines on what a user may not expect: texts cut, slow modes."""
    lines = []
    texts = [*request.prompts, *([request.old_prompt] if request.mode == "text_diff" else [])]
    for text in texts:
        clip, decoder = (_text_read(tokenizer, text) for tokenizer in model.cascade.tokenizers())
        if clip == decoder and clip is not None:
            lines.append(f"a prompt is too long, only {clip!r} is read")
        elif clip != decoder:
            reads = ["all of it" if part is None else f"only {part!r}" for part in (clip, decoder)]
            lines.append(f"a prompt is too long, CLIP reads {reads[0]}, the decoder {reads[1]}")
    if request.mode in ("inpaint", "outpaint") and not model.inpaints:
        lines.append(
            f"the decoder of {model.weights} was not trained to inpaint: each step is repeated, by "
            "ddim (RePaint)"
        )
    if request.mode == "outpaint":
        shape, size = request.images[0].pixels.shape, model.image_size
        frames = canvas.estimate_frames(shape, request.margins, size)
        if frames > _MANY_FRAMES:
            lines.append(f"it takes some {frames} frames of {size} px")
    return lines


def _text_read(tokenizer: Tokenizer, text: str) -> str | None:
    """Returns the part of a text that is read; None: all of it."""
    if tokenizer.length(text) <= tokenizer.context_length:
        return None
    return tokenizer.decode(tokenizer([text])[0])

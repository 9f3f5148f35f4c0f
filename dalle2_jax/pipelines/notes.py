"""Notes on a request: what a user may not expect, said before the work begins."""

from __future__ import annotations

from dalle2_jax.imaging import canvas
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.pipelines.request import Request
from dalle2_jax.tokenizer import Tokenizer

_MANY_FRAMES = 20  # of outpainting; a user is warned of more


def lines(model: DALLE2, request: Request) -> list[str]:
    """Returns lines on what a user may not expect: prompts that are cut, modes that take long."""
    notes = []
    texts = [*request.prompts, *([request.old_prompt] if request.mode == "text_diff" else [])]
    for text in texts:
        clip, decoder = (_text_read(tokenizer, text) for tokenizer in model.cascade.tokenizers())
        if clip == decoder and clip is not None:
            notes.append(f"a prompt is too long, only {clip!r} is read")
        elif clip != decoder:
            reads = ["all of it" if part is None else f"only {part!r}" for part in (clip, decoder)]
            notes.append(f"a prompt is too long, CLIP reads {reads[0]}, the decoder {reads[1]}")
    if request.mode in ("inpaint", "outpaint") and not model.inpaints:
        notes.append(
            f"the decoder of {model.weights} was not trained to inpaint: each step is repeated, by "
            "ddim (RePaint)"
        )
    if request.mode == "outpaint":
        shape, size = request.images[0].pixels.shape, model.image_size
        frames = canvas.estimate_frames(shape, request.margins, size)
        if frames > _MANY_FRAMES:
            notes.append(f"this takes about {frames} frames of {size} px, one after the other")
    return notes


def _text_read(tokenizer: Tokenizer, text: str) -> str | None:
    """Returns the part of a text that is read; None: all of it."""
    if tokenizer.length(text) <= tokenizer.context_length:
        return None
    return tokenizer.decode(tokenizer([text])[0])

"""What sample.py does with pictures, a mode of `modes` at a time: files, strip, animation."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.cli import modes
from dalle2_jax.cli.drawing import Bars, say_what_is_read
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import canvas, files
from dalle2_jax.imaging.decode import crop_resize
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.sampling.overrides import Choice
from dalle2_jax.validation import arguments
from dalle2_jax.version import __version__

_MANY_FRAMES = 20
_MOVING_MS = 150  # of a picture of an animation


@dataclasses.dataclass(frozen=True)
class Strip:
    """Pictures uint8 [h, w, 3] of one size, and what is written below each."""

    frames: Sequence[np.ndarray] | np.ndarray
    labels: Sequence[str]
    moves: bool = False  # they are steps of one motion


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the flags ask for."""

    images: Sequence[np.ndarray]  # squares of one size
    prompts: Sequence[str]
    n: int
    seed: int
    options: Mapping[str, Any]  # of `Cascade.stream`

    @property
    def prompt(self) -> str | None:
        """Of a mode that takes one or none."""
        return next(iter(self.prompts), None)


def _reconstruct(model: DALLE2, asked: Asked) -> list[Strip]:
    drawn = model.reconstruct(np.stack(asked.images), **asked.options)
    return [
        Strip((_square(given, len(picture)), picture), ("given", "drawn again"))
        for given, picture in zip(asked.images, drawn, strict=True)
    ]


def _variations(model: DALLE2, asked: Asked) -> list[Strip]:
    given = np.stack(asked.images)
    drawn = model.variations(given, asked.n, asked.seed, eta=modes.ETA.value, **asked.options)
    labels = ["given", *(f"variation {i}" for i in range(asked.n))]
    rows = drawn.reshape(len(given), asked.n, *drawn.shape[1:])
    return [
        Strip((_square(a, len(row[0])), *row), labels) for a, row in zip(given, rows, strict=True)
    ]


def _interpolate(model: DALLE2, asked: Asked) -> list[Strip]:
    a, b = [*asked.images, *asked.prompts]
    x_T: Any = modes.X_T.value
    drawn = model.interpolate(a, b, modes.FRAMES.value, asked.seed, x_T=x_T, **asked.options)
    labels = [f"{share:.2f}" for share in np.linspace(0, 1, len(drawn))]
    return [Strip(drawn, labels, moves=True)]


def _text_diff(model: DALLE2, asked: Asked) -> list[Strip]:
    told = {"frames": modes.FRAMES.value, "theta": modes.THETA.value, **asked.options}
    drawn = model.text_diff(asked.images[0], asked.prompts[0], modes.OLD_PROMPT.value, **told)
    labels = [f"theta {share:.2f}" for share in np.linspace(0, modes.THETA.value, len(drawn))]
    return [Strip(drawn, labels, moves=True)]


def _probe(model: DALLE2, asked: Asked) -> list[Strip]:
    dims = model.probe_dims()
    drawn = model.probe(asked.images[0], dims, **asked.options)
    labels = ["all" if k is None else f"{k} directions" for k in dims]
    return [Strip(drawn, labels, moves=True)]


def _inpaint(model: DALLE2, asked: Asked) -> list[Strip]:
    picture, mask = _given()
    told: dict[str, Any] = {"feather": modes.FEATHER.value, **asked.options}
    drawn = model.inpaint(picture, mask, asked.prompt, asked.n, asked.seed, **told)
    given, erased = canvas.fitted(picture, mask, model.image_size)
    labels = ["given", "mask", *(f"drawn {i}" for i in range(asked.n))]
    return [Strip((given, _tinted(given, erased), *drawn), labels)]


def _outpaint(model: DALLE2, asked: Asked) -> list[Strip]:
    told: dict[str, Any] = {"feather": modes.FEATHER.value, **_margins(), **asked.options}
    picture = files.read(modes.IMAGE.value[0])
    frames = canvas.estimate(picture.shape, [*_margins().values()], model.image_size)
    if frames > _MANY_FRAMES:
        print(f"note: it takes some {frames} frames of {model.image_size} px", file=sys.stderr)
    drawn = model.outpaint(picture, asked.prompt, asked.n, asked.seed, **told)
    return [Strip(drawn, [f"drawn {i}" for i in range(asked.n)])]


def _as_it_draws(model: DALLE2, mode: str, steps: Any) -> DALLE2:
    """The model with the settings that the mode draws by, whatever others were asked for. Where it
    was not taught to draw parts of pictures, that is said."""
    if mode == "variations":
        return model.varying(modes.ETA.value, steps)
    if mode not in ("inpaint", "outpaint"):
        return model.inverting(steps)
    if not model.inpaints:
        told = "was not taught to inpaint: each step is taken again and again by ddim (RePaint)"
        print(f"note: the decoder of {model.weights} {told}", file=sys.stderr)
    return model.inpainting()


def _given() -> tuple[np.ndarray, np.ndarray]:
    """The picture [h, w, 3] and where it is to be drawn anew, bool [h, w]."""
    (path,) = modes.IMAGE.value
    picture = files.read(path)
    if modes.MASK.value is not None:
        return picture, arguments.mask(files.read_mask(modes.MASK.value), picture.shape)
    erased = files.read_erased(path)
    if not erased.any():
        raise UserError(f"--image={path} has no pixel of alpha 0: give a --mask")
    return picture, erased


def _margins() -> dict[str, int]:
    return {side: flag.value for side, flag in modes.SIDES.items()}


def preview(out: Path) -> Path:
    """Writes mask.png: the picture, with what would be drawn anew in stripes."""
    if modes.MODE.value == "inpaint":
        picture, mask = _given()
        picture, mask = canvas.fitted(picture, mask, min(mask.shape))
    else:
        picture = files.read(modes.IMAGE.value[0])
        picture, known, _ = canvas.extended(picture, [*_margins().values()], 1)
        mask = ~known
    files.save_png(out / "mask.png", _tinted(picture, mask))
    return out / "mask.png"


def _tinted(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3], striped in red and white where bool [h, w] is True."""
    places = np.indices(mask.shape).sum(axis=0) // max(4, min(mask.shape) // 32)
    stripes = np.where(places[..., None] % 2, [255, 0, 0], [255, 255, 255])
    tinted = (0.4 * picture + 0.6 * stripes).astype(np.uint8)
    return np.where(mask[..., None], tinted, picture)


_DRAW = {
    "reconstruct": _reconstruct,
    "variations": _variations,
    "interpolate": _interpolate,
    "text_diff": _text_diff,
    "probe": _probe,
    "inpaint": _inpaint,
    "outpaint": _outpaint,
}


def draw(
    model: DALLE2,
    prompts: Sequence[str],
    n: int,
    seed: int,
    batch_size: int,
    out: Path,
    steps: Choice = None,
) -> Path:
    """Writes what the mode makes of the pictures into the folder `out`: each as a PNG that carries
    how it was drawn, MODE.png with all and their labels, and where they move MODE.webp. Returns the
    path of MODE.png. `steps` are those of `with_settings`, if any."""
    name, images = modes.MODE.value, []
    old = [modes.OLD_PROMPT.value] if name == "text_diff" else []
    say_what_is_read(model, [*prompts, *old])
    options: dict[str, Any] = {"batch_size": batch_size, "progress": Bars()}
    steps = steps.get("decoder") if isinstance(steps, Mapping) else steps
    model = _as_it_draws(model, name, steps)
    if name not in ("inpaint", "outpaint"):  # which take the whole picture, with its mask
        side = max(model.image_size, (model.clip.image or {}).get("image_size", 0))
        images = [_square(files.read(path), side) for path in modes.IMAGE.value]
        options["steps"] = steps
    strips = _DRAW[name](model, Asked(images, prompts, n, seed, options))
    about: dict[str, Any] = {"mode": name, "images": modes.IMAGE.value, "prompts": list(prompts)}
    about |= {"seed": seed, "version": __version__, "weights": model.weights}
    about |= {"size": model.image_size, "hash": model.weights_hash, "settings": model.settings()}
    about |= modes.told()
    for row, strip in enumerate(strips):
        for place, (frame, label) in enumerate(zip(strip.frames, strip.labels, strict=True)):
            file = out / f"{name}-s{seed}-{row:03d}-{place:02d}-{files.slug(label)}.png"
            files.save_png(file, frame, {**about, "label": label})
        if strip.moves:
            files.save_animation(out / f"{name}.webp", strip.frames, _MOVING_MS)
    frames = [frame for strip in strips for frame in strip.frames]
    labels = [label for strip in strips for label in strip.labels]
    grid = files.labelled_grid(frames, len(strips[0].frames), picture_labels=labels)
    files.save_png(out / f"{name}.png", grid, about)
    return out / f"{name}.png"


def _square(picture: np.ndarray, size: int) -> np.ndarray:
    """The middle square, which is cut out first: a line of many pixels would fill the memory."""
    return crop_resize(picture, size, (1.0, 0.5, 0.5))

"""What `sample.py --mode` does with pictures: single files, a labelled strip, an animation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from dalle2_jax import pictures
from dalle2_jax.errors import UserError
from dalle2_jax.version import __version__

if TYPE_CHECKING:  # mistakes in the flags are told before jax is loaded
    from dalle2_jax.dalle2 import DALLE2

GENERATE = "generate"
STEPS = 50  # of the decoder, unless told: a picture is inverted and drawn again in as many
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


def _reconstruct(model: DALLE2, asked: Asked) -> list[Strip]:
    drawn = model.reconstruct(np.stack(asked.images), **asked.options)
    return [
        Strip((_like(given, picture), picture), ("given", "drawn again"))
        for given, picture in zip(asked.images, drawn, strict=True)
    ]


def _variations(model: DALLE2, asked: Asked) -> list[Strip]:
    given = np.stack(asked.images)
    drawn = model.variations(given, asked.n, asked.seed, eta=ETA.value, **asked.options)
    labels = ["given", *(f"variation {i}" for i in range(asked.n))]
    rows = drawn.reshape(len(given), asked.n, *drawn.shape[1:])
    return [Strip((_like(a, row[0]), *row), labels) for a, row in zip(given, rows, strict=True)]


def _interpolate(model: DALLE2, asked: Asked) -> list[Strip]:
    a, b = [*asked.images, *asked.prompts]
    x_T: Any = X_T.value
    drawn = model.interpolate(a, b, FRAMES.value, asked.seed, x_T=x_T, **asked.options)
    labels = [f"{share:.2f}" for share in np.linspace(0, 1, len(drawn))]
    return [Strip(drawn, labels, moves=True)]


def _text_diff(model: DALLE2, asked: Asked) -> list[Strip]:
    told = {"frames": FRAMES.value, "theta": THETA.value, **asked.options}
    drawn = model.text_diff(asked.images[0], asked.prompts[0], OLD_PROMPT.value, **told)
    labels = [f"theta {share:.2f}" for share in np.linspace(0, THETA.value, len(drawn))]
    return [Strip(drawn, labels, moves=True)]


@dataclasses.dataclass(frozen=True)
class Mode:
    """How many pictures and prompts a mode takes (from, to), and what it makes of them."""

    images: tuple[int, int]
    prompts: tuple[int, int]
    draw: Callable[[DALLE2, Asked], list[Strip]]
    told: str


_MANY = 10_000
MODES = {
    "reconstruct": Mode((1, _MANY), (0, 0), _reconstruct, "--image A"),
    "variations": Mode((1, _MANY), (0, 0), _variations, "--image A"),
    "interpolate": Mode((1, 2), (0, 1), _interpolate, '--image A --image B, or --prompt "..."'),
    "text_diff": Mode((1, 1), (1, 1), _text_diff, '--image A --prompt "..."'),
}

MODE = flags.DEFINE_enum("mode", GENERATE, [GENERATE, *MODES], "What to do; see docs/pictures.md.")
IMAGE = flags.DEFINE_multi_string("image", [], "A picture's file; may be given several times.")
FRAMES = flags.DEFINE_integer("frames", 7, "Pictures of interpolate and text_diff.", 2)
ETA = flags.DEFINE_float("eta", 0.6, "Of variations: 0 is the picture itself, 1 differs most.")
THETA = flags.DEFINE_float("theta", 0.5, "Of text_diff: the share of the way that is gone.")
OLD_PROMPT = flags.DEFINE_string("old_prompt", "a photo", "Of text_diff: what --image shows.")
X_T = flags.DEFINE_enum("x_t", "slerp", ["slerp", "fixed"], "Of interpolate, between pictures.")


def check(prompts: Sequence[str]) -> None:
    """UserError for pictures or prompts that the mode does not take."""
    if MODE.value == GENERATE:
        if IMAGE.value:
            raise UserError(f"--image={IMAGE.value[0]}: say by --mode what to do with it")
        if not prompts:
            raise UserError('nothing to draw: give --prompt "..." or --prompts_file FILE')
        return
    name, mode = MODE.value, MODES[MODE.value]
    given = {"--image": (len(IMAGE.value), mode.images), "--prompt": (len(prompts), mode.prompts)}
    count = len(IMAGE.value) + len(prompts)
    if name == "interpolate" and count != 2:
        raise UserError(f"--mode={name} takes two, not {count}: {mode.told}")
    for flag, (found, (low, high)) in given.items():
        if not low <= found <= high:
            raise UserError(f"--mode={name}: {found} times {flag}; it takes {mode.told}")


def draw(
    model: DALLE2,
    prompts: Sequence[str],
    n: int,
    seed: int,
    batch_size: int,
    out: Path,
) -> Path:
    """Writes what the mode makes of the pictures into the folder `out`: each as a PNG that carries
    how it was drawn, MODE.png with all and their labels, and where they move MODE.webp. Returns the
    path of MODE.png."""
    from dalle2_jax.drawing import Bars  # late: it loads jax

    name = MODE.value
    side = max(model.image_size, (model.clip.image or {}).get("image_size", 0))
    images = [pictures.middle_square(pictures.read(path), side) for path in IMAGE.value]
    options = {"batch_size": batch_size, "progress": Bars()}
    strips = MODES[name].draw(model, Asked(images, prompts, n, seed, options))
    about: dict[str, Any] = {"mode": name, "images": IMAGE.value, "prompts": list(prompts)}
    about |= {"seed": seed, "version": __version__, "weights": model.weights}
    about |= {"hash": model.weights_hash, "settings": model.settings()}
    about |= {flag.name: flag.value for flag in (FRAMES, ETA, THETA, OLD_PROMPT, X_T)}
    for row, strip in enumerate(strips):
        for place, (frame, label) in enumerate(zip(strip.frames, strip.labels, strict=True)):
            file = out / f"{name}-{row:03d}-{place:02d}-{pictures.slug(label)}.png"
            pictures.save_png(file, frame, {**about, "label": label})
        if strip.moves:
            pictures.save_animation(out / f"{name}.webp", strip.frames, _MOVING_MS)
    frames = [frame for strip in strips for frame in strip.frames]
    labels = [label for strip in strips for label in strip.labels]
    grid = pictures.labelled_grid(frames, len(strips[0].frames), picture_labels=labels)
    pictures.save_png(out / f"{name}.png", grid, about)
    return out / f"{name}.png"


def _like(picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A square picture at the size of another."""
    return pictures.middle_square(picture, other.shape[0])

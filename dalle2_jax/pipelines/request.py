"""A `Request`: what a person asks for, with the files that are given."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Self

import numpy as np

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import files
from dalle2_jax.pipelines.modes import GENERATE, MARGINS, MODES
from dalle2_jax.sampling.overrides import SamplingOptions
from dalle2_jax.storage import paths
from dalle2_jax.validation import arguments, checks


@dataclasses.dataclass(frozen=True, eq=False)
class InputImage:
    """An image that is given: its pixels, and what identifies its file.

    Attributes:
        pixels: uint8 [h, w, 3].
        transparent: bool [h, w], True where the file's alpha is 0.
        name: the file's path, for people and to open it again.
        sha256: of the file's bytes.
    """

    pixels: np.ndarray
    transparent: np.ndarray
    name: str
    sha256: str

    @classmethod
    def open(cls, path: str | Path, name: str | None = None) -> Self:
        """Reads a file; raises UserError. `name` is what the metadata call it; None: the path."""
        return cls(
            pixels=files.read(path),
            transparent=files.read_transparent(path),
            name=str(path) if name is None else name,
            sha256=sha256_of(path),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class InputMask:
    """A mask that is given: bool [h, w], True where pixels are regenerated, and its file."""

    edit_mask: np.ndarray
    name: str
    sha256: str

    @classmethod
    def open(cls, path: str | Path, name: str | None = None) -> Self:
        """Reads a mask file, see `imaging.files.read_mask`; raises UserError."""
        return cls(files.read_mask(path), str(path) if name is None else name, sha256_of(path))


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What is to be generated. What the modes do with the fields: see the methods of `DALLE2`.

    Attributes:
        mode: one of `MODES`.
        prompts: texts; how many a mode takes: `MODES`.
        images: likewise.
        mask: (inpaint) where to regenerate; None: the transparent pixels of the image.
        n: images for each prompt or image.
        seed: of all noise.
        options: how the stages are sampled, where it differs from the model folder.
        prior: "diffusion", "ar" or "none"; None: the model's.
        size: side of the images in pixels; None: the model's.
        best_of: (generate) keep the n best of so many.
        frames: (interpolate, text_diff) number of images.
        eta: (variations) 0 to 1.
        theta: (text_diff) share of the angle, 0 to 1.
        old_prompt: (text_diff) what the image shows now.
        x_T: (interpolate) "slerp" or "fixed".
        left, right, up, down: (outpaint) pixels to add.
        overlap: (outpaint) known share of a frame.
        feather: (inpaint, outpaint) pixels; None: a 16th of the side.
        batch_size: images generated at a time.
    """

    mode: str = GENERATE
    prompts: tuple[str, ...] = ()
    images: tuple[InputImage, ...] = ()
    mask: InputMask | None = None
    n: int = 1
    seed: int = 0
    options: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    prior: str | None = None
    size: int | None = None
    best_of: int | None = None
    frames: int = 7
    eta: float = 0.6
    theta: float = 0.5
    old_prompt: str = "a photo"
    x_T: str = "slerp"
    left: int = 0
    right: int = 0
    up: int = 0
    down: int = 0
    overlap: float = 0.5
    feather: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        checks.one_of("mode", self.mode, MODES)
        if self.prompts:
            arguments.prompts(list(self.prompts))
        mode, counts = MODES[self.mode], {"image": self.images, "prompt": self.prompts}
        if self.mode == "interpolate" and len(self.images) + len(self.prompts) != 2:
            raise UserError(
                f"mode={self.mode} takes {mode.example}, "
                f"not {len(self.images)} images and {len(self.prompts)} prompts"
            )
        for name, values in counts.items():
            low, high = mode.images if name == "image" else mode.prompts
            if not low <= len(values) <= high:
                raise UserError(
                    f"mode={self.mode}: {len(values)} x {name}; it takes {mode.example}"
                )
        if self.mode == "outpaint" and not any(self.margins):
            raise UserError("outpaint: give left, right, up or down, how many pixels to add")
        if self.best_of is not None and self.best_of < self.n:
            raise UserError(f"best_of={self.best_of} must be n={self.n} at least, which are kept")

    @property
    def prompt(self) -> str | None:
        """The prompt of a mode that takes at most one."""
        return next(iter(self.prompts), None)

    @property
    def margins(self) -> tuple[int, ...]:
        """Pixels to add on the left, on the right, above and below."""
        return tuple(getattr(self, side) for side in MARGINS)

    @property
    def edit_mask(self) -> np.ndarray:
        """The pixels of the one image that are to be regenerated, bool [h, w].

        Raises UserError if there are none.
        """
        (image,) = self.images
        if self.mask is not None:
            return arguments.edit_mask(self.mask.edit_mask, image.pixels.shape)
        if not image.transparent.any():
            raise UserError(f"{image.name} has no transparent pixel (alpha 0): give a mask")
        return image.transparent


def sha256_of(path: str | Path) -> str:
    """Returns the sha256 of a file's bytes; raises UserError if it cannot be read."""
    path = paths.to_path(path)
    with paths.as_user_error("cannot read", path):
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error

"""A `Request`: what a person asks for, with the files that it names.

It knows nothing of flags, HTTP or the model: the command line and a server make the same requests,
`requests.run` answers them, and `metadata` writes them into the images.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Self

import numpy as np

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import files
from dalle2_jax.pipelines import limits
from dalle2_jax.pipelines.limits import MAX_RETURNED
from dalle2_jax.pipelines.modes import GENERATE, MARGINS, MODES, MODES_OF, X_T_CHOICES, takes
from dalle2_jax.sampling.overrides import SamplingOptions
from dalle2_jax.storage import paths
from dalle2_jax.validation import arguments, checks


@dataclasses.dataclass(frozen=True, eq=False)
class InputImage:
    """An image to edit: its pixels, and what identifies its file.

    Attributes:
        pixels: uint8 [h, w, 3].
        transparent: bool [h, w], True where the file's alpha is 0.
        name: the file's path as the metadata call it, for people and to open it again.
        sha256: of the file's bytes, by which a changed file is recognised.
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
    """The mask of an edit, and what identifies its file.

    Attributes:
        edit_mask: bool [h, w], True where pixels are regenerated.
        name, sha256: as in `InputImage`.
    """

    edit_mask: np.ndarray
    name: str
    sha256: str

    @classmethod
    def open(cls, path: str | Path, name: str | None = None) -> Self:
        """Reads a mask file, see `imaging.files.read_mask`; raises UserError."""
        return cls(files.read_mask(path), str(path) if name is None else name, sha256_of(path))


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A mode and its arguments, as a person asks for them; checked when the request is made.

    `modes` says how many prompts and images a mode takes, and which of the fields below.
    The methods of `DALLE2` document what the modes do.

    Attributes:
        mode: one of `MODES`.
        prompts: what the images are to show.
        images: the images to edit.
        mask: (inpaint) where to regenerate; None: the transparent pixels of the image.
        n: (generate, variations, inpaint, outpaint) images for each prompt or image.
        seed: of all noise.
        options: how the stages are sampled, where it differs from the model folder.
        prior: (generate, interpolate, inpaint, outpaint) "diffusion", "ar" or "none"; None: the
            model's.
        size: side of the generated images in pixels; None: the model's.
        best_of: (generate) generate so many for each prompt and keep the n nearest to it by CLIP;
            None: keep all.
        frames: (interpolate, text_diff) number of images from one end to the other.
        eta: (variations) DDIM's noise, 0 to 1.
        theta: (text_diff) share of the angle towards the new text, 0 to 1.
        old_prompt: (text_diff) what the image shows now.
        x_T: (interpolate) "slerp" or "fixed".
        left, right, up, down: (outpaint) pixels to add on each side.
        overlap: (outpaint) share of a frame that is known before it is generated.
        feather: (inpaint, outpaint) pixels over which the step at the edge of the mask is spread;
            None: a 16th of the side.
        batch_size: images generated at a time.

    Raises:
        UserError: the mode is unknown or does not take a field, or a value is out of range.
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
        # From the general to the particular, so that the first error is the one to mend first.
        checks.one_of("mode", self.mode, MODES)
        self._check_fields_of_mode()
        self._check_inputs()
        self._check_values()

    def _check_fields_of_mode(self) -> None:
        """Raises UserError for a field that is set though the mode does not take it."""
        for field in dataclasses.fields(self):
            is_set = field.name in MODES_OF and getattr(self, field.name) != field.default
            if is_set and not takes(self.mode, field.name):
                modes = " or ".join(MODES_OF[field.name])
                raise UserError(f"{field.name} goes with mode={modes}, not {self.mode}")

    def _check_inputs(self) -> None:
        """Raises UserError unless there are as many images and prompts as the mode takes."""
        mode = MODES[self.mode]
        if isinstance(self.prompts, str):  # a sequence of letters, which would pass as many prompts
            raise UserError("prompts must be a list of texts: put the one text in brackets")
        if self.prompts:
            arguments.prompts(list(self.prompts))
        if self.mode == "interpolate" and len(self.images) + len(self.prompts) != 2:
            raise UserError(
                f"mode={self.mode} takes {mode.example}, "
                f"not {len(self.images)} images and {len(self.prompts)} prompts"
            )
        for name, count, (low, high) in (
            ("image", len(self.images), mode.images),
            ("prompt", len(self.prompts), mode.prompts),
        ):
            if not low <= count <= high:
                raise UserError(f"mode={self.mode}: {count} x {name}; it takes {mode.example}")

    def _check_values(self) -> None:
        """Raises UserError for a value that no model takes."""
        # An edit is returned as one array, so its number of images has a lower limit.
        limits.whole_number("n", self.n, highest=None if self.mode == GENERATE else MAX_RETURNED)
        limits.whole_number("frames", self.frames, lowest=2 if self.mode == "interpolate" else 1)
        for name in ("seed", "batch_size", *MARGINS):
            limits.whole_number(name, getattr(self, name))
        for name in ("size", "best_of", "feather"):
            if getattr(self, name) is not None:
                limits.whole_number(name, getattr(self, name))
        for name in ("eta", "theta", "overlap"):
            limits.number(name, getattr(self, name))
        checks.one_of("x_T", self.x_T, X_T_CHOICES)
        if self.mode == "text_diff":  # other modes do not read it
            arguments.prompt(self.old_prompt)
        if self.mode == "outpaint" and not any(self.margins):
            raise UserError("outpaint: give left, right, up or down, how many pixels to add")
        if self.best_of is not None and self.best_of < self.n:
            raise UserError(
                f"best_of={self.best_of} must be at least n={self.n}, the number of images kept"
            )

    @property
    def prompt(self) -> str | None:
        """The prompt of a mode that takes at most one."""
        return next(iter(self.prompts), None)

    @property
    def margins(self) -> tuple[int, ...]:
        """Pixels to add on the left, on the right, above and below."""
        return (self.left, self.right, self.up, self.down)

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

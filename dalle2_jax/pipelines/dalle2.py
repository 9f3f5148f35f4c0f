"""DALL-E 2 as a user holds it: load a model folder, draw pictures from sentences and pictures.

A picture is (z_img, x_T): CLIP's embedding, and the noise from which the decoder draws the picture
under it (`Cascade.invert`). What the product did with pictures moves in one of the two, or in both
(unCLIP section 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import canvas, masks
from dalle2_jax.pipelines.cascade import Cascade, Latents
from dalle2_jax.pipelines.embeddings import normalise, project, slerp
from dalle2_jax.sampling import load
from dalle2_jax.validation import arguments

_OPTIONS = ("batch_size", "progress")  # of what inverts
_REPEATS = 5  # of a step, for a decoder that was not fine-tuned to inpaint


class Ranked(NamedTuple):
    picture: np.ndarray  # uint8 [h, w, 3]
    index: int  # among all that were drawn of its prompt
    score: float  # cosine of CLIP's embeddings of picture and prompt


@dataclasses.dataclass(frozen=True)
class DALLE2(Cascade):
    """All that the product did, on the weights of a model folder: see `Cascade.from_pretrained`.

    Pictures are uint8 [b, h, w, 3] of any size, one is [h, w, 3]; of what is not square the middle
    is taken. Those drawn have `image_size`. `steps` are the decoder's, to invert and to draw; None:
    50. More of them keep a given picture better. Further options are `batch_size` and `progress` of
    `Cascade.stream`; of `generate`, `ranked`, `inpaint` and `outpaint` all of its. Raises UserError
    for what is of another type or range.
    """

    def at_size(self, size: int) -> Self:
        """The same model, drawing pictures of `size` px: at most those of its last stage, which are
        those it was loaded for (`from_pretrained`). Raises UserError for another size."""
        size = arguments.whole("size", size, 1)
        ends = [s.image_size for s in (self.decoder, *self.upsamplers.values())]
        kept = list(self.upsamplers.items())[: load.needed(size, ends)]
        return dataclasses.replace(self, upsamplers=dict(kept), size=size)

    def generate(
        self,
        prompts: str | Sequence[str] | None,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        best_of: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Draws n pictures of each prompt -> uint8 [len(prompts) * n, h, w, 3], prompt by prompt.

        Picture i of a prompt depends on the seed, on i and on the prompt alone: it is the same
        (but for rounding) drawn alone, in any batch and on any number of devices.

        Args:
            prompts: one sentence or several; what is beyond the context length is cut off. None
                draws from `z_img` alone, n pictures of each of its rows.
            n: pictures a prompt, 2**32 at most; all are held at once here, not in `stream`.
            seed: an integer from 0 to 2**32 - 1, or one a prompt. Pictures i of two prompts with
                one seed begin from the same noise.
            best_of: draw so many of each prompt and return the n best, see `ranked`.
            **options: see `stream`.

        Raises:
            UserError: an argument of another type or range.
        """
        if best_of is None:
            return np.concatenate(list(self.stream(prompts, n, seed, **options)))
        rows = self.ranked(prompts, n, best_of, seed, **options)
        return np.stack([one.picture for row in rows for one in row])

    def ranked(
        self,
        prompts: str | Sequence[str] | None,
        n: int,
        best_of: int,
        seed: int | Sequence[int] = 0,
        **options: Any,
    ) -> Iterator[list[Ranked]]:
        """The n of `best_of` pictures of each prompt that CLIP finds nearest to it, the nearest
        first; prompt by prompt, as they are drawn (reranking, as DALL-E 1 did: 2102.12092,
        section 2.6). No more than a batch and n pictures are held. Arguments and errors are those
        of `generate`, and a model that cannot read pictures.
        """
        best_of = arguments.whole("best_of", best_of, arguments.whole("n", n, 1))
        if prompts is None:
            raise UserError("best_of ranks pictures by their prompt: give prompts")
        if self.clip.image is None:
            raise UserError(f"{self.weights} has no image tower: it cannot rank pictures")
        prompts = arguments.prompts(prompts)
        z_txt, best, place = None, [], 0
        for pictures in self.stream(prompts, best_of, seed, **options):
            z_img = normalise(self.encode_image(pictures))
            for picture, z in zip(pictures, z_img, strict=True):
                row, index = divmod(place, best_of)
                if index == 0:
                    (z_txt,) = normalise(self.encode_text([prompts[row]]))
                best.append(Ranked(picture.copy(), index, float(np.vdot(z, z_txt))))
                best = sorted(best, key=lambda one: -one.score)[:n]  # stable: the earlier of equals
                place += 1
                if place % best_of == 0:
                    yield best
                    best = []

    def reconstruct(
        self, pictures: np.ndarray, *, steps: int | None = None, **options: Any
    ) -> np.ndarray:
        """Pictures [b, ...] inverted and drawn again, b of them."""
        arguments.only(_OPTIONS, options)
        return self.decode(self.invert(pictures, steps=steps, **options), steps=steps, **options)

    def variations(
        self,
        pictures: np.ndarray,
        n: int = 4,
        seed: int | Sequence[int] = 0,
        *,
        eta: float = 0.6,
        steps: int | None = None,
        cfg_scale: float | None = None,
        **options: Any,
    ) -> np.ndarray:
        """n others of each of b pictures, picture by picture: what z_img holds stays, the rest is
        drawn anew (section 3.1).

        Args:
            pictures, steps: see above.
            n, seed: as of `generate`.
            eta: of DDIM. From 0, which changes least (unguided it draws the picture itself), to 1.
            cfg_scale: of the decoder; None: as the folder says.
        """
        # What is wrong is told before the inversion, which takes its time.
        model = self.varying(eta, steps, cfg_scale)
        arguments.only(_OPTIONS, options)
        n, pictures = arguments.whole("n", n, 1, arguments.MOST_HELD), arguments.pictures(pictures)
        seed = arguments.seeds(seed, len(pictures)).tolist()
        latents = self.invert(pictures, steps=steps, **options)
        x_T = np.repeat(latents.x_T, n, axis=0)
        told = {"z_img": latents.z_img, "noise": {"decoder": x_T[None]}, **options}
        return np.concatenate(list(model.stream(None, n, seed, **told)))

    def varying(
        self, eta: float = 0.6, steps: int | None = None, cfg_scale: float | None = None
    ) -> Self:
        """The model as it draws `variations`."""
        cfg_scale = self.decoder.settings.cfg_scale if cfg_scale is None else cfg_scale
        return self.inverting(steps).with_settings(cfg_scale=cfg_scale, eta=eta)

    def interpolate(
        self,
        a: np.ndarray,
        b: np.ndarray | str,
        frames: int = 7,
        seed: int = 0,
        *,
        x_T: Literal["slerp", "fixed"] = "slerp",
        steps: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """`frames` pictures from a picture to another, or to what a sentence says (section 3.2).

        z_img is moved over the sphere. Between two pictures "slerp" moves x_T too, so that the ends
        are their reconstructions; "fixed" keeps one, drawn from `seed`. To a sentence x_T stays
        that of the picture, and `seed` draws the z_img of the sentence.
        """
        arguments.only(_OPTIONS, options)
        arguments.one_of("x_T", x_T, ("slerp", "fixed"))
        shares = np.linspace(0, 1, arguments.whole("frames", frames, 2, arguments.MOST_HELD))
        seed, a = arguments.whole("seed", seed, 0, 2**32 - 1), arguments.picture("a", a)
        if isinstance(b, str):
            z_b = self.sample_prior(b, 1, seed, **options)
            z_a, x_a = self.invert(a, steps=steps, **options)
            x_b = x_a
        else:
            b = arguments.picture("b", b)
            z_a, x_a = self.invert(a, steps=steps, **options)
            z_b, x_b = self.invert(b, steps=steps, **options)
            if x_T == "fixed":
                x_a = x_b = np.random.default_rng(seed).standard_normal(x_a.shape, np.float32)
        z_img = _between("the two embeddings", z_a, z_b, shares)
        latents = Latents(z_img, _between("x_T", x_a, x_b, shares))
        return self.decode(latents, steps=steps, **options)

    def text_diff(
        self,
        picture: np.ndarray,
        new: str,
        old: str = "a photo",
        frames: int = 7,
        *,
        theta: float = 0.5,
        steps: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """`frames` pictures that go from the picture, which `old` describes, towards `new`
        (section 3.3).

        z_img turns towards the difference of the two captions' embeddings, by 0 to `theta` of the
        way; x_T stays. The paper goes to 0.25 .. 0.50.
        """
        arguments.only(_OPTIONS, options)
        frames = arguments.whole("frames", frames, 1, arguments.MOST_HELD)
        shares = np.linspace(0, arguments.number("theta", theta, 0, 1), frames)
        z_new, z_old = normalise(self.encode_text([new, old]))
        if np.allclose(z_new, z_old, atol=1e-6):
            raise UserError(f"{new!r} and {old!r} are read alike: there is no way to go")
        z_img, x_T = self.invert(arguments.picture("picture", picture), steps=steps, **options)
        towards = (z_new - z_old)[None] * np.linalg.norm(z_img)
        z_img = _between("the picture and the difference of the texts", z_img, towards, shares)
        x_T = np.repeat(x_T, len(shares), axis=0)
        return self.decode(Latents(z_img, x_T), steps=steps, **options)

    def probe(
        self,
        picture: np.ndarray,
        dims: Sequence[int | None] | None = None,
        *,
        steps: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """The picture drawn from ever more of what its z_img says, one for each of `dims`
        (section 4).

        z_img is projected on its first k principal directions, those of the autoregressive prior,
        for each k of `dims`; None there is all of z_img, and so the reconstruction. x_T stays.
        `dims` None is `probe_dims()`.
        """
        arguments.only(_OPTIONS, options)
        dims, directions = self.probe_dims() if dims is None else dims, self._directions()
        if not isinstance(dims, Sequence | np.ndarray) or not len(dims):
            raise UserError(f"dims must name how many directions are kept, as [20, 40], not {dims}")
        most = len(directions[1])
        counts = [k if k is None else arguments.whole("dims", k, 0, most) for k in dims]
        z_img, x_T = self.invert(arguments.picture("picture", picture), steps=steps, **options)
        mean, components = directions
        z = [z_img[0] if k is None else project(z_img[0], mean, components[:k]) for k in counts]
        latents = Latents(np.stack(z), np.repeat(x_T, len(z), axis=0))
        return self.decode(latents, steps=steps, **options)

    def probe_dims(self) -> list[int | None]:
        """20, 40, ... and all of the principal directions that are known, then None: all of z_img,
        of which the directions may leave out a little."""
        most = len(self._directions()[1])
        return [*range(20, most, 20), most, None]

    def _directions(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean [dim] of z_img and its principal directions [k, dim]."""
        if "ar_prior" not in self.params:
            raise UserError(
                f"{self.weights} has no ar_prior, which knows the directions of z_img: train one "
                "into that folder by configs/ar_prior.py"
            )
        found = self.params["ar_prior"]["statistics"]
        return np.asarray(found["mean"]), np.asarray(found["components"], np.float32)

    @property
    def inpaints(self) -> bool:
        """Whether the decoder was taught what is known of a picture; else parts are drawn by
        resampling, which takes more steps and fits less well (`inpainting`)."""
        return self.decoder.network.inpaints

    def inpainting(self) -> Self:
        """The model as it draws parts of pictures. One whose decoder was not taught to goes over
        each step again and again, by DDIM whatever its settings say (RePaint, 2201.09865)."""
        if self.inpaints:
            return self
        settings = dataclasses.replace(
            self.decoder.settings, solver="ddim", eta=0.0, repeats=_REPEATS
        )
        decoder = dataclasses.replace(self.decoder, settings=settings)
        return dataclasses.replace(self, decoder=decoder)

    def inpaint(
        self,
        picture: np.ndarray,
        mask: np.ndarray,
        prompt: str | None = None,
        n: int = 1,
        seed: int = 0,
        *,
        feather: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """A part of a picture drawn anew, n times (GLIDE 2112.10741, section 2.3).

        Args:
            picture: [h, w, 3], of any size. It is kept to the bit, at the size of what is returned.
            mask: bool [h, w], True where it is to be drawn.
            prompt: what the whole picture then shows; None: what it shows.
            n, seed: as of `generate`.
            feather: pixels of the drawn part, along its edge, over which the step from the kept one
                is spread out; None: a 16th of the side.
        """
        picture = arguments.picture("picture", picture)[0]
        mask = arguments.mask(mask, picture.shape)
        picture, mask = canvas.fitted(picture, mask, self.image_size)
        n, prompt = arguments.whole("n", n, 1, arguments.MOST_HELD), _of_parts(prompt, options)
        z_img = self.encode_image(picture[None]) if prompt is None else None
        given = np.repeat(picture[None], n, axis=0)
        return self._repaint(given, ~mask, prompt, z_img, seed, feather, options)

    def outpaint(
        self,
        picture: np.ndarray,
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
        **options: Any,
    ) -> np.ndarray:
        """A picture continued beyond its sides, n times -> uint8 [n, up + h + down, left + w +
        right, 3].

        Frames of `image_size` are drawn one after the other, each with what is there already.

        Args:
            picture: [h, w, 3], of any size, kept as in `inpaint`.
            prompt: what each frame shows; None: what the picture shows.
            n, seed: as of `generate`.
            left, right, up, down: pixels to add.
            overlap: the share of a frame that is known before it is drawn, where that can be.
            feather: as of `inpaint`.
        """
        picture = arguments.picture("picture", picture)[0]
        sides = {"left": left, "right": right, "up": up, "down": down}
        margins = [arguments.whole(name, value, 0) for name, value in sides.items()]
        if not any(margins):
            raise UserError("nothing is to be added: give left, right, up or down, in pixels")
        overlap = arguments.number("overlap", overlap, 0.01, 0.99)
        seed, size = arguments.whole("seed", seed, 0, 2**32 - 1), self.image_size
        n, prompt = arguments.whole("n", n, 1, arguments.MOST_HELD), _of_parts(prompt, options)
        whole, known, asked = canvas.extended(picture, margins, size)
        drawn = np.repeat(whole[None], n, axis=0)
        if prompt is None:
            z_img = self.encode_image(picture[None])
        else:  # once: all frames are to show one thing
            z_img = self.sample_prior(prompt, n, seed, **options)
        for frame, window in enumerate(canvas.frames(known, size, overlap)):
            # Were it one seed, the frames would begin from the same noise, and look alike.
            (own,) = np.random.SeedSequence([seed, frame]).generate_state(1)
            given, there = drawn[:, *window], known[window]
            painted = self._repaint(given, there, prompt, z_img, int(own), feather, options)
            drawn[:, *window], known[window] = painted, True
        return drawn[:, *asked]

    def _repaint(
        self,
        pictures: np.ndarray,
        known: np.ndarray,
        prompt: str | None,
        z_img: np.ndarray | None,
        seed: int,
        feather: int | None,
        options: Mapping[str, Any],
    ) -> np.ndarray:
        """Pictures [n, s, s, 3] of `image_size` s with what is not known (bool [s, s]) drawn."""
        n, size = len(pictures), self.image_size
        feather = size // 16 if feather is None else arguments.whole("feather", feather, 0)
        alpha = np.broadcast_to(known[..., None] * np.uint8(255), (n, size, size, 1))
        given = {"z_img": z_img, "known": np.concatenate([pictures, alpha], axis=-1)}
        drawn = self.inpainting().stream(prompt, n, seed, **given, **options)
        return masks.paste(pictures, known, np.concatenate(list(drawn)), feather)


def _of_parts(prompt: Any, options: Mapping[str, Any]) -> str | None:
    """The prompt of `inpaint` and `outpaint`, checked, and their further options."""
    for name in ("z_img", "known", "noise"):
        if name in options:
            raise UserError(f"{name} is not taken here: the picture, mask and prompt say it")
    return None if prompt is None else arguments.prompt(prompt)


def _between(what: str, a: np.ndarray, b: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Rows [frames, ...] from a [1, ...] to b [1, ...]; each is one vector, whatever its shape."""
    try:
        rows = slerp(a.reshape(1, -1), b.reshape(1, -1), shares)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
    return rows.reshape(-1, *a.shape[1:])

"""The cascade of a model folder: CLIP, prior, decoder and upsamplers, run batch by batch."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.errors import UserError, near_miss
from dalle2_jax.imaging import arrays, masks
from dalle2_jax.nets.clip import CLIP, TextEncoding
from dalle2_jax.nets.forward import forward
from dalle2_jax.pipelines import placement
from dalle2_jax.pretrained import find
from dalle2_jax.sampling import load
from dalle2_jax.sampling.ar_prior import ARPriorSampler
from dalle2_jax.sampling.decoder import DecoderSampler
from dalle2_jax.sampling.overrides import Choice, chosen
from dalle2_jax.sampling.preprocess import middle, preprocess, shrunk
from dalle2_jax.sampling.prior import PriorSampler
from dalle2_jax.sampling.priors import NoPrior, choose
from dalle2_jax.sampling.stage import StageSampler
from dalle2_jax.sampling.upsampler import UpsamplerSampler
from dalle2_jax.storage import model_folder
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.types import Array, Params
from dalle2_jax.validation import arguments

_STEPS = 50  # of the decoder, there and back

Result = TypeVar("Result")
Prior = PriorSampler | ARPriorSampler | NoPrior


class Latents(NamedTuple):
    """A picture as the decoder sees it (unCLIP section 3): with both it is drawn again."""

    z_img: np.ndarray  # [b, dim]: what it shows
    x_T: np.ndarray  # [b, s, s, 3]: all that z_img leaves open


class Captions(NamedTuple):
    """Tokens int32 [b, n] of b captions, for CLIP and for the decoder's text encoder."""

    clip: Array | np.ndarray
    decoder: Array | np.ndarray  # CLIP's again where the decoder shares its text tower
    given: Array | np.ndarray  # bool [b]; False: there is none, the tokens are the empty one's


@dataclasses.dataclass(frozen=True)
class Cascade:
    """The cascade: caption -> CLIP -> prior -> decoder -> upsamplers (unCLIP, figure 2).

    Made by `from_pretrained`. Parameters lie on the first device, or replicated over all; or they
    wait in the host's memory, and each stage's come to the devices while it runs.
    """

    tokenizer: Tokenizer
    clip: CLIP
    prior: Prior | None  # None: the model draws from other pictures' z_img alone
    decoder: DecoderSampler
    upsamplers: Mapping[str, UpsamplerSampler]
    params: Mapping[str, Params]
    weights: str
    weights_hash: str
    size: int | None = None  # the side of the pictures; None: as the last stage draws them
    priors: Mapping[str, Prior] = dataclasses.field(default_factory=dict)  # by stage

    @classmethod
    def from_pretrained(
        cls,
        weights: str = "tiny",
        dtype: str | None = None,
        offload: bool | None = None,
        size: int | None = None,
    ) -> Self:
        """Loads a model.

        Args:
            weights: "tiny" (inside the package), a model folder, or a hub id; also Karlo as
                diffusers saves it, which is imported into the user's cache, once.
            dtype: what the networks compute in; None is bfloat16 on a TPU, else float32.
            offload: whether weights wait in the host's memory until their stage runs, which costs
                their way to the device in every batch; None where they would take more than half
                of the device's memory.
            size: side of the pictures in pixels, from the decoder's to the last upsampler's. They
                are drawn by the first stages that reach it, which alone are loaded, and averaged
                down. None: as the folder's config.json says ("tiny": 128), or else the largest.

        Raises:
            UserError: no name, or the folder is missing or damaged, or lacks a stage; a size
                that no stage reaches.
        """
        if not isinstance(weights, str | os.PathLike):
            raise UserError(f"weights must be 'tiny', a model folder or a hub id, not {weights!r}")
        folder = find.model(weights)
        for stage in ("clip", "decoder"):
            model_folder.read_stage(folder, stage)  # says which stages there are
        dtype = dtype or ("bfloat16" if jax.default_backend() == "tpu" else "float32")
        arguments.one_of("dtype", dtype, ("float32", "bfloat16", "float16"))
        params: dict[str, Params] = {}

        def kept(name: str, loaded: tuple[Any, Params]) -> Any:
            params[name] = placement.stored(loaded[1], dtype)  # at once: half of a file's floats
            return loaded[0]

        clip = kept("clip", load.clip(folder, dtype))
        priors = {n: kept(n, made) for n, made in load.priors(folder, clip, dtype).items()}
        decoder = kept("decoder", load.decoder(folder, clip, dtype))
        size = load.image_size(folder, size)
        upsamplers = load.upsamplers(folder, decoder.image_size, dtype, size)
        upsamplers = {name: kept(name, loaded) for name, loaded in upsamplers.items()}
        if offload is None:
            stats = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
            offload = placement.waits(params, stats.get("bytes_limit", math.inf))
        return cls(
            tokenizer=_tokenizer(clip.text),
            clip=clip,
            prior=next(iter(priors.values()), None),
            priors=priors,
            decoder=decoder,
            upsamplers=upsamplers,
            params=params if offload else jax.device_put(params, placement.replicated()),
            weights=str(weights),
            weights_hash=model_folder.weights_hash(folder),
            size=size,
        )

    @property
    def image_size(self) -> int:
        """Side of the pictures that `generate` returns, in pixels."""
        return self.size or [self.decoder, *self.upsamplers.values()][-1].image_size

    def samplers(self) -> dict[str, Any]:
        prior = {} if self.prior is None else {self.prior.stage: self.prior}
        return {**prior, "decoder": self.decoder, **self.upsamplers}

    def settings(self) -> dict[str, dict[str, Any]]:
        """How each stage is sampled, as plain values."""
        return {name: dataclasses.asdict(s.settings) for name, s in self.samplers().items()}

    def with_prior(self, name: str | None) -> Self:
        """The same model with another prior: "diffusion", "ar" or "none" (z_txt in place of z_img);
        None: as it is. UserError: the folder has none such."""
        return dataclasses.replace(self, prior=choose(name, self))

    def with_settings(
        self,
        steps: Choice = None,
        cfg_scale: Choice = None,
        solver: Choice = None,
        eta: Choice = None,
        cfg_interval: Choice = None,
        cfg_rescale: Choice = None,
        variance: Choice = None,
    ) -> Self:
        """The same model, sampled otherwise; None keeps what the folder says.

        Each is one value or {stage: value}. One value of `solver` (`diffusion.solvers.NAMES`) is
        every stage's, of another the decoder's. numpy's numbers serve as Python's. What they mean:
        see `sampling.stage.Settings`.

        Raises:
            UserError: an unknown stage or solver, a value of another type, or steps out of range.
        """
        choices = {"steps": steps, "cfg_scale": cfg_scale, "solver": solver, "eta": eta}
        choices |= dict(cfg_interval=cfg_interval, cfg_rescale=cfg_rescale, variance=variance)
        changed = chosen(self.samplers(), choices)
        prior = changed.pop(self.prior.stage) if self.prior else None
        decoder = changed.pop("decoder")
        return dataclasses.replace(self, prior=prior, decoder=decoder, upsamplers=changed)

    def stream(
        self,
        prompts: str | Sequence[str] | None,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        prior: str | None = None,
        z_img: np.ndarray | None = None,
        noise: Mapping[str, np.ndarray] | None = None,
        known: np.ndarray | None = None,
        batch_size: int = 8,
        progress: placement.StageProgress | None = None,
        **settings: Choice,
    ) -> Iterator[np.ndarray]:
        """The pictures of `generate`, batch by batch as they are drawn.

        Args:
            prompts, n, seed: see `generate`.
            prior: see `with_prior`.
            z_img: [len(prompts) * n, dim], in place of what the prior would draw, or one a prompt
                for all of its n. Where this CLIP's have unit length (`clip.unit_length`), rows of
                another length are scaled to it, for a direction is all they say.
            noise: {stage: standard normal [1 + steps, len(prompts) * n, ...]}, x_T and then each
                step's, in place of what the seed would draw; [1, ...] is x_T alone. The prior's has
                rows for each of its candidates, picture by picture.
            known: uint8 [len(prompts) * n, s, s, 4] of `image_size` s, or one a prompt: pictures
                that are known where alpha is 255; the rest is drawn so that it fits. What is known
                comes back nearly so: `masks.paste` makes it exact.
            batch_size: pictures drawn at a time, rounded up to a multiple of the devices.
            progress: called as each stage's steps are done.
            **settings: see `with_settings`.

        Raises:
            UserError: see `generate`; when the first batch is asked for.
        """
        options: Any = {"z_img": z_img, "noise": noise, "known": known}
        options |= {"batch_size": batch_size, "progress": progress}
        model = self.with_prior(prior).with_settings(**settings)
        for pictures in model._batches(prompts, n, seed, **options):
            yield np.asarray(arrays.to_uint8(pictures))

    def sample_prior(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        prior: str | None = None,
        batch_size: int = 8,
        progress: placement.StageProgress | None = None,
        **settings: Choice,
    ) -> np.ndarray:
        """n z_img of each prompt, of which `generate` draws its pictures, float32 [len(prompts) *
        n, dim]. Arguments and errors are `stream`'s."""
        options = {"batch_size": batch_size, "progress": progress, "last": "prior"}
        model = self.with_prior(prior).with_settings(**settings)
        return np.concatenate(list(model._batches(prompts, n, seed, **options)))

    def _batches(
        self,
        prompts: str | Sequence[str] | None,
        n: int,
        seed: int | Sequence[int],
        *,
        z_img: np.ndarray | None = None,
        noise: Mapping[str, np.ndarray] | None = None,
        known: np.ndarray | None = None,
        batch_size: int,
        progress: placement.StageProgress | None,
        last: str = "",
    ) -> Iterator[Array]:
        """What the stage `last` draws ("": the last there is), batch by batch."""
        if prompts is not None:
            prompts = arguments.prompts(prompts)
        elif z_img is None:
            raise UserError("there is nothing to draw: give prompts, z_img or both")
        if self.prior is None and z_img is None:
            raise UserError(
                f"{self.weights} has no prior, which draws z_img from a prompt: take prior 'none', "
                "give z_img, as encode_image gives it, or import a model that has one"
            )
        n = arguments.whole("n", n, 1, 2**32)
        rows = max(len(list(z_img)), 1) if np.iterable(z_img) else 1
        captions = self.captions([None] * rows if prompts is None else prompts)
        count = len(captions.given)
        total = count * n
        seeds = arguments.seeds(seed, count)
        if z_img is not None:
            z_img = arguments.rows(
                "z_img", z_img, self.clip.dim, self.clip.unit_length, (total, count)
            )
        noise = self._noise_rows(noise, total)
        if known is not None:
            known = arguments.known(known, self.image_size, (total, count))
        # Made batch by batch, as n may be large.
        for start, places in placement.places(total, batch_size):
            row, index = places // n, (places % n).astype(np.uint32)
            texts = jax.tree.map(lambda tokens, row=row: tokens[row], captions)
            given = (z_img, known)  # a row for each picture, or one for all n of a prompt
            rows = [None if a is None else a[places // (total // len(a))] for a in given]
            batch = jax.device_put((seeds[row], index, texts, *rows), placement.by_batch())
            given = {
                name: array[:, places].reshape(len(array), -1, *array.shape[3:])
                for name, array in noise.items()
            }
            report = placement.overall(progress, start, len(places), total)
            with placement.on_mesh(placement.mesh()):
                drawn = self._draw(*batch, noise=given, report=report, last=last)
            yield drawn[: total - start]

    def captions(self, prompts: Sequence[str | None]) -> Captions:
        """Prompts -> tokens int32 [b, n], as each of the cascade's text encoders reads them; None
        is no caption."""
        clip, decoder = self.tokenizers()
        texts = [prompt or "" for prompt in prompts]
        tokens = clip(texts)
        given = np.array([prompt is not None for prompt in prompts])
        return Captions(tokens, tokens if decoder is clip else decoder(texts), given)

    def _noise_rows(self, noise: Mapping[str, np.ndarray] | None, total: int) -> dict[str, Any]:
        """What `stream` is given, checked: {stage: [1 + steps, total, rows a picture, ...]}."""
        samplers, checked = self.samplers(), {}
        for stage, array in (noise or {}).items():
            if stage not in samplers:
                raise UserError(f"noise: no stage {stage!r}{near_miss(str(stage), samplers)}")
            sampler = samplers[stage]
            if not isinstance(sampler, StageSampler):
                raise UserError(f"noise: {stage} draws from no noise, but from the seed alone")
            array = arguments.numbers(f"noise[{stage!r}]", array)
            shape = (sampler.settings.num_calls + 1, total * sampler.rows, *sampler.shape)
            if array.shape not in (shape, (1, *shape[1:])):
                raise UserError(f"noise[{stage!r}] must be {list(shape)}, not {list(array.shape)}")
            checked[stage] = array.reshape(len(array), total, sampler.rows, *sampler.shape)
        return checked

    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """CLIP's and the decoder's, which is CLIP's where it shares CLIP's text tower."""
        own = self.decoder.network.text
        return self.tokenizer, self.tokenizer if own is None else _tokenizer(own)

    def encode_image(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures uint8 [b, h, w, 3] of any size -> CLIP's z_img float32 [b, dim].

        Of a picture that is not square the middle is read, as in training.

        Raises:
            UserError: pictures of another type or shape, or none; a model without image tower.
        """
        pictures = arguments.pictures(pictures)
        tower = self.clip.image
        if tower is None:
            raise UserError(f"{self.weights} has no image tower: it cannot read pictures")
        with placement.on_mesh(placement.mesh()):
            encode = functools.partial(_encode_image, self.clip)
            return np.asarray(self._run("clip", encode, preprocess(pictures, tower)))

    def encode_text(self, captions: Sequence[str]) -> np.ndarray:
        """Captions -> CLIP's z_txt float32 [b, dim]. UserError: there is none, or it is no text."""
        if isinstance(captions, str) or not isinstance(captions, Sequence) or not captions:
            raise UserError(f"captions must be a list of texts, not {captions!r}")
        if not all(isinstance(text, str) and text.strip() for text in captions):
            raise UserError("a caption is empty, or no text: write what it describes")
        with placement.on_mesh(placement.mesh()):
            return np.asarray(self._encode(self.captions(captions))[0].z_txt)

    def invert(
        self,
        pictures: np.ndarray,
        *,
        steps: int | None = None,
        iterations: int = 1,
        batch_size: int = 8,
        progress: placement.StageProgress | None = None,
    ) -> Latents:
        """Pictures uint8 [b, h, w, 3] -> (z_img, x_T), from which `decode` draws them again.

        x_T is found by running the decoder's DDIM backwards under z_img, without a caption and
        without guidance (unCLIP section 3). Of a picture that is not square the middle is read.

        Args:
            pictures: of any size; the decoder sees them at its own.
            steps: of the decoder, the more the truer; None: see `inverting`. To be given to
                `decode` as well.
            iterations: of the network in a step: 2 or more come nearer to the step's true inverse.
            batch_size: see `stream`.
            progress: called as the decoder's steps are done.

        Raises:
            UserError: see `encode_image`, and for steps out of range.
        """
        z_img, small = self.encode_image(pictures), middle(arguments.pictures(pictures))
        iterations = arguments.whole("iterations", iterations, 1)
        model, x_T = self.inverting(steps), []
        total, batches = len(small), list(placement.places(len(small), batch_size))
        nothing = self.captions([None] * len(batches[0][1]))
        with placement.on_mesh(placement.mesh()):
            encoded = self._encode(nothing)
        for start, places in batches:
            batch = jax.device_put((z_img[places], small[places]), placement.by_batch())
            report = placement.overall(progress, start, len(places), total)("decoder")
            with placement.on_mesh(placement.mesh()):
                cond = self._decoder_condition(batch[0], nothing, *encoded)
                x_0 = shrunk(batch[1], self.decoder.image_size)
                told = (cond, x_0, iterations, report)
                x_T.append(np.asarray(model._run("decoder", model.decoder.invert, *told)))
            x_T[-1] = x_T[-1][: total - start]
        return Latents(z_img, np.concatenate(x_T))

    def decode(
        self,
        latents: Latents,
        *,
        steps: int | None = None,
        batch_size: int = 8,
        progress: placement.StageProgress | None = None,
    ) -> np.ndarray:
        """(z_img, x_T) [b, ...] -> pictures uint8 [b, h, w, 3], drawn without caption, guidance or
        noise: the way back from `invert`, whose `steps` these are. UserError as of `stream`."""
        if not isinstance(latents, Latents):
            raise UserError(f"latents must be Latents(z_img, x_T), not {type(latents).__name__}")
        drawn = self.inverting(steps).stream(
            None,
            z_img=latents.z_img,
            noise={"decoder": arguments.numbers("x_T", latents.x_T)[None]},
            batch_size=batch_size,
            progress=progress,
        )
        return np.concatenate(list(drawn))

    def inverting(self, steps: int | None = None) -> Self:
        """The model as it draws what was inverted: its decoder by DDIM, unguided, without noise; in
        50 steps, unless told: to keep a picture takes more of them than to draw one."""
        if steps is None:
            steps = min(_STEPS, self.decoder.process.num_timesteps)
        once = dataclasses.replace(self.decoder.settings, repeats=1)
        model = dataclasses.replace(self, decoder=dataclasses.replace(self.decoder, settings=once))
        return model.with_settings(steps, cfg_scale=1.0, solver={"decoder": "ddim"}, eta=0.0)

    def _run(self, stage: str, function: Callable[..., Result], *args: Any) -> Result:
        """function(the stage's parameters on the devices, *args), done before it returns: only then
        is there room for the next stage's."""
        return jax.block_until_ready(
            function(jax.device_put(self.params.get(stage, {}), placement.replicated()), *args)
        )

    def _draw(
        self,
        seed: Array,
        index: Array,
        captions: Captions,
        z_img: Array | None,
        known: Array | None,
        noise: Mapping[str, Array],
        report: Callable,
        last: str,
    ) -> Array:
        """b seeds, indices and captions -> pictures [b, h, w, 3] in [-1, 1], or what the stage
        `last` draws."""
        keys = _keys(seed, index, list(self.samplers()))
        text, empty = self._encode(captions)

        def draw(stage: str, *condition: Any, ring: int = 0) -> Array:
            told = [keys[stage], report(stage), noise.get(stage)]
            sampler: Any = self.samplers()[stage]
            if known is not None and hasattr(sampler, "image_size"):  # it draws pictures
                told.append(masks.known_at(known, sampler.image_size, ring))
            return self._run(stage, sampler, *condition, *told)

        if z_img is None:
            assert self.prior is not None
            z_img = draw(self.prior.stage, self.prior.condition(text, empty))
        if last == "prior":
            return z_img
        pictures = draw("decoder", self._decoder_condition(z_img, captions, text, empty))
        for name, upsampler in self.upsamplers.items():
            # Along the edge of what is known a pixel of the small picture shows both sides, so that
            # what it becomes fits to neither: there the upsampler draws both.
            factor = upsampler.image_size // pictures.shape[1]
            pictures = draw(name, pictures, ring=factor)
        return arrays.resize(pictures, self.image_size, "area")

    def _encode(self, captions: Captions) -> tuple[TextEncoding, TextEncoding | None]:
        """Of b captions, and of b empty ones where a network learned no null."""
        encode = functools.partial(encode_text, self.clip)
        text = self._run("clip", encode, captions.clip)
        if all(getattr(s.network, "learned_null", True) for s in self.samplers().values()):
            return text, None
        nothing = jnp.broadcast_to(self.captions([None]).clip, captions.clip.shape)
        return text, self._run("clip", encode, nothing)

    def _decoder_condition(
        self, z_img: Array, captions: Captions, text: TextEncoding, empty: TextEncoding | None
    ) -> dict[str, Any]:
        tokens, given = jnp.asarray(captions.decoder), jnp.asarray(captions.given)
        return self.decoder.condition(z_img, text, tokens, given, empty)


def _tokenizer(text: Mapping[str, Any]) -> Tokenizer:
    """What the text encoder of these sizes reads."""
    return Tokenizer(text["context_length"], text["vocab_size"])


@functools.partial(jax.jit, static_argnums=0)
def encode_text(clip: CLIP, params: Params, tokens: Array) -> TextEncoding:
    """tokens [b, n] -> CLIP's encoding of them."""
    return forward(clip, params, tokens, method="encode_text")


@functools.partial(jax.jit, static_argnums=0)
def _encode_image(clip: CLIP, params: Params, pictures: Array) -> Array:
    return forward(clip, params, pictures, method="encode_image")


def _keys(seed: Array, index: Array, stages: Sequence[str]) -> dict[str, Array]:
    """A stage's key for every picture: a function of its seed, its index and the stage's place.

    Were it the same for two stages, the noise of one would begin with that of the other.
    """

    def one(place: int, seed: Array, i: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), place)

    return {name: jax.vmap(functools.partial(one, k))(seed, index) for k, name in enumerate(stages)}

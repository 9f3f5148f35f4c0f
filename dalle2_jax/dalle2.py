"""DALL-E 2 as a user holds it: load a model folder, draw pictures from sentences."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dalle2_jax import images, model_folder, sharding
from dalle2_jax.errors import UserError
from dalle2_jax.nets.clip import CLIP, TextEncoding
from dalle2_jax.nets.forward import forward
from dalle2_jax.options import near_miss
from dalle2_jax.pictures import middle_square
from dalle2_jax.pretrained import find
from dalle2_jax.sampling import load
from dalle2_jax.sampling.decoder import DecoderSampler
from dalle2_jax.sampling.prior import PriorSampler
from dalle2_jax.sampling.stage import Progress, StageSampler
from dalle2_jax.sampling.upsampler import UpsamplerSampler
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.types import Array, Params, PyTree

Result = TypeVar("Result")

StageProgress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""

Choice = Any
"""One value for the stage(s) a setting means by default, or {stage: value}."""


class Captions(NamedTuple):
    """Tokens int32 [b, n] of b captions, for CLIP and for the decoder's text encoder."""

    clip: Array | np.ndarray
    decoder: Array | np.ndarray  # CLIP's again where the decoder shares its text tower
    given: Array | np.ndarray  # bool [b]; False: there is none, the tokens are the empty one's


@dataclasses.dataclass(frozen=True)
class DALLE2:
    """The cascade: caption -> CLIP -> prior -> decoder -> upsamplers (unCLIP, figure 2).

    Made by `from_pretrained`. Parameters lie on the first device, or replicated over all; or they
    wait in the host's memory, and each stage's come to the devices while it runs.
    """

    tokenizer: Tokenizer
    clip: CLIP
    prior: PriorSampler | None  # None: the model draws from other pictures' z_img alone
    decoder: DecoderSampler
    upsamplers: Mapping[str, UpsamplerSampler]
    params: Mapping[str, Params]
    weights: str
    weights_hash: str

    @classmethod
    def from_pretrained(
        cls, weights: str = "tiny", dtype: str | None = None, offload: bool | None = None
    ) -> DALLE2:
        """Loads a model.

        Args:
            weights: "tiny" (inside the package), a model folder, or a hub id; also Karlo as
                diffusers saves it, which is imported into the user's cache, once.
            dtype: what the networks compute in; None is bfloat16 on a TPU, else float32.
            offload: whether weights wait in the host's memory until their stage runs, which costs
                their way to the device in every batch; None where they would take more than half
                of the device's memory.

        Raises:
            UserError: no name, or the folder is missing or damaged, or lacks a stage.
        """
        if not isinstance(weights, str | os.PathLike):
            raise UserError(f"weights must be 'tiny', a model folder or a hub id, not {weights!r}")
        folder = find.model(weights)
        for stage in ("clip", "decoder"):
            model_folder.read_stage(folder, stage)  # says which stages there are
        dtype = dtype or ("bfloat16" if jax.default_backend() == "tpu" else "float32")
        params: dict[str, Params] = {}

        def kept(name: str, loaded: tuple[Any, Params]) -> Any:
            params[name] = stored(loaded[1], dtype)  # at once: half of what a file's floats take
            return loaded[0]

        clip = kept("clip", load.clip(folder, dtype))
        prior = None
        if load.draws_from_captions(folder):
            prior = kept("prior", load.prior(folder, clip, dtype))
        decoder = kept("decoder", load.decoder(folder, clip, dtype))
        upsamplers = load.upsamplers(folder, decoder.image_size, dtype)
        upsamplers = {name: kept(name, loaded) for name, loaded in upsamplers.items()}
        if offload is None:
            stats = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
            offload = waits(params, stats.get("bytes_limit", math.inf))
        return cls(
            tokenizer=_tokenizer(clip.text),
            clip=clip,
            prior=prior,
            decoder=decoder,
            upsamplers=upsamplers,
            params=params if offload else jax.device_put(params, _replicated()),
            weights=str(weights),
            weights_hash=model_folder.weights_hash(folder),
        )

    @property
    def image_size(self) -> int:
        """Side of the pictures that `generate` returns, in pixels."""
        return [self.decoder, *self.upsamplers.values()][-1].image_size

    def samplers(self) -> dict[str, StageSampler]:
        prior = {} if self.prior is None else {"prior": self.prior}
        return {**prior, "decoder": self.decoder, **self.upsamplers}

    def settings(self) -> dict[str, dict[str, Any]]:
        """How each stage is sampled, as plain values."""
        return {name: dataclasses.asdict(s.settings) for name, s in self.samplers().items()}

    def with_settings(
        self, steps: Choice = None, cfg_scale: Choice = None, solver: Choice = None
    ) -> DALLE2:
        """The same model, sampled otherwise; None keeps what the folder says.

        Each is one value or {stage: value}. One value of `steps` or `cfg_scale` is the decoder's,
        of `solver` (`diffusion.solvers.NAMES`) every stage's. numpy's numbers serve as Python's.

        Raises:
            UserError: an unknown stage or solver, a value of another type, or steps out of range.
        """
        settings = {name: {} for name in self.samplers()}
        for field, choice in (("steps", steps), ("cfg_scale", cfg_scale), ("solver", solver)):
            if choice is None:
                continue
            if not isinstance(choice, Mapping):
                choice = dict.fromkeys(settings if field == "solver" else ["decoder"], choice)
            for stage, value in choice.items():
                if stage not in settings:
                    near = near_miss(str(stage), settings)
                    raise UserError(f"{field}: no stage {stage!r}{near}")
                settings[stage][field] = _plain(value)
        changed = {
            name: dataclasses.replace(
                sampler, settings=dataclasses.replace(sampler.settings, **settings[name])
            )
            for name, sampler in self.samplers().items()
        }
        prior, decoder = changed.pop("prior", None), changed.pop("decoder")
        return dataclasses.replace(self, prior=prior, decoder=decoder, upsamplers=changed)

    def generate(
        self,
        prompts: str | Sequence[str] | None,
        n: int = 1,
        seed: int | Sequence[int] = 0,
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
            **options: see `stream`.

        Raises:
            UserError: an argument of another type or range.
        """
        return np.concatenate(list(self.stream(prompts, n, seed, **options)))

    def stream(
        self,
        prompts: str | Sequence[str] | None,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        z_img: np.ndarray | None = None,
        noise: Mapping[str, np.ndarray] | None = None,
        steps: Choice = None,
        cfg_scale: Choice = None,
        solver: Choice = None,
        batch_size: int = 8,
        progress: StageProgress | None = None,
    ) -> Iterator[np.ndarray]:
        """The pictures of `generate`, batch by batch as they are drawn.

        Args:
            prompts, n, seed: see `generate`.
            z_img: [len(prompts) * n, dim], in place of what the prior would draw, or one a prompt
                for all of its n. Where this CLIP's have unit length (`clip.unit_length`), rows of
                another length are scaled to it, for a direction is all they say.
            noise: {stage: standard normal [1 + steps, len(prompts) * n, ...]}, x_T and then each
                step's, in place of what the seed would draw. The prior's has rows for each of its
                candidates, picture by picture.
            steps, cfg_scale, solver: see `with_settings`.
            batch_size: pictures drawn at a time, rounded up to a multiple of the devices.
            progress: called as each stage's steps are done.

        Raises:
            UserError: see `generate`; when the first batch is asked for.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if prompts is not None:
            if not isinstance(prompts, Sequence) or not all(isinstance(p, str) for p in prompts):
                raise UserError(f"prompts must be a text or a list of texts, not {prompts!r}")
            if not prompts or not all(p.strip() for p in prompts):
                raise UserError("a prompt is empty: write what is to be drawn")
        elif z_img is None:
            raise UserError("there is nothing to draw: give prompts, z_img or both")
        if self.prior is None and z_img is None:
            raise UserError(
                f"{self.weights} has no prior, which draws z_img from a prompt: give z_img, as "
                "encode_image gives it, or import a model that has one"
            )
        n, batch_size = _whole("n", n, 1, 2**32), _whole("batch_size", batch_size, 1)
        rows = max(len(list(z_img)), 1) if np.iterable(z_img) else 1
        captions = self.captions([None] * rows if prompts is None else list(prompts))
        count = len(captions.given)
        total = count * n
        given: Any = seed
        one = not isinstance(given, list | tuple) and np.ndim(given) == 0
        seeds = [given] * count if one else list(given)
        seeds = np.array([_whole("seed", s, 0, 2**32 - 1) for s in seeds], np.uint32)
        if len(seeds) != count:
            raise UserError(f"{len(seeds)} seeds for {count} prompts: give one for each")
        model = self.with_settings(steps, cfg_scale, solver)
        if z_img is not None:
            z_img = _rows("z_img", z_img, self.clip.dim, self.clip.unit_length, (total, count))
            z_img = np.repeat(z_img, total // len(z_img), axis=0)
        noise = model._noise_rows(noise, total)
        size = -(-min(batch_size, total) // jax.device_count()) * jax.device_count()
        for start in range(0, total, size):
            # Made batch by batch, as n may be large; the last is filled up with its last picture.
            places = np.minimum(np.arange(start, start + size), total - 1)
            row, index = places // n, (places % n).astype(np.uint32)
            texts = jax.tree.map(lambda tokens, row=row: tokens[row], captions)
            z = None if z_img is None else z_img[places]
            batch = jax.device_put((seeds[row], index, texts, z), _by_batch())
            given = {
                name: array[:, places].reshape(len(array), -1, *array.shape[3:])
                for name, array in noise.items()
            }
            report = _overall(progress, start // size, -(-total // size))
            with on_mesh(_mesh()):
                pictures = model._draw(*batch, noise=given, report=report)
            yield np.asarray(images.to_uint8(pictures))[: total - start]

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
            try:
                array = np.asarray(array, np.float32)
            except (TypeError, ValueError):
                raise UserError(f"noise[{stage!r}] must be an array of numbers") from None
            shape = (sampler.settings.num_steps + 1, total * sampler.rows, *sampler.shape)
            if array.shape != shape:
                raise UserError(f"noise[{stage!r}] must be {list(shape)}, not {list(array.shape)}")
            checked[stage] = array.reshape(shape[0], total, sampler.rows, *sampler.shape)
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
        try:
            pictures = np.asarray(pictures)
        except ValueError:  # numpy's word for rows of several lengths
            raise UserError("pictures must be uint8 [b, h, w, 3], all of one size") from None
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            given = f"{pictures.dtype} {list(pictures.shape)}"
            raise UserError(f"pictures must be uint8 [b, h, w, 3], not {given}")
        if not pictures.size:
            raise UserError(f"pictures: there is none in uint8 {list(pictures.shape)}")
        tower = self.clip.image
        if tower is None:
            raise UserError(f"{self.weights} has no image tower: it cannot read pictures")
        if tower.get("resize", "area") == "bicubic":
            size = tower["image_size"]
            pictures = np.stack([middle_square(picture, size) for picture in pictures])
        h, w = pictures.shape[1:3]
        side = min(h, w)
        top, left = (h - side) // 2, (w - side) // 2
        pictures = pictures[:, top : top + side, left : left + side]
        with on_mesh(_mesh()):
            encode = functools.partial(_encode_image, self.clip)
            return np.asarray(self._run("clip", encode, pictures))

    def _run(self, stage: str, function: Callable[..., Result], *args: Any) -> Result:
        """function(the stage's parameters on the devices, *args), done before it returns: only then
        is there room for the next stage's."""
        return jax.block_until_ready(
            function(jax.device_put(self.params[stage], _replicated()), *args)
        )

    def _draw(
        self,
        seed: Array,
        index: Array,
        captions: Captions,
        z_img: Array | None,
        noise: Mapping[str, Array],
        report: Callable,
    ) -> Array:
        """b seeds, indices and captions -> pictures [b, h, w, 3] in [-1, 1]."""
        keys = _keys(seed, index, list(self.samplers()))
        encode = functools.partial(encode_text, self.clip)
        text, empty = self._run("clip", encode, captions.clip), None
        if not all(getattr(s.network, "learned_null", True) for s in self.samplers().values()):
            nothing = jnp.broadcast_to(self.captions([None]).clip, captions.clip.shape)
            empty = self._run("clip", encode, nothing)

        def draw(stage: str, *condition: Any) -> Array:
            told = keys[stage], report(stage), noise.get(stage)
            sampler: Any = self.samplers()[stage]
            return self._run(stage, sampler, *condition, *told)

        if z_img is None:
            assert self.prior is not None
            z_img = draw("prior", self.prior.condition(text, empty))
        tokens, given = jnp.asarray(captions.decoder), jnp.asarray(captions.given)
        pictures = draw("decoder", self.decoder.condition(z_img, text, tokens, given, empty))
        for name in self.upsamplers:
            pictures = draw(name, pictures)
        return pictures


def stored(params: Params, dtype: Any) -> Params:
    """`params` as drawing keeps them: matrices in the dtype that networks compute in, and half the
    memory where that is bfloat16; vectors (biases, norms) in float32. Shapes serve as arrays."""

    def cast(x: Any) -> Any:
        if len(x.shape) < 2 or x.dtype == dtype:
            return x
        is_shape = isinstance(x, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(x.shape, dtype) if is_shape else x.astype(dtype)

    return jax.tree.map(cast, params)


def waits(params: PyTree, memory: float) -> bool:
    """Whether parameters (arrays or shapes) are better kept off a device of `memory` bytes until
    they are used: more than half of it would be theirs, which a large picture needs to be drawn."""
    size = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(params))
    return size > memory / 2


def _tokenizer(text: Mapping[str, Any]) -> Tokenizer:
    """What the text encoder of these sizes reads."""
    return Tokenizer(text["context_length"], text["vocab_size"])


def _whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int within low..high; UserError for anything else."""
    told = f"{name} must be a whole number from {low}" + (f" to {high}" if high else "")
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:  # an array has an __index__ too
        number = None
    if number is None or number < low or (high is not None and number > high):
        raise UserError(f"{told}, not {value!r}")
    return number


def _plain(value: Any) -> Any:
    """numpy's and JAX's numbers as Python's and several as a tuple: settings are hashable, and
    plain JSON."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(_plain(item) for item in value) if isinstance(value, list) else value


def _rows(name: str, value: Any, dim: int, unit_length: bool, counts: Sequence[int]) -> np.ndarray:
    """`value` float32 [one of counts, dim], each row scaled to unit length where that is wanted;
    UserError if it cannot be."""
    try:
        rows = np.asarray(value)
        if rows.dtype.kind in "US":  # numpy would read "1.0" as a number
            raise TypeError
        rows = rows.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} must be numbers {[counts[0], dim]}") from None
    if rows.shape not in [(count, dim) for count in counts]:
        raise UserError(f"{name} must be {[counts[0], dim]}, not {list(rows.shape)}")
    largest = np.abs(rows).max(axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(largest) & (largest > 0)))
    if bad.size:
        raise UserError(f"{name}[{bad[0]}] must be finite and not all 0")
    if unit_length:
        rows = rows / largest  # or the squares might not fit
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def encode_text(clip: CLIP, params: Params, tokens: Array) -> TextEncoding:
    """tokens [b, n] -> CLIP's encoding of them."""
    return forward(clip, params, tokens, method="encode_text")


@functools.partial(jax.jit, static_argnums=0)
def _encode_image(clip: CLIP, params: Params, pictures: Array) -> Array:
    small = images.resize(images.to_float(pictures), clip.image["image_size"], "area")
    return forward(clip, params, small, method="encode_image")


def _keys(seed: Array, index: Array, stages: Sequence[str]) -> dict[str, Array]:
    """A stage's key for every picture: a function of its seed, its index and the stage's place.

    Were it the same for two stages, the noise of one would begin with that of the other.
    """

    def one(place: int, seed: Array, i: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), place)

    return {name: jax.vmap(functools.partial(one, k))(seed, index) for k, name in enumerate(stages)}


def _mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})


def on_mesh(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager:
    """Within, what is traced finds the mesh: kernels cannot be split over devices without."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def _replicated() -> NamedSharding:
    return NamedSharding(_mesh(), PartitionSpec())


def _by_batch() -> NamedSharding:
    return NamedSharding(_mesh(), PartitionSpec("data"))


def _overall(progress: StageProgress | None, batch: int, batches: int) -> Callable:
    """stage -> Progress that counts the steps of all batches together."""
    if progress is None:
        return lambda stage: None

    def stage_progress(stage: str) -> Progress:
        return lambda done, steps: progress(stage, batch * steps + done, batches * steps)

    return stage_progress

"""The cascade of a model folder: CLIP, prior, decoder and upsamplers, run batch by batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.errors import UserError, near_miss
from dalle2_jax.imaging import arrays, masks
from dalle2_jax.nets.clip import CLIP, TextEncoding
from dalle2_jax.nets.conditioning import Condition, decoder_condition, prior_condition
from dalle2_jax.nets.forward import forward
from dalle2_jax.pipelines import limits, placement
from dalle2_jax.pipelines.events import Batch, Event, Steps, run_stage
from dalle2_jax.sampling.ar_prior import ARPriorSampler
from dalle2_jax.sampling.decoder import DecoderSampler
from dalle2_jax.sampling.load import num_upsamplers
from dalle2_jax.sampling.overrides import SamplingOptions
from dalle2_jax.sampling.preprocess import preprocess
from dalle2_jax.sampling.prior import PriorSampler
from dalle2_jax.sampling.priors import NoPrior, choose
from dalle2_jax.sampling.stage import StageSampler
from dalle2_jax.sampling.upsampler import UpsamplerSampler
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.types import Array, Params
from dalle2_jax.validation import arguments

Prior = PriorSampler | ARPriorSampler | NoPrior


class Captions(NamedTuple):
    """b captions as the text encoders read them.

    Attributes:
        clip: CLIP's tokens, int32 [b, n].
        decoder: the decoder's tokens, int32 [b, n]; CLIP's if the decoder shares its text tower.
        present: bool [b]; False: there is no caption, and the tokens are those of an empty one.
    """

    clip: Array | np.ndarray
    decoder: Array | np.ndarray
    present: Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Cascade:
    """The cascade: caption -> CLIP -> prior -> decoder -> upsamplers (unCLIP, figure 2).

        tokens int32 [b, n] --CLIP--> z_txt [b, dim], txt_enc [b, n, width]
        z_txt, txt_enc --prior--> z_img [b, dim]
        z_img, caption --decoder--> image [b, s, s, 3] --upsampler--> [b, S, S, 3] --> ...

    `loading.load_cascade` makes one. It is a plain value: methods that change something return
    another cascade, which shares the parameters. Parameters are replicated over all devices, or
    wait in the host's memory, from where those of a stage come to the devices while it runs.

    Attributes:
        tokenizer: CLIP's.
        clip: the network that encodes texts and images.
        prior: samples z_img from a caption; None: the model decodes z_img of given images only.
        decoder: samples the smallest image.
        upsamplers: stage -> sampler, in the order in which they run.
        params: stage -> parameters.
        weights: the name that the model was loaded by.
        weights_hash: 16 hex digits that identify configuration and tensors.
        size: side of the generated images in pixels; None: that of the last stage.
        priors: all priors of the model folder, stage -> sampler, to choose `prior` from.
    """

    tokenizer: Tokenizer
    clip: CLIP
    prior: Prior | None
    decoder: DecoderSampler
    upsamplers: Mapping[str, UpsamplerSampler]
    params: Mapping[str, Params]
    weights: str
    weights_hash: str
    size: int | None = None
    priors: Mapping[str, Prior] = dataclasses.field(default_factory=dict)

    @property
    def image_size(self) -> int:
        """Side of the generated images in pixels."""
        return self.size or self.sizes[-1]

    @property
    def sizes(self) -> list[int]:
        """Sides of the images of the decoder and of each upsampler, in pixels."""
        return [stage.image_size for stage in (self.decoder, *self.upsamplers.values())]

    def samplers(self) -> dict[str, Any]:
        """Returns the samplers of the stages, in the order in which they run."""
        prior = {} if self.prior is None else {self.prior.stage: self.prior}
        return {**prior, "decoder": self.decoder, **self.upsamplers}

    def with_samplers(self, samplers: Mapping[str, Any]) -> Self:
        """Returns the cascade with these samplers, one for each stage of `samplers()`."""
        return dataclasses.replace(
            self,
            prior=samplers[self.prior.stage] if self.prior else None,
            decoder=samplers["decoder"],
            upsamplers={stage: samplers[stage] for stage in self.upsamplers},
        )

    def with_options(self, options: SamplingOptions) -> Self:
        """Returns the cascade with sampling options; raises UserError as `options.apply`."""
        return self.with_samplers(options.apply(self.samplers()))

    def with_prior(self, name: str | None) -> Self:
        """Returns the cascade with the prior "diffusion", "ar" or "none" (z_txt for z_img).

        None keeps its present one. Raises UserError if the folder has no such prior.
        """
        return dataclasses.replace(self, prior=choose(name, self))

    def at_size(self, size: int) -> Self:
        """Returns the cascade that generates images of `size` px, by as few stages as reach it.

        Raises UserError if none does.
        """
        size = limits.whole_number("size", size)
        # The cut is final: a cascade made smaller forgets its later upsamplers.
        stages = list(self.upsamplers.items())[: num_upsamplers(size, self.sizes)]
        return dataclasses.replace(self, upsamplers=dict(stages), size=size)

    def generate(
        self,
        prompts: str | Sequence[str] | None,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        z_img: np.ndarray | None = None,
        noise: Mapping[str, np.ndarray] | None = None,
        known_images: np.ndarray | None = None,
        batch_size: int = 8,
        skip: int = 0,
    ) -> Iterator[Event]:
        """Generates n images of each prompt, prompt by prompt; yields events.

        Args:
            prompts, n, seed, z_img, noise, batch_size: see `DALLE2.stream`.
            known_images: uint8 [len(prompts) * n, s, s, 4] of `image_size` s, or one a prompt:
                colours, and the known_mask as alpha: 255 where pixels are kept; the rest is
                generated to fit. Kept pixels come back nearly unchanged: `masks.paste` makes them
                exact.
            skip: batches that hold only images before this one are not generated.

        Raises:
            UserError: see `DALLE2.generate`.
        """
        for start, keys, captions, rows in self._batches(
            prompts, n, seed, batch_size, skip, z_img=z_img, noise=noise, known_images=known_images
        ):
            images = yield from self._run(keys, captions, rows)
            images = np.asarray(arrays.to_uint8(images))
            # The last batch is filled up by repeated rows, so that all have one compiled shape.
            yield Batch(start, images[: rows.total - start])

    def sample_prior(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        batch_size: int = 8,
    ) -> Steps[np.ndarray]:
        """Samples n z_img of each prompt, those that `generate` decodes; float32 [n * b, dim].

        Raises UserError as `generate`.
        """
        samples = []
        for start, keys, captions, rows in self._batches(prompts, n, seed, batch_size):
            with placement.visible(placement.mesh()):
                text, empty = self.encode_captions(captions)
            z_img = yield from self._run_prior(keys, text, empty, rows)
            samples.append(np.asarray(z_img)[: rows.total - start])
        return np.concatenate(samples)

    def _batches(
        self,
        prompts: str | Sequence[str] | None,
        n: int,
        seed: int | Sequence[int],
        batch_size: int,
        skip: int = 0,
        *,
        z_img: np.ndarray | None = None,
        noise: Mapping[str, np.ndarray] | None = None,
        known_images: np.ndarray | None = None,
    ) -> Iterator[tuple[int, dict[str, Array], Captions, _Rows]]:
        """Checks the arguments of `generate`; yields (first row, keys, captions, rows) of batches.

        Image number p of all belongs to prompt p // n and is image p % n of it. Every input has a
        row for each image, or one for all n images of a prompt; a batch takes the rows of its
        images and puts them on the devices, split over them.
        """
        if prompts is not None:
            prompts = arguments.prompts(prompts)
        elif z_img is None:
            raise UserError("there is nothing to generate: give prompts, z_img or both")
        if self.prior is None and z_img is None:
            raise UserError(
                f"{self.weights} has no prior, which samples z_img from a prompt: take prior "
                "'none', give z_img, as encode_image returns it, or import a model that has one"
            )
        n = limits.whole_number("n", n)
        # Without prompts there is an empty caption for each row of z_img. `embeddings` below checks
        # z_img itself; here it only has to be counted, whatever it is.
        num_z = max(len(list(z_img)), 1) if np.iterable(z_img) else 1
        captions = self.captions([None] * num_z if prompts is None else prompts)
        count = len(captions.present)
        total = count * n
        seeds = arguments.seeds(seed, count)
        if z_img is not None:
            unit_length = self.clip.unit_length
            z_img = arguments.embeddings("z_img", z_img, self.clip.dim, unit_length, (total, count))
        noise = self._noise_rows(noise, total)
        if known_images is not None:
            known_images = arguments.known_images(
                "known_images", known_images, self.image_size, (total, count)
            )
        for start, places in placement.batches(total, batch_size):
            if start + len(places) <= skip:
                continue
            # Inputs are gathered batch by batch, because n may be far too large for memory.
            caption, index = places // n, (places % n).astype(np.uint32)

            def rows_of(values: np.ndarray | None, places: np.ndarray = places) -> Any:
                # `values` has a row for each image, or one for all n images of a prompt.
                return None if values is None else values[places // (total // len(values))]

            texts = jax.tree.map(lambda tokens, caption=caption: tokens[caption], captions)
            batch = (seeds[caption], index, texts, rows_of(z_img), rows_of(known_images))
            # One transfer for all inputs, each split over the devices by rows.
            seed_rows, index, texts, z_rows, known_rows = jax.device_put(
                batch, placement.by_batch()
            )
            rows = _Rows(
                total=total,
                batch=start // len(places),
                num_batches=-(-total // len(places)),
                z_img=z_rows,
                known_images=known_rows,
                # [1 + steps, total, r, ...] -> [1 + steps, b * r, ...]: candidates are rows, too.
                noise={
                    stage: values[:, places].reshape(len(values), -1, *values.shape[3:])
                    for stage, values in noise.items()
                },
            )
            yield start, _keys(seed_rows, index, list(self.samplers())), texts, rows

    def _noise_rows(self, noise: Mapping[str, np.ndarray] | None, total: int) -> dict[str, Any]:
        """Checks the `noise` of `generate`.

        Returns {stage: float32 [1 + steps, total, r, ...]}, where r is the number of samples that
        the stage takes for an image: the prior's candidates, 1 elsewhere.
        """
        samplers, checked = self.samplers(), {}
        for stage, values in (noise or {}).items():
            if stage not in samplers:
                raise UserError(f"noise: no stage {stage!r}{near_miss(str(stage), samplers)}")
            sampler = samplers[stage]
            if not isinstance(sampler, StageSampler):
                raise UserError(f"noise: {stage} takes no noise: it samples from the seed alone")
            values = arguments.finite_array(f"noise[{stage!r}]", values)
            # x_T, and the noise of each step; or x_T alone, and the keys make that of the steps.
            shape = (sampler.settings.num_calls + 1, total * sampler.rows, *sampler.shape)
            if values.shape not in (shape, (1, *shape[1:])):
                raise UserError(f"noise[{stage!r}] must be {list(shape)}, not {list(values.shape)}")
            # Rows of one image are neighbours: [total * r] becomes [total, r].
            checked[stage] = values.reshape(len(values), total, sampler.rows, *sampler.shape)
        return checked

    def _run(self, keys: Mapping[str, Array], captions: Captions, rows: _Rows) -> Steps[Array]:
        """Runs all stages on a batch; returns images [b, h, w, 3] in [-1, 1]."""
        # The mesh is visible while tracing: attention kernels need it to shard themselves. Not
        # across a `yield`, where the caller's code runs.
        with placement.visible(placement.mesh()):
            text, empty = self.encode_captions(captions)
        z_img = rows.z_img
        if z_img is None:
            z_img = yield from self._run_prior(keys, text, empty, rows)
        condition = self.decoder_condition(z_img, captions, text, empty)
        images = yield from self._run_stage("decoder", keys, condition, rows)
        for stage, upsampler in self.upsamplers.items():
            # A low-resolution pixel on the mask boundary mixes known and generated content. Shrink
            # the known region by one such pixel and let the upsampler generate both sides.
            border = upsampler.image_size // images.shape[1]
            images = yield from self._run_stage(stage, keys, images, rows, border)
        # A size between those of two stages is averaged down from the larger one.
        return arrays.resize(images, self.image_size, "area")

    def _run_prior(
        self,
        keys: Mapping[str, Array],
        text: TextEncoding,
        empty: TextEncoding | None,
        rows: _Rows,
    ) -> Steps[Array]:
        """Samples z_img [b, dim] of a batch of encoded captions."""
        assert self.prior is not None
        # The AR prior learned its null; the diffusion prior may be guided by the empty caption.
        condition: Condition = text._asdict()
        if isinstance(self.prior, PriorSampler):
            condition = prior_condition(self.prior.network, text, empty)
        return (yield from self._run_stage(self.prior.stage, keys, condition, rows))

    def _run_stage(
        self, stage: str, keys: Mapping[str, Array], condition: Any, rows: _Rows, border: int = 0
    ) -> Steps[Array]:
        """Runs one stage on a batch, and returns what it samples.

        Args:
            condition: what the stage's sampler takes.
            border: width in pixels by which the known region is shrunk for this stage.
        """
        sampler = self.samplers()[stage]
        known_images = None
        if rows.known_images is not None and hasattr(sampler, "image_size"):  # it samples images
            known_images = masks.resize_partly_known(rows.known_images, sampler.image_size, border)
        steps = sampler(
            self.stage_params(stage), condition, keys[stage], rows.noise.get(stage), known_images
        )
        return (yield from run_stage(stage, steps, rows.batch, rows.num_batches))

    def stage_params(self, stage: str) -> Params:
        """Returns a stage's parameters on the devices; {} if it has none.

        Those that waited on the host are copied, and freed when the caller drops them.
        """
        return jax.device_put(self.params.get(stage, {}), placement.replicated())

    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """Returns CLIP's tokenizer and the decoder's: the same if it shares CLIP's text tower."""
        text = self.decoder.network.text
        return self.tokenizer, self.tokenizer if text is None else tokenizer_of(text)

    def captions(self, prompts: Sequence[str | None]) -> Captions:
        """Tokenizes b prompts for each text encoder; None is no caption."""
        clip, decoder = self.tokenizers()
        texts = [prompt or "" for prompt in prompts]
        tokens = clip(texts)
        present = np.array([prompt is not None for prompt in prompts])
        return Captions(tokens, tokens if decoder is clip else decoder(texts), present)

    def encode_captions(self, captions: Captions) -> tuple[TextEncoding, TextEncoding | None]:
        """Returns CLIP's encoding of b captions, and of b empty ones.

        The second is None unless a network learned no null and so is guided by the empty caption.
        """
        params = self.stage_params("clip")
        text = encode_text(self.clip, params, jnp.asarray(captions.clip))
        # Encoding the empty captions costs as much again, so it is left out where nothing reads it.
        if all(getattr(s.network, "learned_null", True) for s in self.samplers().values()):
            return text, None
        empty = jnp.broadcast_to(self.captions([None]).clip, captions.clip.shape)
        return text, encode_text(self.clip, params, empty)

    def decoder_condition(
        self, z_img: Array, captions: Captions, text: TextEncoding, empty: TextEncoding | None
    ) -> Condition:
        """Returns the decoder's condition, see `nets.conditioning.decoder_condition`."""
        tokens, present = jnp.asarray(captions.decoder), jnp.asarray(captions.present)
        return decoder_condition(self.decoder.network, z_img, text, tokens, present, empty)

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """Returns CLIP's z_img float32 [b, dim]; see `DALLE2.encode_image`."""
        images = arguments.images(images)
        tower = self.clip.image
        if tower is None:
            raise UserError(f"{self.weights} has no image tower: it cannot read images")
        with placement.visible(placement.mesh()):
            return np.asarray(
                _encode_image(self.clip, self.stage_params("clip"), preprocess(images, tower))
            )

    def encode_text(self, captions: Sequence[str]) -> np.ndarray:
        """Returns CLIP's z_txt float32 [b, dim]; see `DALLE2.encode_text`."""
        if isinstance(captions, str) or not isinstance(captions, Sequence) or not captions:
            raise UserError(f"captions must be a list of texts, not {captions!r}")
        if not all(isinstance(text, str) and text.strip() for text in captions):
            raise UserError("a caption is empty, or no text: write what it describes")
        with placement.visible(placement.mesh()):
            return np.asarray(self.encode_captions(self.captions(captions))[0].z_txt)


class _Rows(NamedTuple):
    """The rows of a batch beside its captions, on the devices.

    Attributes:
        total: number of images in all batches.
        batch: number of this batch, of `num_batches`.
        z_img: [b, dim], in place of what the prior samples.
        known_images: uint8 [b, s, s, 4], see `Cascade.generate`.
        noise: stage -> standard normal [1 + steps, b, ...], in place of that of the keys.
    """

    total: int
    batch: int
    num_batches: int
    z_img: Array | None = None
    known_images: Array | None = None
    noise: Mapping[str, Array] = {}


def tokenizer_of(text: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer for a text encoder of these sizes (the section of its config)."""
    return Tokenizer(text["context_length"], text["vocab_size"])


@functools.partial(jax.jit, static_argnums=0)
def encode_text(clip: CLIP, params: Params, tokens: Array) -> TextEncoding:
    """Returns CLIP's encoding of tokens int32 [b, n]."""
    return forward(clip, params, tokens, method="encode_text")


@functools.partial(jax.jit, static_argnums=0)
def _encode_image(clip: CLIP, params: Params, images: Array) -> Array:
    """Returns CLIP's z_img [b, dim] of preprocessed images [b, s, s, 3]."""
    return forward(clip, params, images, method="encode_image")


def _keys(seed: Array, index: Array, stages: Sequence[str]) -> dict[str, Array]:
    """Returns a key for every image, {stage: typed keys [b]}.

    A key is a function of the image's seed, its index within its prompt and the stage alone, so an
    image is the same in any batch and on any number of devices. If two stages had one key, the
    noise of one would begin with that of the other.
    """

    def key_of(place: int, seed: Array, i: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), place)

    return {
        stage: jax.vmap(functools.partial(key_of, place))(seed, index)
        for place, stage in enumerate(stages)
    }

"""DALL-E 2 as a user holds it: load a model folder, draw pictures from sentences."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dalle2_jax import images, model_folder, sharding
from dalle2_jax.diffusion.process import Process
from dalle2_jax.errors import UserError
from dalle2_jax.nets.clip import CLIP, TextEncoding
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.nets.upsampler import Upsampler
from dalle2_jax.options import construct, near_miss
from dalle2_jax.sampling.decoder import DecoderSampler
from dalle2_jax.sampling.prior import PriorSampler
from dalle2_jax.sampling.stage import Progress, Settings, StageSampler
from dalle2_jax.sampling.upsampler import UpsamplerSampler
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.types import Array, Params

StageProgress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""

Choice = Any
"""One value for the stage(s) a setting means by default, or {stage: value}."""


@dataclasses.dataclass(frozen=True)
class DALLE2:
    """The cascade: caption -> CLIP -> prior -> decoder -> upsamplers (unCLIP, figure 2).

    Made by `from_pretrained`. Parameters lie on the first device, or replicated over all.
    """

    tokenizer: Tokenizer
    clip: CLIP
    prior: PriorSampler
    decoder: DecoderSampler
    upsamplers: Mapping[str, UpsamplerSampler]
    params: Mapping[str, Params]
    weights: str
    weights_hash: str

    @classmethod
    def from_pretrained(cls, weights: str = "tiny") -> DALLE2:
        """`weights`: "tiny" (inside the package), a model folder, or a hub id.

        Raises:
            UserError: the folder is missing or damaged, or lacks a stage.
        """
        folder = model_folder.resolve(weights)
        entries = model_folder.read_config(folder)["stages"]
        for stage in ("clip", "prior", "decoder"):
            model_folder.read_stage(folder, stage)  # says which stages there are
        clip = _network(CLIP, entries, "clip")
        text = clip.text
        decoder = _sampler(DecoderSampler, Decoder, entries, "decoder", ("image_size",))
        if decoder.network.context_length < text["context_length"]:
            raise UserError(
                f"{folder}: the decoder reads {decoder.network.context_length} tokens and CLIP "
                f"{text['context_length']}: they were not trained together"
            )
        names = _chain(entries, decoder.image_size)
        stages = ["clip", "prior", "decoder", *names]
        params = {stage: model_folder.read_params(folder, stage) for stage in stages}
        return cls(
            tokenizer=Tokenizer(text["context_length"], text["vocab_size"]),
            clip=clip,
            prior=_sampler(PriorSampler, DiffusionPrior, entries, "prior", ("embedding_scale",)),
            decoder=decoder,
            upsamplers={
                name: _sampler(UpsamplerSampler, Upsampler, entries, name, ("image_size",))
                for name in names
            },
            params=jax.device_put(params, _replicated()),
            weights=str(weights),
            weights_hash=model_folder.weights_hash(folder),
        )

    @property
    def image_size(self) -> int:
        """Side of the pictures that `generate` returns, in pixels."""
        return [self.decoder, *self.upsamplers.values()][-1].image_size

    def samplers(self) -> dict[str, StageSampler]:
        return {"prior": self.prior, "decoder": self.decoder, **self.upsamplers}

    def settings(self) -> dict[str, dict[str, Any]]:
        """How each stage is sampled, as plain values."""
        return {name: dataclasses.asdict(s.settings) for name, s in self.samplers().items()}

    def with_settings(
        self, steps: Choice = None, cfg_scale: Choice = None, solver: Choice = None
    ) -> DALLE2:
        """The same model, sampled otherwise; None keeps what the folder says.

        Each is one value or {stage: value}. One value of `steps` or `cfg_scale` is the decoder's,
        of `solver` ("ddpm", "ddim", "dpm++") every stage's.

        Raises:
            UserError: an unknown stage or solver, or steps out of range.
        """
        settings = {name: {} for name in self.samplers()}
        for field, choice in (("steps", steps), ("cfg_scale", cfg_scale), ("solver", solver)):
            if choice is None:
                continue
            if not isinstance(choice, Mapping):
                choice = dict.fromkeys(settings if field == "solver" else ["decoder"], choice)
            for stage, value in choice.items():
                if stage not in settings:
                    raise UserError(f"{field}: no stage {stage!r}{near_miss(stage, settings)}")
                settings[stage][field] = value
        changed = {
            name: dataclasses.replace(
                sampler, settings=dataclasses.replace(sampler.settings, **settings[name])
            )
            for name, sampler in self.samplers().items()
        }
        prior, decoder = changed.pop("prior"), changed.pop("decoder")
        return dataclasses.replace(self, prior=prior, decoder=decoder, upsamplers=changed)

    def generate(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        seed: int = 0,
        *,
        steps: Choice = None,
        cfg_scale: Choice = None,
        solver: Choice = None,
        batch_size: int = 8,
        progress: StageProgress | None = None,
    ) -> np.ndarray:
        """Draws n pictures of each prompt -> uint8 [len(prompts) * n, h, w, 3], prompt by prompt.

        Picture i of a prompt depends on the seed, on i and on the prompt alone: it is the same
        (but for rounding) drawn alone, in any batch and on any number of devices.

        Args:
            prompts: one sentence or several; what is beyond the context length is cut off.
            n: pictures a prompt.
            seed: any integer from 0 to 2**32 - 1.
            steps, cfg_scale, solver: see `with_settings`.
            batch_size: pictures drawn at a time, rounded up to a multiple of the devices.
            progress: called as each stage's steps are done.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise UserError("a prompt is empty: write what is to be drawn")
        if n < 1 or batch_size < 1:
            raise UserError(f"n={n} and batch_size={batch_size} must be 1 or more")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed={seed} must lie within 0 and 2**32 - 1")
        model = self.with_settings(steps, cfg_scale, solver)
        tokens = np.repeat(self.tokenizer(prompts), n, axis=0)
        index = np.tile(np.arange(n, dtype=np.uint32), len(prompts))
        batches = list(_batches(tokens, index, batch_size))
        drawn = []
        for i, (rows, batch_tokens, batch_index) in enumerate(batches):
            report = _overall(progress, i, len(batches))
            pictures = model._draw(batch_tokens, _keys(seed, batch_index), report)
            drawn.append(np.asarray(images.to_uint8(pictures))[:rows])
        return np.concatenate(drawn)

    def _draw(self, tokens: Array, keys: Mapping[str, Array], report: Callable) -> Array:
        """tokens [b, n] and keys [b] a stage -> pictures [b, h, w, 3] in [-1, 1]."""
        text = _encode_text(self.clip, self.params["clip"], tokens)
        z_img = self.prior(self.params["prior"], text, keys["prior"], report("prior"))
        pictures = self.decode(z_img, text, tokens, keys["decoder"], report("decoder"))
        for name, upsampler in self.upsamplers.items():
            pictures = upsampler(self.params[name], pictures, keys["upsampler"], report(name))
        return pictures

    def decode(
        self,
        z_img: Array,
        text: TextEncoding,
        tokens: Array,
        keys: Array,
        progress: Progress | None = None,
    ) -> Array:
        """z_img [b, dim] and a caption -> pictures [b, s, s, 3] at the decoder's size."""
        cond = {
            "z_img": z_img,
            "z_mask": jnp.ones(tokens.shape[:1], bool),
            "txt_mask": text.txt_mask,
        }
        if self.decoder.network.text is None:
            cond["txt_enc"] = text.txt_enc
        else:  # a text encoder of its own may have been trained on longer captions than CLIP's
            more = ((0, 0), (0, self.decoder.network.context_length - tokens.shape[1]))
            cond |= {"tokens": jnp.pad(tokens, more), "txt_mask": jnp.pad(text.txt_mask, more)}
        return self.decoder(self.params["decoder"], cond, keys, progress)


@functools.partial(jax.jit, static_argnums=0)
def _encode_text(clip: CLIP, params: Params, tokens: Array) -> TextEncoding:
    return clip.apply({"params": params}, tokens, method="encode_text")


def _network(cls: type[nn.Module], entries: Mapping[str, Any], stage: str, *more: str) -> Any:
    """The network of a stage, computing in bfloat16 on TPUs and in float32 elsewhere.

    UserError where the stage's entry lacks "model" or one of the keys `more`.
    """
    entry, where = entries[stage], f"config.json: {stage}"
    for key in ("model", *more):
        if key not in entry:
            raise UserError(f"{where}: the key {key!r} is missing: export the stage again")
    dtype = "bfloat16" if jax.default_backend() == "tpu" else "float32"
    return construct(cls, {**entry["model"], "dtype": dtype}, where)


def _sampler(
    cls: type, network: type[nn.Module], entries: Mapping[str, Any], stage: str, extra: tuple
) -> Any:
    entry, where = entries[stage], f"config.json: {stage}"
    return cls(
        network=_network(network, entries, stage, "diffusion", "sampling", *extra),
        process=construct(Process, entry["diffusion"], where),
        settings=construct(Settings, entry["sampling"], where),
        **{name: entry[name] for name in extra},
    )


def _chain(entries: Mapping[str, Any], size: int) -> list[str]:
    """The upsamplers from `size` on, each starting where the one before ends."""
    names = []
    while True:
        nexts = [n for n, e in entries.items() if e.get("low_size") == size and n not in names]
        if len(nexts) > 1:
            raise UserError(
                f"config.json: {' and '.join(sorted(nexts))} both start at {size} px: remove one"
            )
        if not nexts:
            return names
        names += nexts
        size = entries[nexts[0]]["image_size"]


_STREAMS = ("prior", "decoder", "upsampler")


def _keys(seed: int, index: Array) -> dict[str, Array]:
    """A stage's key for every picture: a function of the seed and the picture's number."""

    def one(stage: int, i: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), stage)

    return {name: jax.vmap(functools.partial(one, k))(index) for k, name in enumerate(_STREAMS)}


def _batches(
    tokens: np.ndarray, index: np.ndarray, batch_size: int
) -> Iterator[tuple[int, Array, Array]]:
    """(rows that count, tokens, index), each batch of one size and spread over all devices."""
    devices = jax.device_count()
    size = -(-min(batch_size, len(index)) // devices) * devices
    for start in range(0, len(index), size):
        rows = min(size, len(index) - start)
        pad = np.minimum(np.arange(start, start + size), len(index) - 1)
        yield (rows, *jax.device_put((tokens[pad], index[pad]), _by_batch()))


def _mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})


def _replicated() -> NamedSharding:
    return NamedSharding(_mesh(), PartitionSpec())


def _by_batch() -> NamedSharding:
    return NamedSharding(_mesh(), PartitionSpec("data"))


def _overall(progress: StageProgress | None, batch: int, batches: int) -> Callable:
    """stage -> Progress that counts the steps of all batches together."""

    def stage_progress(stage: str) -> Progress | None:
        if progress is None:
            return None
        return lambda done, steps: progress(stage, batch * steps + done, batches * steps)

    return stage_progress

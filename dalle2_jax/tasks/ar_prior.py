"""Training the autoregressive prior: cross entropy of z_img's codes (unCLIP section 2.2)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from absl import logging

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import arrays
from dalle2_jax.nets.ar_prior import EXACT, ARPrior, Statistics
from dalle2_jax.nets.clip import normalise
from dalle2_jax.nets.forward import forward
from dalle2_jax.parallel import sharding
from dalle2_jax.sampling.ar_prior import ARPriorSampler, Settings
from dalle2_jax.sampling.stage import finish
from dalle2_jax.tasks.decoder import disturb
from dalle2_jax.tasks.shared import previews
from dalle2_jax.tasks.shared.frozen_clip import FrozenCLIP, check_transformer
from dalle2_jax.types import Array, Batch, Metrics, Params
from dalle2_jax.validation.sections import (
    check_numbers,
    check_whole_numbers,
    construct,
    to_json_values,
)

MOST_LOST = 0.01  # of z_img's variance: so many directions the paper keeps


@dataclasses.dataclass(frozen=True)
class ARPriorTask:
    """Trains the autoregressive prior on codes that are fitted to the data before the first step.

    Attributes:
        drop_caption: share of captions that are left out in training, for guidance.
        noise: with few images, keeps the network from memorising them: z_img moves by up to so much
            of its length (`tasks.decoder.disturb`), so that its codes change a little every time.
        candidates: z_img that are sampled for an image, of which the best is kept.
        fit_batches: batches of training data that the codes are fitted to.
    """

    network: ARPrior
    clip: FrozenCLIP
    sampler: ARPriorSampler
    entry: Mapping[str, Any]
    drop_caption: float = 0.1
    noise: float = 0.0
    candidates: int = ARPriorSampler.candidates
    fit_batches: int = 64
    stage: str = dataclasses.field(default=ARPriorSampler.stage, init=False)
    optional_layer: str = dataclasses.field(default="", init=False)
    SECTIONS: ClassVar = {"sampling": Settings}

    def __post_init__(self) -> None:
        check_numbers("config.task", 0, 1, drop_caption=self.drop_caption, noise=self.noise)
        check_whole_numbers(
            "config.task", 1, candidates=self.candidates, fit_batches=self.fit_batches
        )
        check_whole_numbers("config.model", 2, buckets=self.network.buckets)
        check_whole_numbers("config.model", 1, self.network.dim, dims=self.network.dims)

    def init(self, key: Array) -> Params:
        inputs = self.network.init_inputs(self.clip.network.text["width"])
        return self.network.init(key, *inputs)["params"]

    def trainable(self, path: str) -> bool:
        # Fitted by `fit`, then fixed: the codes' meaning must not drift while they are learned.
        return not path.startswith("statistics/")

    def frozen(self) -> Params:
        return {"clip": self.clip.params()}

    def fit(self, params: Params, frozen: Params, batches: Callable[[], Iterator[Batch]]) -> Params:
        """Fits the PCA of z_img and the range of each code: see `train.statistics.FitsStatistics`.

        Two passes over the data: the moments give the directions, then the values along them their
        range. Logs the share of the variance that the directions keep.
        """

        # Both passes begin the data anew and so see the same batches.
        def over_batches(function: Callable[..., Any], *args: Any) -> Iterator[Any]:
            run = None
            for batch in itertools.islice(batches(), self.fit_batches):
                # Jitted at the first batch, which shows the mesh.
                run = run or _replicated(function, batch)
                yield run(*args, frozen["clip"], batch)

        def moments(clip: Params, batch: Batch) -> tuple[Array, Array]:
            z, _ = self._encode(clip, batch)
            # E z [d] and E z z^T [d, d]; batches are equally large, so means of means are means.
            return z.mean(axis=0), jnp.einsum("bi,bj->ij", z, z, precision=EXACT) / len(z)

        def ranges(pca: Params, clip: Params, batch: Batch) -> tuple[Array, Array]:
            values = forward(statistics, pca, *self._encode(clip, batch), method="values")
            return values.min(axis=0), values.max(axis=0)

        n = self.network
        statistics = Statistics(n.dim, n.dims, n.buckets)
        total, count = None, 0
        for batch_moments in over_batches(moments):
            total = batch_moments if total is None else jax.tree.map(jnp.add, total, batch_moments)
            jax.block_until_ready(total)  # simulated devices abort when programs queue up
            count += 1
        assert total is not None, "there are no batches to fit to"
        mean, components, share = directions(*(x / count for x in total), n.dims)
        pca = {
            "mean": mean,
            "components": components,
            # Ranges of a fresh network: `values` does not read them, but its module declares them.
            "low": params["statistics"]["low"],
            "high": params["statistics"]["high"],
        }
        low = high = None
        for least, most in over_batches(ranges, pca):
            low = least if low is None else jnp.minimum(low, least)
            high = most if high is None else jnp.maximum(high, most)
            jax.block_until_ready((low, high))
        kept_share = float(share)
        summary = f"{n.dims} of {n.dim} directions keep {100 * kept_share:.2f} %"
        logging.info("PCA of z_img: %s of the variance", summary)
        if 1 - kept_share > MOST_LOST:
            logging.warning(
                "PCA of z_img: %s, more than 1 %% is lost: raise config.model.dims", summary
            )
        return {**pca, "low": low, "high": high}

    def _encode(self, clip: Params, batch: Batch) -> tuple[Array, Array]:
        """(z_img, z_txt) of a batch."""
        z_img = self.clip.encode_image(clip, arrays.to_float(batch["image"]))
        return z_img, self.clip.encode_text(clip, batch["tokens"]).z_txt

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        z_img = self.clip.encode_image(frozen["clip"], arrays.to_float(batch["image"]))
        text = self.clip.encode_text(frozen["clip"], batch["tokens"])
        key_drop, key_noise = jax.random.split(key)
        keep = jax.random.uniform(key_drop, (z_img.shape[0],)) >= self.drop_caption
        if train:
            # This network always has a learned null, so an empty mask is "no caption".
            text = text._replace(txt_mask=text.txt_mask & keep[:, None])
            z_img = disturb(key_noise, z_img, self.noise) if self.noise else z_img
        logits, codes = forward(self.network, params, z_img, *text)
        code_logits = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
        nats = (jax.nn.logsumexp(logits, axis=-1) - code_logits).mean(axis=0)  # a code
        z_again = forward(self.network, params, codes, method="to_z_img")
        metrics = {
            "dot": nats[0],
            "codes": nats[1:].mean(),
            "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == codes),
            "round_trip": jnp.sum(normalise(z_again) * normalise(z_img), axis=1).mean(),  # cosine
        }
        # Every code weighs the same, the dot product included.
        return nats.mean(), metrics

    def preview(
        self, params: Params, frozen: Params, batch: Batch, key: Array, rows: int
    ) -> dict[str, Array]:
        """Shows each caption's own image, then those of the batch nearest to its sampled z_img."""
        images = arrays.to_float(batch["image"])
        z_img = self.clip.encode_image(frozen["clip"], images)
        text = self.clip.encode_text(frozen["clip"], batch["tokens"][:rows])
        keys = jax.random.split(key, len(text.z_txt))
        z = finish(self.sampler(params, text._asdict(), keys))
        return {self.stage: previews.nearest(images, z_img, z)}

    def export(self, params: Params) -> tuple[Mapping[str, Any], Params]:
        return self.entry, params


def _replicated(function: Callable[..., Any], batch: Batch) -> Callable[..., Any]:
    """Returns `function` jitted, its results replicated on every device."""
    place: Any = batch["image"].sharding
    return jax.jit(function, out_shardings=sharding.replicated(place.mesh))


@functools.partial(jax.jit, static_argnums=2)
def directions(mean: Array, second: Array, dims: int) -> tuple[Array, Array, Array]:
    """Principal directions of z, from its moments E z [d] and E z z^T [d, d].

    An eigenvector has no sign: here its largest coordinate is positive.

    Returns:
        (mean [d], the `dims` directions [dims, d] by falling variance, the share of the variance
        along them).
    """
    variances, vectors = jnp.linalg.eigh(second - mean[:, None] * mean[None])  # rising
    vectors = vectors[:, ::-1].T
    largest = jnp.argmax(jnp.abs(vectors), axis=1, keepdims=True)
    vectors = vectors * jnp.sign(jnp.take_along_axis(vectors, largest, axis=1))
    # Rounding may make the smallest eigenvalues slightly negative.
    variances = jnp.maximum(variances[::-1], 0)
    return mean, vectors[:dims], variances[:dims].sum() / variances.sum()


SECTIONS = {"task": ARPriorTask, "model": ARPrior}


def from_config(config: Any) -> ARPriorTask:
    options = {key: config.task[key] for key in config.task if key not in ("name", "sampling")}
    network = construct(ARPrior, config.model, "config.model")
    check_transformer("config.model", config.model, network.activation)
    clip = FrozenCLIP.load(config)
    where = "config.task.sampling"
    try:
        settings = construct(Settings, config.task.get("sampling") or {}, where)
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(where) else f"{where}: {message}") from error
    sampler_options = {
        "candidates": config.task.candidates,
        "unit_length": clip.network.unit_length,
    }
    task = construct(
        ARPriorTask,
        options,
        "config.task",
        network=network,
        clip=clip,
        sampler=ARPriorSampler(network, settings, **sampler_options),
        entry={},
    )
    # n images span n - 1 directions round their mean.
    count = task.fit_batches * config.batch_size
    if count <= network.dims:
        raise UserError(
            f"config.task.fit_batches={task.fit_batches} are {count} images, which have no "
            f"{network.dims} directions (config.model.dims): raise it"
        )
    sampling = to_json_values(dataclasses.asdict(settings))
    entry = {
        "model": to_json_values(config.model),
        "sampling": sampling,
        "candidates": task.candidates,
    }
    return dataclasses.replace(task, entry={**entry, "clip": clip.hash})

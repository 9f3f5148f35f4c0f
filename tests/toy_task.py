"""A small regression that stands for a stage in the trainer's tests, and a script to be killed."""

from __future__ import annotations

import json
import sys
from collections.abc import Container
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax import build

SIZE = 4


class ToyTask:
    """An MLP that finds the mean colour of an image; noise is drawn from the step's key."""

    stage = "toy"
    optional_layer = ""

    def __init__(self, width: int = 16, noise: float = 0.01):
        self.width, self.noise = width, noise

    def init(self, key):
        k1, k2 = jax.random.split(key)
        fan_in = SIZE * SIZE * 3
        return {
            "hidden": {
                "kernel": jax.random.normal(k1, (fan_in, self.width)) / fan_in**0.5,
                "bias": jnp.zeros(self.width),
            },
            "out": {"kernel": jax.random.normal(k2, (self.width, 3)) / self.width**0.5},
        }

    def trainable(self, path):
        return True

    def frozen(self):
        return {"offset": np.full((8, 3), 0.5, np.float32)}

    def loss(self, params, frozen, batch, key, train):
        x = batch["image"].astype(jnp.float32) / 127.5 - 1  # b h w c
        target = x.mean((1, 2)) + frozen["offset"][:1]  # b c
        target += self.noise * jax.random.normal(key, target.shape)
        h = jnp.tanh(
            x.reshape(len(x), -1) @ params["hidden"]["kernel"] + params["hidden"]["bias"][None]
        )
        loss = jnp.mean((h @ params["out"]["kernel"] - target) ** 2)
        # a batch whose first pixel is 255 everywhere stands for the one that breaks training
        poison = jnp.all(batch["image"] == 255)
        return jnp.where(poison, jnp.nan, loss), {"rms": jnp.sqrt(loss)}

    def preview(self, params, frozen, batch, key, rows):
        return {"first": batch["image"][:rows, None]}

    def export(self, params):
        return {"config": {"width": self.width}}, params


def dataset(batch_size: int = 16, poison_at: Container[int] = ()):
    """start -> numpy batches; those of `poison_at` are all white (see ToyTask.loss)."""

    def batches(start: int):
        step = start
        while True:
            rng = np.random.default_rng(step)
            image = rng.integers(0, 256, (batch_size, SIZE, SIZE, 3), dtype=np.uint8)
            yield {"image": np.full_like(image, 255) if step in poison_at else image}
            step += 1

    return batches


def config(**changes):
    """A complete config; a change is a top-level key or a section to be merged."""
    given = dict(
        batch_size=16,
        num_steps=12,
        log_every=1,
        checkpoint_every=4,
        ema_decay=0.9,
        mesh=dict(data=-1),
        optimizer=dict(learning_rate=1e-2, clip_norm=1.0),
    )
    for key, value in changes.items():
        given[key] = {**given.get(key, {}), **value} if isinstance(value, dict) else value
    return build.complete(given)


def slow_dataset(seconds: float, slow_from: int = 10**9):
    """Batches that take some time; a second each from number `slow_from` on."""
    import time

    def batches(start: int):
        for number, batch in enumerate(dataset()(start), start):
            time.sleep(1 if number >= slow_from else seconds)
            yield batch

    return batches


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


if __name__ == "__main__":  # toy_task.py WORKDIR NUM_STEPS [SLOW_FROM]: a run to send signals to
    from dalle2_jax.train import loop

    settings = config(num_steps=int(sys.argv[2]), checkpoint_every=5, mesh=dict(data=1))
    data = slow_dataset(0.02, *map(int, sys.argv[3:]))
    result = loop.train(settings, ToyTask(), data, sys.argv[1])
    print("stopped by", result.stopped_by, "after", result.step)
    sys.exit(result.exit_status)

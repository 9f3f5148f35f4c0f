"""Measures long attention on the CPU: by one einsum, and by chunks of queries.

The two are timed in turn within one run. Their ratio is printed, for the forward pass and for the
gradient.

python benchmarks/attention.py [--queries=1024] [--keys=1284] [--heads=16] [--batch=1]
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

from dalle2_jax.nets.attention import attention_by_einsum
from dalle2_jax.nets.chunked import attention_by_chunks

FLAGS = flags.FLAGS
flags.DEFINE_integer("queries", 1024, "Number of queries; the paper's decoder has at most 32 x 32.")
flags.DEFINE_integer("keys", 1284, "Number of keys; the decoder has those queries and 260 tokens.")
flags.DEFINE_integer("heads", 16, "Heads, of 64 channels each.")
flags.DEFINE_integer("batch", 1, "Examples.")
flags.DEFINE_integer("rounds", 7, "Rounds; the fastest one counts.")


def main(argv: list[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    lengths = (FLAGS.queries, FLAGS.keys, FLAGS.keys)
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [
        jax.random.normal(key, (FLAGS.batch, n, FLAGS.heads, 64))
        for key, n in zip(keys, lengths, strict=True)
    ]
    functions = {"einsum": attention_by_einsum, "chunks": attention_by_chunks}
    for direction in ("forward", "gradient"):
        compiled = {
            name: jax.jit(function if direction == "forward" else _gradient(function))
            for name, function in functions.items()
        }
        for function in compiled.values():
            jax.block_until_ready(function(*qkv))
        best = dict.fromkeys(compiled, float("inf"))
        for _ in range(FLAGS.rounds):
            for name, function in compiled.items():
                start = time.perf_counter()
                jax.block_until_ready(function(*qkv))
                best[name] = min(best[name], time.perf_counter() - start)
        times = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in best.items())
        ratio = best["einsum"] / best["chunks"]
        print(f"{direction}: {times}: chunks are {ratio:.2f} times as fast")


def _gradient(function: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns the gradient of the sum of squares with respect to queries, keys and values."""
    return jax.grad(lambda *qkv: jnp.square(function(*qkv)).sum(), argnums=(0, 1, 2))


if __name__ == "__main__":
    app.run(main)

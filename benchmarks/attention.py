"""Long attention on the CPU: the time of one einsum over that of chunks, both in this run.

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
flags.DEFINE_integer("queries", 1024, "the paper's decoder has 32 x 32 at most")
flags.DEFINE_integer("keys", 1284, "those and its 260 tokens")
flags.DEFINE_integer("heads", 16, "of 64 channels")
flags.DEFINE_integer("batch", 1, "examples")
flags.DEFINE_integer("rounds", 7, "the fastest of so many counts, each way in turn")


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
    for what in ("forward", "gradient"):
        ways = {
            name: jax.jit(f if what == "forward" else _gradient(f)) for name, f in functions.items()
        }
        for way in ways.values():
            jax.block_until_ready(way(*qkv))
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(FLAGS.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                jax.block_until_ready(way(*qkv))
                best[name] = min(best[name], time.perf_counter() - start)
        shown = ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in best.items())
        print(f"{what}: {shown}: {best['einsum'] / best['chunks']:.2f} times as fast")


def _gradient(function: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    return jax.grad(lambda *qkv: jnp.square(function(*qkv)).sum(), argnums=(0, 1, 2))


if __name__ == "__main__":
    app.run(main)

"""How far the modelled times can be trusted: programs whose speed on a TPU is public.

python benchmarks/calibration.py [--only=sdxl] [--search]    compiles what is not there yet
python benchmarks/calibration.py --write                      puts the table into the page

Rows are kept in docs/tpu_calibration.json, so that what was interrupted goes on. The programs are
compiled as `--topology` compiles them (fit.report.compile_twice); with --search once more with the
compiler's own search for tile sizes, which its estimated cycles need (10 x as long).
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

from dalle2_jax.aot import flops
from dalle2_jax.aot.chips import open_slice
from dalle2_jax.aot.report import (
    METHODS,
    QUICKLY,
    DoesNotFit,
    Report,
    compile_for,
    compile_twice,
    measure,
)
from dalle2_jax.nets.attention import attention, merge_heads, split_heads, without_kernels
from dalle2_jax.nets.layers import Conv3x3, GroupNorm, LayerNorm, TimestepMLP
from dalle2_jax.nets.unet import ResBlock, double
from dalle2_jax.types import Array, PyTree

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "docs" / "tpu_calibration.json"
PAGES = (ROOT / "docs" / "tpu.md", ROOT / "docs" / "tpu_calibration.md")  # the first that has marks
BEGIN, END = "<!-- calibration -->", "<!-- end of calibration -->"
SEARCHING = {"memory_fitting_effort": QUICKLY["memory_fitting_effort"]}
STEPS = 20  # of SDXL, Euler

PALLAS_GUIDE = "JAX's Pallas guide on matrix products (XLA, timed on the host)"
MICROBENCHMARK = "AI-Hypercomputer/tpu-recipes, microbenchmarks (from the trace)"
V6E_GEMM = "yangwhale/gpu-tpu-pedia, results_v6e.csv (timed on the host)"
MLPERF = "MLPerf Inference 4.1, Google, SDXL offline, 4 chips"
# The settings are those of tpu-recipes; where the 65 images/s were published was not found again.
RECIPE = "publication not found; settings by AI-Hypercomputer/tpu-recipes, Diffusion-2 on v5p"


# ---- The latent-diffusion networks, which the package has not -------------------------------


class SpatialBlock(nn.Module):
    """Self-attention, attention to the text, gated MLP: each before a residual sum."""

    head_channels: int
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Array, context: Array) -> tuple[Array, None]:
        width = x.shape[-1]

        def dense(features: int, name: str, bias: bool = True) -> nn.Dense:
            return nn.Dense(features, bias, dtype=self.dtype, name=name)

        for i, other in enumerate((None, context)):
            y = LayerNorm(name=f"norm{i}")(x)
            kv = y if other is None else other
            q, k, v = (
                split_heads(dense(width, f"{n}{i}", False)(t), width // self.head_channels)
                for n, t in zip("qkv", (y, kv, kv), strict=True)
            )
            x = x + dense(width, f"out{i}")(merge_heads(attention(q, k, v)))
        y = dense(8 * width, "fc1")(LayerNorm(name="norm2")(x))
        y, gate = jnp.split(y, 2, axis=-1)
        return x + dense(width, "fc2")(y * nn.gelu(gate)), None


class SpatialTransformer(nn.Module):
    """`depth` blocks over the pixels, scanned where there are several."""

    depth: int
    head_channels: int
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        b, h, w, c = x.shape
        y = GroupNorm(name="norm")(x).reshape(b, h * w, c)
        y = nn.Dense(c, dtype=self.dtype, name="proj_in")(y)
        block: Any = SpatialBlock
        if self.depth > 1:
            block = nn.scan(
                SpatialBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                length=self.depth,
            )
        y, _ = block(self.head_channels, self.dtype, name="blocks")(y, context)
        return x + nn.Dense(c, dtype=self.dtype, name="proj_out")(y).reshape(b, h, w, c)


class LatentUNet(nn.Module):
    """Stable Diffusion's U-Net: x [b, h, w, 4], t [b], context [b, 77, d], extra [b, e] or None.

    `depths[i]` transformer blocks behind each residual block of level i, 0 for none.
    """

    mults: Sequence[int]
    depths: Sequence[int]
    middle_depth: int
    channels: int = 320
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Array, t: Array, context: Array, extra: Array | None = None) -> Array:
        wide = 4 * self.channels
        emb = TimestepMLP(self.channels, wide, self.dtype, name="time")(t)
        if extra is not None:
            added = nn.Dense(wide, dtype=self.dtype, name="extra1")(extra)
            emb = emb + nn.Dense(wide, dtype=self.dtype, name="extra2")(nn.silu(added))
        context = context.astype(self.dtype)

        def block(x: Array, level: int, depth: int, name: str) -> Array:
            features = self.channels * self.mults[level]
            x = ResBlock(features, scale_shift=False, dtype=self.dtype, name=name)(x, emb, False)
            if depth:
                x = SpatialTransformer(depth, 64, self.dtype, name=f"{name}_text")(x, context)
            return x

        x = Conv3x3(self.channels, dtype=self.dtype, name="conv_in")(x)
        skips = [x]
        last = len(self.mults) - 1
        for level, depth in enumerate(self.depths):
            for i in range(2):
                x = block(x, level, depth, f"down{level}_{i}")
                skips.append(x)
            if level < last:
                conv = nn.Conv(x.shape[-1], (3, 3), 2, 1, dtype=self.dtype, name=f"halve{level}")
                x = conv(x)
                skips.append(x)
        x = block(x, last, self.middle_depth, "middle0")
        x = block(x, last, 0, "middle1")
        for level in range(last, -1, -1):
            for i in range(3):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(x, level, self.depths[level], f"up{level}_{i}")
            if level:
                x = Conv3x3(x.shape[-1], dtype=self.dtype, name=f"double{level}")(double(x))
        x = nn.silu(GroupNorm(name="norm_out")(x))
        return Conv3x3(4, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)


class PlainBlock(nn.Module):
    """The autoencoder's residual block, which knows no time."""

    features: int
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Conv3x3(self.features, dtype=self.dtype)(nn.silu(GroupNorm()(x)))
        h = Conv3x3(self.features, dtype=self.dtype)(nn.silu(GroupNorm()(h)))
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=self.dtype)(x)
        return x + h


class Decoder(nn.Module):
    """Stable Diffusion's autoencoder, latents [b, h, w, 4] -> images [b, 8 h, 8 w, 3]."""

    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, z: Array) -> Array:
        def dense(features: int) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype)

        x = PlainBlock(512)(Conv3x3(512, dtype=self.dtype)(dense(4)(z)))
        b, h, w, c = x.shape
        y = GroupNorm()(x).reshape(b, h * w, c)
        q, k, v = (split_heads(dense(c)(y), 1) for _ in range(3))
        x = x + dense(c)(merge_heads(attention(q, k, v))).reshape(b, h, w, c)
        x = PlainBlock(512)(x)
        for level, features in enumerate((512, 512, 256, 128)):
            for _ in range(3):
                x = PlainBlock(features)(x)
            if level < 3:
                x = Conv3x3(features, dtype=self.dtype)(double(x))
        return Conv3x3(3, dtype=self.dtype)(nn.silu(GroupNorm()(x))).astype(jnp.float32)


SD2 = LatentUNet((1, 2, 4, 4), (1, 1, 1, 0), 1)
SDXL = LatentUNet((1, 2, 4), (0, 2, 10), 10)


# ---- The programs ---------------------------------------------------------------------------


class Part(NamedTuple):
    """A program of a benchmark and how often it runs."""

    function: Callable[..., Any]
    args: tuple[PyTree, ...]
    calls: int = 1
    donated: tuple[int, ...] = ()
    params: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    topology: str
    unit: str
    work: float  # in the unit's measure, a second left out, of all parts together
    parts: Callable[[], list[Part]]
    measured: float | None = None
    source: str = "not found"

    @property
    def key(self) -> str:
        return f"{self.name} @ {self.topology}"


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def count(tree: PyTree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def product(size: int) -> list[Part]:
    return [Part(lambda a, b: a @ b, (shape(size, size), shape(size, size)))]


def parameters(network: nn.Module, *args: Any, dtype: Any = jnp.float32) -> PyTree:
    """Shapes of the parameters; nothing is computed."""
    found = jax.eval_shape(network.init, jax.random.key(0), *args)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), found)


def sd2_training(b: int = 16) -> list[Part]:
    """A step on latents and text that were encoded before, as the public benchmark has it."""
    x, context = shape(b, 64, 64, 4, dtype=jnp.float32), shape(b, 77, 1024)
    params = parameters(SD2, x, shape(b), context)
    optimizer = optax.adamw(1e-4)

    def loss(params: PyTree, x: Array, context: Array, key: Array) -> Array:
        k1, k2 = jax.random.split(key)
        t = jax.random.uniform(k1, (b,))
        noise = jax.random.normal(k2, x.shape)
        angle = t[:, None, None, None] * (jnp.pi / 2)
        noisy = jnp.cos(angle) * x + jnp.sin(angle) * noise
        guess: Any = SD2.apply(params, noisy, 1000 * t, context)
        return jnp.mean((guess - noise) ** 2)

    def step(params: PyTree, state: PyTree, x: Array, context: Array, key: Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, x, context, key)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    key = jax.eval_shape(lambda: jax.random.key(0))
    args = params, jax.eval_shape(optimizer.init, params), x, context, key
    return [Part(step, args, donated=(0, 1), params=count(params))]


def sdxl_sampling() -> list[Part]:
    """One image of 1024 px: Euler steps with guidance (2 rows), then the autoencoder.

    The text encoders are left out: under 1 % of the FLOPs.
    """
    x, context, extra = shape(1, 128, 128, 4, dtype=jnp.float32), shape(2, 77, 2048), shape(2, 2816)
    args = shape(2, 128, 128, 4), shape(2), context, extra
    params = parameters(SDXL, *args, dtype=jnp.bfloat16)
    decoder = parameters(Decoder(), x, dtype=jnp.bfloat16)

    def step(params: PyTree, x: Array, sigma: Array, context: Array, extra: Array) -> Array:
        rows = jnp.repeat(x / jnp.sqrt(sigma[0] ** 2 + 1), 2, axis=0)
        guess: Any = SDXL.apply(params, rows, jnp.repeat(sigma[2:], 2), context, extra)
        with_text, without = guess[:1], guess[1:]
        return x + (without + 8.0 * (with_text - without)) * (sigma[1] - sigma[0])

    sigma = shape(3, dtype=jnp.float32)  # now, next, and the time
    return [
        Part(step, (params, x, sigma, context, extra), STEPS, (1,), count(params)),
        Part(Decoder().apply, (decoder, x), params=count(decoder)),
    ]


def stack(scanned: bool, layers: int = 8, width: int = 8192, rows: int = 2048) -> list[Part]:
    """Dense layers in a loop, whose body the compiler counts once, or one after the other."""

    def layer(x: Array, w: Array) -> tuple[Array, None]:
        return nn.gelu(x @ w), None

    def run(x: Array, ws: Array) -> Array:
        return jax.lax.scan(layer, x, ws, unroll=1 if scanned else layers)[0]

    return [Part(run, (shape(rows, width), shape(layers, width, width)))]


def cases() -> list[Case]:
    products = {
        ("v5e:1x1", 4096): (166.1, PALLAS_GUIDE),
        ("v5e:1x1", 8192): (181.8, PALLAS_GUIDE),
        ("v6e:1x1", 4096): (476.3, V6E_GEMM),
        ("v6e:1x1", 8192): (827.5, MICROBENCHMARK),
    }
    found = [
        Case(
            f"bf16 product, {n}",
            topology,
            "TFLOP/s",
            2 * n**3 / 1e12,
            lambda n=n: product(n),
            *products.get((topology, n), (None, "not found")),
        )
        for topology in ("v5e:1x1", "v5p:1x1x1", "v6e:1x1")
        for n in (4096, 8192, 16384)
    ]
    found += [
        Case(f"8 dense layers, {how}", t, "runs/s", 1, lambda s=s: stack(s), None, "")
        for t in ("v5e:1x1", "v5p:1x1x1", "v6e:1x1")
        for how, s in (("one after the other", False), ("in a loop", True))
    ]
    return [
        *found,
        Case("SD 2 training", "v5p:1x1x1", "images/s", 16, sd2_training, 65.0, RECIPE),
        Case("SDXL, 20 steps", "v5e:1x1", "images/s", 1, sdxl_sampling, 1.75335 / 4, MLPERF),
        Case("SDXL, 20 steps", "v6e:1x1", "images/s", 1, sdxl_sampling, 5.43896 / 4, MLPERF),
    ]


# ---- Rows and table -------------------------------------------------------------------------


def compiled(part: Part, topology: str, search: bool) -> Report:
    where = open_slice(topology)
    place = SingleDeviceSharding(where.devices[0])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), part.args)

    def lower() -> Any:  # by a new function: jit keeps what it traced
        return jax.jit(lambda *a: part.function(*a), donate_argnums=part.donated).lower(*args)

    if search:
        with without_kernels():
            timed = as_run = compile_for(lower(), SEARCHING)
    else:
        as_run, timed = compile_twice(lower)
    return measure(
        as_run,
        timed,
        where,
        batch_size=1,
        num_params=part.params,
        kinds={},
        analytic_flops=flops.of_function(part.function, *part.args),
        ideal_collective_bytes=0.0,
    )


def run(case: Case, search: bool) -> dict[str, Any]:
    """The row: seconds by each method of all parts together, and what else was found."""
    since = time.time()
    parts = case.parts()
    try:
        reports = [compiled(part, case.topology, search) for part in parts]
    except DoesNotFit as error:
        return {"error": str(error)}
    calls = [part.calls for part in parts]

    def total(values: list[Any]) -> float | None:
        return None if None in values else sum(n * v for n, v in zip(calls, values, strict=True))

    return {
        "seconds": {m: total([r.seconds[m] for r in reports]) for m in METHODS},
        "parameters": [r.num_params for r in reports],
        "analytic_tflops": total([r.analytic_flops / 1e12 for r in reports]),
        "compiled_tflops": total([r.compiled_flops / 1e12 for r in reports]),
        "hbm_gb": total([r.hbm_traffic / 1e9 for r in reports]),
        "most_gib": max(r.memory["total"] for r in reports) / 2**30,
        "unknown_cycles": sum(r.unknown_cycles for r in reports),
        "compiled_in": round(time.time() - since),
    }


def load() -> dict[str, dict[str, Any]]:
    return json.loads(ROWS.read_text()) if ROWS.exists() else {}


def keep(case: Case, field: str, row: dict[str, Any]) -> None:
    rows = load()
    kept = rows.setdefault(case.key, {})
    kept.pop("note", None)  # of what was there
    kept |= {"unit": case.unit, "measured": case.measured, "source": case.source, field: row}
    order = {c.key: i for i, c in enumerate(cases())}
    rows = dict(sorted(rows.items(), key=lambda item: order.get(item[0], len(order))))
    ROWS.write_text(json.dumps(rows, indent=1) + "\n")


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| program | chip | measured | compiler | roofline | cycles | cycles, searched | "
        "source of the measurement |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases():
        row = rows.get(case.key, {})
        quick, searched = (row.get(k, {}).get("seconds", {}) for k in ("quick", "searched"))
        told = [
            _told(case, s)
            for s in (
                quick.get("optimal"),
                quick.get("roofline"),
                quick.get("cycles"),
                searched.get("cycles"),
            )
        ]
        chip = case.topology.partition(":")[0]
        measured = f"{case.measured:.4g} {case.unit}" if case.measured else ""
        source = "; ".join(filter(None, (case.source, row.get("note"))))
        lines.append(
            f"| {case.name} | {chip} | {measured} | {' | '.join(told)} | {source} |"
            if case.unit != "runs/s"
            else f"| {case.name}, ms | {chip} | | {' | '.join(told)} | |"
        )
    return "\n".join(lines)


def _told(case: Case, seconds: float | None) -> str:
    """The predicted speed and, in brackets, that over the measured one."""
    if not seconds:
        return "-"
    if case.unit == "runs/s":
        return f"{1e3 * seconds:.3f}"
    rate = case.work / seconds
    ratio = f" ({rate / case.measured:.2f})" if case.measured else ""
    return f"{rate:.4g}{ratio}"


def write() -> None:
    page = next(p for p in PAGES if p.exists() and BEGIN in p.read_text())
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{table(load())}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name or chip holds this text")
    parser.add_argument("--search", action="store_true", help="let the compiler search, too")
    parser.add_argument("--again", action="store_true", help="compile rows that are there as well")
    parser.add_argument("--write", action="store_true", help="write the table, compile nothing")
    flags = parser.parse_args()
    if flags.write:
        write()
        return
    for case in cases():
        for field in ("quick", "searched") if flags.search else ("quick",):
            there = field in load().get(case.key, {})
            if flags.only.lower() in case.key.lower() and (flags.again or not there):
                print(f"{case.key}, {field}", flush=True)
                keep(case, field, run(case, field == "searched"))
    print(table(load()))


if __name__ == "__main__":
    main()

"""The whole cascade of sampling, compiled for a TPU slice that is not attached."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle2_jax import build
from dalle2_jax.aot import flops
from dalle2_jax.aot.chips import GIB, Slice, open_slice
from dalle2_jax.aot.largest import largest
from dalle2_jax.aot.report import DoesNotFit, Report, TooLarge, compile_twice, measure
from dalle2_jax.aot.training import local_bytes
from dalle2_jax.diffusion.sample import begin
from dalle2_jax.errors import UserError
from dalle2_jax.nets.conditioning import decoder_condition, prior_condition
from dalle2_jax.parallel import sharding
from dalle2_jax.pipelines.cascade import Cascade, encode_text
from dalle2_jax.pipelines.loading import load_cascade
from dalle2_jax.pipelines.placement import cast, should_offload, visible
from dalle2_jax.sampling.ar_prior import ARPriorSampler, sample_z_img
from dalle2_jax.sampling.overrides import SamplingOptions
from dalle2_jax.sampling.prior import PriorSampler
from dalle2_jax.sampling.stage import StageSampler, one_step
from dalle2_jax.types import Params, PyTree

STAGES = ("prior", "decoder", "upsampler_256", "upsampler_1024")


def report(
    weights: str,
    topology: str,
    batch_size: int,
    changes: Mapping[str, Any],
    auto_batch: bool = False,
    thorough: bool = False,
    size: int | None = None,
    prior: str | None = None,
) -> Report:
    """Reports what generating `batch_size` images at a time takes on a TPU slice.

    All stages' weights are in memory, or each stage's while it runs (`DALLE2.from_pretrained`,
    offload).

    Args:
        weights: as for DALLE2.from_pretrained, or configs/VARIANT: the shapes of the configs,
            without weights.
        topology: the slice, as v5e:1x1.
        changes: options of `SamplingOptions`.
        auto_batch: report the most images at a time that fit, in place of `batch_size`.
        thorough: see `compile_twice`.
        size, prior: see `DALLE2.at_size` and `with_prior`.

    Raises:
        TooLarge: it does not fit.
        UserError: an argument out of range.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size} must be 1 or more")
    where = open_slice(topology)
    cascade = _shapes(weights, size).with_prior(prior)
    model = cascade.with_options(SamplingOptions(**changes))
    mesh = sharding.make_mesh({"data": -1}, where.devices)
    weighed = {
        name: _on(mesh, PartitionSpec(), cast(tree, model.clip.dtype))
        for name, tree in model.params.items()
    }
    attempt = functools.partial(_report, model, weighed, where, mesh, thorough=thorough)
    if not auto_batch:
        return attempt(batch_size=-(-batch_size // where.chips) * where.chips)
    return largest(lambda n: attempt(batch_size=n), where.chips, where.chip.hbm)


def flops_by_stage(model: Cascade, batch_size: int) -> dict[str, int]:
    """Returns the FLOPs of generating `batch_size` images by stage, all steps counted."""
    mesh = sharding.make_mesh({"data": -1})
    weighed = {name: _on(mesh, PartitionSpec(), tree) for name, tree in model.params.items()}
    counts: collections.Counter[str] = collections.Counter()
    for name, _, calls, analytic, _ in _programs(model, weighed, mesh, batch_size):
        counts[name] += calls * analytic
    return dict(counts)


def _report(
    model: Cascade,
    weighed: Mapping[str, Params],
    where: Slice,
    mesh: Mesh,
    batch_size: int,
    thorough: bool,
) -> Report:
    held = sum(local_bytes(tree) for tree in weighed.values())
    wait = should_offload(weighed, where.chip.hbm)
    parts: list[tuple[str, int, Report, int]] = []
    for name, lower, calls, analytic, own in _programs(model, weighed, mesh, batch_size):
        there = local_bytes(weighed[name]) if wait else held
        beside = there - own  # weights that this program does not use
        try:
            part = measure(
                *compile_twice(lower, thorough),
                where,
                batch_size=batch_size,
                num_params=0,
                kinds={},
                analytic_flops=analytic / where.chips,
                ideal_collective_bytes=0.0,
                thorough=thorough,
            )
            if part.memory["total"] + beside > where.chip.hbm:
                raise DoesNotFit(part.memory["total"] + beside, where.chip.hbm)
        except DoesNotFit as error:
            fewer = "a smaller --batch_size, or " if batch_size > where.chips else ""
            raise TooLarge(
                f"{name}, {batch_size} images at a time, does not fit {where.name}: {error}, "
                f"{'its' if wait else 'all'} weights ({there / GIB:.2f} GiB) "
                f"included. It would help: {fewer}a chip with more",
                error,
            ) from error
        parts.append((name, calls, part, beside))
    sizes = {name: float(local_bytes(tree)) for name, tree in weighed.items()}
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(model.params))
    return _together(parts, where, batch_size, sizes, wait, count)


def _shapes(weights: str, size: int | None = None) -> Cascade:
    """The model, of a folder, or of the configs in FOLDER/VARIANT as shapes alone."""
    folder, variant = Path(weights).parent, Path(weights).name
    if not (folder / "decoder.py").is_file():
        return load_cascade(weights, "bfloat16", size=size)  # as on a TPU
    tasks, params = {}, {}
    for name in STAGES:
        path = f"{folder / name}.py:{variant}"
        if not (folder / f"{name}.py").is_file():
            if not name.startswith("upsampler"):
                raise UserError(f"--weights={weights}: there is no file {folder / name}.py")
            continue
        try:
            config = build.read_config(path)
        except UserError:
            if not name.startswith("upsampler"):  # a cascade may end early
                raise
            break
        task: Any = build.task(build.complete(build.beside_clip(config, path)))
        tasks[name] = task
        params[task.stage] = jax.eval_shape(task.init, jax.random.key(0))
    clip = tasks["decoder"].clip
    params["clip"] = clip.params()
    prior, decoder, *upsamplers = (task.sampler for task in tasks.values())
    cascade = Cascade(
        tokenizer=Any,  # pyright: ignore[reportArgumentType]  # nothing is read
        clip=clip.network,
        prior=prior,
        decoder=decoder,
        upsamplers={f"upsampler_{s.image_size}": s for s in upsamplers},
        params=params,
        weights=weights,
        weights_hash="",
    )
    return cascade if size is None else cascade.at_size(size)


def _on(mesh: Mesh, spec: PartitionSpec, tree: PyTree) -> PyTree:
    place = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def _programs(
    model: Cascade, params: Mapping[str, Params], mesh: Mesh, b: int
) -> Iterator[tuple[str, Any, int, int, int]]:
    """(stage, what lowers its program, its calls, FLOPs of a call, bytes of its weights)."""
    rows = functools.partial(_on, mesh, PartitionSpec("data"))
    clip, text = model.clip, model.clip.text
    tokens = jax.ShapeDtypeStruct((b, text["context_length"]), jnp.int32)
    yield (
        "clip",
        lambda: encode_text.lower(clip, params["clip"], rows(tokens)),
        1,
        flops.of_function(lambda p, t: encode_text(clip, p, t), params["clip"], tokens),
        local_bytes(params["clip"]),
    )
    encoded = jax.eval_shape(functools.partial(encode_text, clip), params["clip"], tokens)
    if isinstance(model.prior, PriorSampler):
        cond = jax.eval_shape(
            functools.partial(prior_condition, model.prior.network), encoded, encoded
        )
        k = model.prior.rows
        cond = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b * k, *x.shape[1:]), x.dtype), cond)
        yield from _stage("prior", model.prior, params["prior"], cond, b * k, rows, mesh)
    elif isinstance(model.prior, ARPriorSampler):
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), b))
        cond = encoded._asdict()
        sample = functools.partial(sample_z_img, model.prior)
        count = flops.of_function(sample, params["ar_prior"], cond, keys)
        yield "ar_prior", _not_compiled, 1, count, local_bytes(params["ar_prior"])
    z_img = jax.ShapeDtypeStruct((b, clip.dim), jnp.float32)
    tokens = jax.ShapeDtypeStruct((b, model.decoder.network.context_length), jnp.int32)
    condition = functools.partial(decoder_condition, model.decoder.network)
    cond = jax.eval_shape(condition, z_img, encoded, tokens, None, encoded)
    yield from _stage("decoder", model.decoder, params["decoder"], cond, b, rows, mesh)
    for name, upsampler in model.upsamplers.items():
        cond = {"low_res": jax.ShapeDtypeStruct((b, *upsampler.shape), jnp.float32)}
        yield from _stage(name, upsampler, params[name], cond, b, rows, mesh)


def _not_compiled() -> NoReturn:
    # Its codes are sampled in one scan, whose body the compiler counts once.
    raise UserError("--topology: sampling by the autoregressive prior is not reported: set --prior")


def _stage(
    name: str,
    stage: StageSampler,
    params: Params,
    cond: Mapping[str, Any],
    b: int,
    rows: Any,
    mesh: Mesh,
) -> Iterator[tuple[str, Any, int, int, int]]:
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), b))
    program, numbers = stage.program(), stage.numbers()
    noise = jax.ShapeDtypeStruct((b, *stage.shape), jnp.float32)
    state = jax.eval_shape(functools.partial(begin, program.make_solver()), noise)
    t = jax.ShapeDtypeStruct((), jnp.int32)
    numbers = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), numbers)
    # One step, not the loop that runs several: of a loop's body the compiler counts one pass.
    step = functools.partial(one_step, program)
    for part, steps in stage.parts(params):
        everywhere = functools.partial(_on, mesh, PartitionSpec())
        placed = (part, rows(cond), everywhere(numbers), rows(state), everywhere(t), rows(keys))
        count = flops.of_function(step, part, cond, numbers, state, t, keys)

        def lower(placed: Any = placed) -> Any:
            jax.clear_caches()  # a program traced with kernels would serve without them
            with visible(mesh):
                return jax.jit(step).lower(*placed)

        yield name, lower, steps, count, local_bytes(part)


def _together(
    parts: list[tuple[str, int, Report, int]],
    where: Slice,
    batch_size: int,
    weights: Mapping[str, float],
    wait: bool,
    num_params: int,
) -> Report:
    """All calls one after the other; of the memory they need in turn, the most."""
    first = parts[0][2]

    def total(field: str) -> float:
        return sum(calls * getattr(part, field) for _, calls, part, _ in parts)

    seconds: dict[str, float | None] = {}
    for method in first.seconds:
        timings = [(calls, part.seconds[method]) for _, calls, part, _ in parts]
        known = [calls * s for calls, s in timings if s is not None]
        seconds[method] = sum(known) if len(known) == len(timings) else None
    found: dict[str, dict[str, float]] = {}
    for _, calls, part, _ in parts:
        for kind, numbers in part.collectives.items():
            kept = found.setdefault(kind, collections.defaultdict(float))
            for key, value in numbers.items():
                kept[key] += calls * value
    analytic, compiled = total("analytic_flops"), total("compiled_flops")
    needed = min(analytic, compiled)  # what is the same in all steps may be computed once a call
    # the stage that needs most, beside the weights of the others where they stay
    stage_seconds: dict[str, float | None] = {}
    for stage, calls, each, _ in parts:
        best = each.seconds["optimal"] or each.seconds["roofline"]
        part_seconds = best and calls * best
        before = stage_seconds.get(stage, 0.0)
        stage_seconds[stage] = (
            None if part_seconds is None or before is None else before + part_seconds
        )
    name, _, part, beside = max(parts, key=lambda x: x[2].memory["total"] + x[3])
    held = {name: weights[name]} if wait else weights
    memory = {f"weights of {k}": size for k, size in held.items()}
    memory["activations"] = part.memory["activations"]
    need = part.memory["total"] + beside
    memory["program, padding"] = need - sum(memory.values())
    memory["total"] = need
    return dataclasses.replace(
        first,
        batch_size=batch_size,
        num_params=num_params,
        memory=memory,
        from_host=sum(weights.values()) if wait else 0.0,
        analytic_flops=analytic,
        compiled_flops=compiled,
        hbm_traffic=total("hbm_traffic"),
        link_seconds=total("link_seconds"),
        collectives={kind: dict(numbers) for kind, numbers in found.items()},
        seconds=seconds,
        unknown_cycles=int(total("unknown_cycles")),
        mfu={k: s and needed / (s * where.chip.flops) for k, s in seconds.items()},
        stage_seconds=stage_seconds,
        kernels=any(part.kernels for _, _, part, _ in parts),
    )

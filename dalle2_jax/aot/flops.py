"""Floating-point operations of matrix products and convolutions, by their shapes.

Other operations are left out, as is the custom: a model's FLOPs are those of its matrix units.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from dalle2_jax.nets.attention import only_einsum

SUBLANES, LANES = 8, 128  # of a TPU's tile, which channels are padded to


def valid_taps(
    size: int, out: int, kernel: int, stride: int, low: int, dilate: int, kernel_dilate: int
) -> int:
    """Counts the (output, tap) pairs of one dimension that meet an input rather than padding.

    The TPU compiler counts so. Args: `size` inputs with `dilate` - 1 holes between them; `low` is
    the padding before them.
    """
    count, most = 0, (size - 1) * dilate
    for tap in range(kernel):
        for place in range(out):
            at = place * stride + tap * kernel_dilate - low
            count += 0 <= at <= most and at % dilate == 0
    return count


def of_jaxpr(jaxpr: Any, padded: bool = False) -> int:
    """Counts the FLOPs of a jaxpr (or ClosedJaxpr), loops as often as they run.

    If it branches by platform the cheapest branch counts, if by values the dearest. A `while` of
    unknown length counts once.

    With `padded`, the zeros count too with which channels fill whole tiles of a TPU: of what a
    product sums over, and of one of its sides, to LANES; of the other side to SUBLANES. That is the
    layout of a forward pass.
    """
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            total += _dot(eqn, padded)
        elif name == "conv_general_dilated":
            total += _conv(eqn, padded)
        elif name == "scan":
            total += params["length"] * of_jaxpr(params["jaxpr"], padded)
        elif name == "cond":
            counted = min if params.get("branches_platforms") else max
            total += counted(of_jaxpr(branch, padded) for branch in params["branches"])
        else:
            total += sum(of_jaxpr(inner, padded) for inner in _inner(params))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """The programs within an equation: of jit, remat, shard_map, a custom rule's primal."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr")
    return [params[name] for name in names if hasattr(params.get(name), "eqns")]


def _up(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def _dot(eqn: Any, padded: bool) -> int:
    (contract, _), (batch, _) = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    k = math.prod(lhs[i] for i in contract)
    size = math.prod(eqn.outvars[0].aval.shape)
    if not padded or not size:
        return 2 * size * k
    b = math.prod(lhs[i] for i in batch)
    m = math.prod(n for i, n in enumerate(lhs) if i not in (*contract, *batch))
    n = size // (b * m)
    sides = min(_up(m, LANES) * _up(n, SUBLANES), _up(m, SUBLANES) * _up(n, LANES))
    return 2 * b * sides * _up(k, LANES)


def _conv(eqn: Any, padded: bool) -> int:
    params = eqn.params
    numbers = params["dimension_numbers"]
    lhs, rhs = (v.aval.shape for v in eqn.invars)
    out = eqn.outvars[0].aval.shape
    taps = math.prod(
        valid_taps(lhs[i], out[o], rhs[k], stride, low, dilate, kernel_dilate)
        for i, k, o, stride, (low, _), dilate, kernel_dilate in zip(
            numbers.lhs_spec[2:],
            numbers.rhs_spec[2:],
            numbers.out_spec[2:],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    )
    batch, features = (out[i] for i in numbers.out_spec[:2])
    k = rhs[numbers.rhs_spec[1]]
    if padded:
        features, k = _up(features, LANES), _up(k, LANES)
    return 2 * taps * batch * features * k // params["batch_group_count"]


def of_function(function: Any, *args: Any) -> int:
    """Counts the FLOPs of `function` at `args` (arrays or ShapeDtypeStructs), computing nothing."""
    return of_jaxpr(_traced(function, *args))


def padding(function: Any, *args: Any) -> float:
    """Returns the FLOPs that `of_jaxpr`'s padding adds to a forward pass, as a share of them."""
    jaxpr = _traced(function, *args)
    return of_jaxpr(jaxpr, padded=True) / max(of_jaxpr(jaxpr), 1) - 1


def _traced(function: Any, *args: Any) -> Any:
    jax.clear_caches()  # programs traced with kernels, whose FLOPs are in no jaxpr
    with only_einsum():
        jaxpr = jax.make_jaxpr(function)(*args)
    jax.clear_caches()  # nor is this one to be run
    return jaxpr

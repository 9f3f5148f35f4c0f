"""One table, or one JSON object: what a program needs of a TPU slice, how fast it could be."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from dalle2_jax.aot.chips import GIB, Slice
from dalle2_jax.aot.hlo import COLLECTIVES, Program
from dalle2_jax.errors import UserError
from dalle2_jax.nets.attention import without_kernels

# No search for a faster program or a tighter one, which takes two to ten times as long and seldom
# finds a smaller one. Without it nothing is asynchronous, and the tiles are such that the cycles
# come out six to nine times too long; with it the compiler gives no `optimal_seconds`.
QUICKLY = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}
METHODS = ("optimal", "cycles", "roofline")
_SIZES = re.compile(r"\(?([\d.]+)([KMGTPE])\)? (?:exceeds|of) .*?([\d.]+)([KMGTPE])")


class DoesNotFit(Exception):
    """The compiler found no way into the chip's memory."""

    def __init__(self, needed: float, available: float):
        super().__init__(f"{needed / GIB:.2f} GiB needed, {available / GIB:.2f} GiB there")
        self.needed, self.available = needed, available


class TooLarge(UserError):
    """A program does not fit the chips; the message says by how much, and the cure."""

    exit_status = 3

    def __init__(self, message: str, error: DoesNotFit):
        super().__init__(message)
        self.needed, self.available = error.needed, error.available

    def json(self) -> str:
        """Bytes a chip."""
        details = {"error": str(self), "needed": self.needed, "available": self.available}
        return json.dumps({"fits": False, **details})


@dataclasses.dataclass(frozen=True)
class Report:
    """Bytes and FLOPs are those of one chip and one step."""

    topology: str
    chips: int
    batch_size: int
    num_params: int
    memory: Mapping[str, float]  # bytes by kind, and `total`
    hbm: float
    analytic_flops: float  # forward and backward pass, nothing computed twice
    compiled_flops: float
    hbm_traffic: float  # bytes read and written
    collectives: Mapping[str, Mapping[str, float]]  # kind -> count, bytes sent
    ideal_collective_bytes: float
    async_share: float | None  # of the collectives' bytes; None: only with `thorough` it is known
    link_seconds: float  # of the collectives, at the links' peak; within the roofline alone
    seconds: Mapping[str, float | None]  # by method; None: the compiler does not tell
    unknown_cycles: int  # instructions of which the compiler gave no cycles
    mfu: Mapping[str, float | None]
    num_steps: int
    kernels: bool
    padding: float | None = None  # of the forward pass' FLOPs: products with zeros that fill tiles
    from_host: float = 0.0  # bytes that wait in the host's memory until a step uses them
    thorough: bool = False  # the compiler searched as it does for a run
    # when generating, stage -> the compiler's time (the roofline's if the compiler gives none)
    stage_seconds: dict[str, float | None] = dataclasses.field(default_factory=dict)

    @property
    def _what(self) -> str:
        """The unit of the reported time: a step of training, or a generated batch."""
        return "step" if self.num_steps else "generated batch"

    @property
    def _blind(self) -> bool:
        """FLOPs and roofline leave out the kernels: without them the program does not fit."""
        return self.kernels and self.seconds["optimal"] is None

    @property
    def collective_bytes(self) -> float:
        return sum(kind["bytes"] for kind in self.collectives.values())

    def json(self) -> str:
        seconds = {k: s for k, s in self.seconds.items() if s}
        extra: dict[str, Any] = {
            "fits": True,
            "flops_ratio": self.compiled_flops / max(self.analytic_flops, 1),
            "images_per_second": {k: self.batch_size / s for k, s in seconds.items()},
        }
        if self.num_steps:
            days = {k: s * self.num_steps / 86400 for k, s in seconds.items()}
            extra["days"] = days
            extra["chip_hours"] = {k: 24 * d * self.chips for k, d in days.items()}
        return json.dumps(dataclasses.asdict(self) | extra)

    def table(self) -> str:
        rows: list[tuple[str, str]] = [
            ("slice", f"{self.topology}, {self.chips} chip(s)"),
            ("batch", f"{self.batch_size}, {self.batch_size / self.chips:g} a chip"),
            ("parameters", f"{self.num_params:,}"),
        ]
        rows += [
            (f"  {kind}", f"{size / GIB:.2f} GiB a chip") for kind, size in self.memory.items()
        ]
        if self.from_host:
            moved = f"{self.from_host / GIB:.2f} GiB a step, not in its time"
            rows.append(("  from the host", moved))
        ratio = self.compiled_flops / max(self.analytic_flops, 1)
        share = 100 * self.memory["total"] / self.hbm
        rows += [
            ("  of HBM", f"{self.hbm / GIB:.2f} GiB ({share:.0f} %)"),
            ("FLOPs analytic", f"{self.analytic_flops / 1e12:.2f} T a chip and {self._what}"),
            ("FLOPs compiled", f"{self.compiled_flops / 1e12:.2f} T, {ratio:.3f} of the analytic"),
            *([("", "attention is in neither: its kernels do not tell")] if self._blind else []),
            *([] if self.padding is None else [("padding", f"{100 * self.padding:.1f} %")]),
            ("HBM traffic", f"{self.hbm_traffic / 1e9:.1f} GB"),
        ]
        for kind, found in self.collectives.items():
            rows.append((kind, f"{found['count']:.0f}, {found['bytes'] / 1e9:.3f} GB a chip"))
        if self.collectives:
            ideal = self.ideal_collective_bytes
            ratio = f", {self.collective_bytes / ideal:.2f} of the ideal" if ideal else ""
            text = f"{self.collective_bytes / 1e9:.3f} GB{ratio}"
            text += f", {1000 * self.link_seconds:.1f} ms at the links' peak"
            if self.async_share is not None:
                text += f", {100 * self.async_share:.0f} % asynchronous"
            rows.append(("all collectives", text))
        for method in METHODS:
            rows.append((f"{self._what}, {method}", self._speed(method)))
        for stage, seconds in self.stage_seconds.items():
            text = "not given by the compiler" if seconds is None else f"{1000 * seconds:.1f} ms"
            rows.append((f"  {stage}", text))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _speed(self, method: str) -> str:
        seconds, mfu = self.seconds[method], self.mfu[method]
        if seconds is None or mfu is None:
            return "not given by the compiler"
        rate = self.batch_size / seconds
        text = f"{1000 * seconds:.1f} ms, {rate:.1f} images/s, MFU {100 * mfu:.1f} %"
        if self.num_steps:
            days = seconds * self.num_steps / 86400
            hours = 24 * days * self.chips
            text += f", {self.num_steps:,} steps: {days:.1f} days, {hours:,.0f} chip-hours"
        if method == "cycles" and not self.thorough:
            text += " (far too long without --thorough)"
        elif method == "cycles" and self.unknown_cycles:
            text += f" ({self.unknown_cycles} instructions without)"
        return text


def compile_for(lowered: Any, effort: Mapping[str, float]) -> Any:
    """`lowered` (jax.jit(...).lower) compiled for its slice. Raises DoesNotFit."""
    try:
        return lowered.compile(compiler_options=dict(effort))
    except Exception as error:
        found = _SIZES.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not found or "hbm" not in str(error).lower():
            raise
        needed, available = (
            float(found[i]) * 2.0 ** (10 * "_KMGTPE".index(found[i + 1])) for i in (1, 3)
        )
        raise DoesNotFit(needed, available) from error


def compile_twice(lower: Callable[[], Any], thorough: bool = False) -> tuple[Any, Any]:
    """(the program as it would run, the one whose FLOPs and time the compiler can tell).

    They differ where attention is a Pallas kernel: of those the compiler knows neither, so the
    second computes attention without; and where the first is compiled with all of the compiler's
    search (`thorough`). `lower` is called anew for each. Raises DoesNotFit.
    """
    compiled = compile_for(lower(), {} if thorough else QUICKLY)
    if not thorough and not Program(compiled.as_text()).calls_kernels:
        return compiled, compiled
    try:
        with without_kernels():
            return compiled, compile_for(lower(), QUICKLY)
    except DoesNotFit:  # with all logits in memory
        return compiled, compiled


def measure(
    compiled: Any,
    timed: Any,
    where: Slice,
    *,
    batch_size: int,
    num_params: int,
    kinds: Mapping[str, float],
    analytic_flops: float,
    ideal_collective_bytes: float,
    num_steps: int = 0,
    padding: float | None = None,
    from_host: float = 0.0,
    thorough: bool = False,
) -> Report:
    """Measures a compiled program: memory, HBM traffic, collectives and cycles; FLOPs and time.

    Args:
        compiled, timed: the two programs of `compile_twice`; FLOPs and time are read from `timed`.
        kinds: bytes a chip holds of each kind of argument; the rest of the compiler's count is what
            a step makes (activations).
        analytic_flops: of one chip.

    Raises:
        DoesNotFit: it takes more memory than a chip has, which the compiler does not always report.
    """
    chip, program = where.chip, Program(timed.as_text())
    stats, cost = compiled.memory_analysis(), timed.cost_analysis()
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    if total > chip.hbm:
        raise DoesNotFit(total, chip.hbm)
    memory = dict(kinds)
    # some of what is given may lie where something temporary lay before
    memory["activations"] = min(stats.temp_size_in_bytes, total - sum(kinds.values()))
    memory["program, padding"] = total - sum(memory.values())
    memory["total"] = total
    as_run = program if timed is compiled else Program(compiled.as_text())
    flops, traffic = program.flops(), as_run.hbm_bytes()
    found: dict[str, dict[str, float]] = {}
    sent_async = wire = 0.0
    for c in as_run.collectives():
        kind = found.setdefault(c.kind, collections.defaultdict(float))
        kind["count"] += c.times
        kind["bytes"] += c.sent * c.times
        sent_async += c.sent * c.times * c.is_async
        wire += c.sent * c.times / where.bandwidth(c.group)
    sent = sum(kind["bytes"] for kind in found.values())
    cycles, unknown = as_run.cycles()
    optimal = cost.get("optimal_seconds", -1.0)
    is_known = optimal > 0 and not program.calls_kernels
    seconds = {
        "optimal": optimal + program.loop_seconds(chip.flops, chip.bandwidth) if is_known else None,
        "cycles": cycles / chip.clock,
        "roofline": max(flops / chip.flops, traffic / chip.bandwidth, wire),
    }
    return Report(
        topology=where.name,
        chips=where.chips,
        batch_size=batch_size,
        num_params=num_params,
        memory=memory,
        hbm=chip.hbm,
        analytic_flops=analytic_flops,
        compiled_flops=flops,
        hbm_traffic=traffic,
        collectives={kind: dict(found[kind]) for kind in COLLECTIVES if kind in found},
        ideal_collective_bytes=ideal_collective_bytes,
        async_share=sent_async / max(sent, 1) if thorough else None,
        link_seconds=wire,
        seconds=seconds,
        unknown_cycles=unknown,
        mfu={k: s and analytic_flops / (s * chip.flops) for k, s in seconds.items()},
        num_steps=num_steps,
        kernels=as_run.calls_kernels,
        padding=padding,
        from_host=from_host,
        thorough=thorough,
    )

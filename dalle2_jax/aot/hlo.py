"""FLOPs, bytes, collectives and cycles of an optimised program, read from its HLO text.

The compiler's own cost analysis counts the body of a loop once, however often it runs. Here each
computation is weighted by the number of its runs:

    runs[entry] = 1
    for each instruction of a computation that calls another:
        runs[called] += runs[caller] * (trip count, if the instruction is a `while`, else 1)

A scan's trip count is the constant that its condition compares the counter with. HBM traffic counts
the operands and results of instructions that are not inside a fusion and not in vector memory.
Traps: a Pallas call hides its FLOPs and time; `estimated_cycles` can be the sentinel 2**63 - 1;
both are reported as unknown rather than summed.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from dalle2_jax.aot.flops import valid_taps

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8}
_BYTES |= {"s64": 8, "u64": 8, "s4": 1, "u4": 1, "f8e4m3fn": 1, "f8e5m2": 1}  # others: 4
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")
_SENTINEL = 2**62
COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
)
# Instructions that move nothing: names for what is there, or for what other lines tell.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "copy-done", "async-done", "async-update",
    "iota", "opt-barrier", "add-dependency", "domain",
}  # fmt: skip


class Shape(NamedTuple):
    dtype: str
    sizes: tuple[int, ...]
    on_chip: bool  # in vector memory, S(1) and up: no HBM traffic

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * _BYTES.get(self.dtype, 4)


class Instruction(NamedTuple):
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str  # all after the opening bracket
    is_root: bool

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|\S+?)(?:,|$)", self.rest)
        return found[1] if found else ""


class Collective(NamedTuple):
    kind: str
    group: int  # chips that take part
    sent: int  # bytes a chip sends in one run, by the best algorithm along a ring
    times: int
    is_async: bool


class Program:
    """The computations of one module and how often each runs."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations.setdefault(found[2], {})
                self._entry = found[2] if found[1] else self._entry
            elif found := _INSTRUCTION.match(line):
                root, name, shapes, opcode, rest = found.groups()
                current[name] = Instruction(
                    name, opcode, _shapes(shapes), _operands(rest), rest, bool(root)
                )
        self._runs: dict[str, int] = collections.Counter()
        self._fused: set[str] = set()
        self._visit(self._entry, 1, False)

    def _visit(self, name: str, times: int, fused: bool) -> None:
        self._runs[name] += times
        if fused:
            self._fused.add(name)
        for i in self.computations[name].values():
            for kind, called in _CALLED.findall(i.rest):
                for inner in re.findall(r"%([\w.\-]+)", called):
                    if kind == "to_apply" and i.opcode != "call":
                        continue  # the sum within a reduction: a few scalars
                    loops = self._trips(i) if i.opcode == "while" else 1
                    if inner in self.computations:
                        self._visit(inner, times * loops, fused or i.opcode == "fusion")

    def _trips(self, loop: Instruction) -> int:
        """Returns how often a `while` runs: a scan counts from 0 to the constant in its
        condition.
        """
        condition = self.computations.get(loop.attribute("condition").lstrip("%"), {})
        bounds = [
            int(found[0])
            for i in condition.values()
            if i.opcode == "constant" and (found := re.match(r"\d+", i.rest))
        ]
        return max(bounds, default=1)

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs)."""
        for name, body in self.computations.items():
            if self._runs[name]:
                for i in body.values():
                    yield name, i, self._runs[name]

    @functools.cached_property
    def calls_kernels(self) -> bool:
        """A Pallas call is in it: the compiler knows neither its FLOPs nor its time."""
        return any("tpu_custom_call" in i.rest for _, i, _ in self.instructions())

    def flops(self) -> float:
        return sum(self._flops(name, i) * times for name, i, times in self.instructions())

    def flops_once(self) -> float:
        """Counts FLOPs as the compiler does, the body of every loop once."""
        return sum(self._flops(name, i) for name, i, _ in self.instructions())

    def hbm_bytes(self) -> float:
        return sum(self._traffic(name, i) * times for name, i, times in self.instructions())

    def cycles(self) -> tuple[float, int]:
        """(the compiler's estimated cycles, how many instructions it gave none for)."""
        total, unknown = 0.0, 0
        for name, i, times in self.instructions():
            if name in self._fused:
                continue
            if found := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
                cycles = int(found[1])
                total += cycles * times if cycles < _SENTINEL else 0
                unknown += cycles >= _SENTINEL
            else:
                unknown += "tpu_custom_call" in i.rest
        return total, unknown

    def loop_seconds(self, flops: float, bandwidth: float) -> float:
        """Returns the seconds that `optimal_seconds` leaves out: all runs but one of every loop's
        body.

        Each instruction takes the longer of its FLOPs at peak and its HBM traffic at full
        bandwidth.
        """
        return sum(
            (times - 1) * self._seconds(name, i, flops, bandwidth)
            for name, i, times in self.instructions()
            if times > 1 and name not in self._fused
        )

    def _seconds(self, name: str, i: Instruction, flops: float, bandwidth: float) -> float:
        done = self._flops(name, i)
        for inner in self._inner(i):
            done += sum(self._flops(inner, j) for j in self.computations[inner].values())
        return max(done / flops, self._traffic(name, i) / bandwidth)

    def _inner(self, i: Instruction) -> list[str]:
        if i.opcode != "fusion":
            return []
        found = re.search(r"\bcalls=%([\w.\-]+)", i.rest)
        return [found[1]] if found and found[1] in self.computations else []

    def collectives(self) -> list[Collective]:
        """Yields the collectives between several chips; a group of one sends nothing."""
        found, chains = [], set()
        for name, i, times in self.instructions():
            kind = i.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            # One that overlaps stands in each fusion of its chain: its start, what is computed
            # meanwhile, and its end.
            chain = re.search(r'chain_id="(\d+)"', i.rest)
            if chain and chain[1] in chains:
                continue
            chains.add(chain and chain[1])
            group = _group_size(i.rest)
            size = sum(s.bytes for s in self._operand_shapes(name, i))
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # the TPU's reduce-scatter is a fusion of this name
            if kind == "collective-permute":
                group = 2
            if group < 2:
                continue
            share = (group - 1) / group
            sent = {
                "all-gather": size * (group - 1),
                "reduce-scatter": size * share,
                "all-reduce": 2 * size * share,
                "all-to-all": size * share,
                "collective-permute": size,
            }[kind]
            is_async = i.opcode.endswith("-start") or "async" in name or chain is not None
            found.append(Collective(kind, group, int(sent), times, is_async))
        return found

    def _operand_shapes(self, name: str, i: Instruction) -> list[Shape]:
        body = self.computations[name]
        return [s for o in i.operands if o in body for s in body[o].shapes]

    def _flops(self, name: str, i: Instruction) -> float:
        if i.opcode == "convolution":
            return _convolution(i, self._operand_shapes(name, i))
        if i.opcode == "dot":
            lhs = self._operand_shapes(name, i)[0].sizes
            contract = [int(k) for k in re.findall(r"\d+", i.attribute("lhs_contracting_dims"))]
            return 2.0 * math.prod(i.shapes[0].sizes) * math.prod(lhs[k] for k in contract)
        return 0.0

    def _traffic(self, name: str, i: Instruction) -> float:
        """HBM bytes that an instruction reads and writes."""
        if (
            name in self._fused
            or i.opcode in _FREE
            or i.opcode.removesuffix("-start") in COLLECTIVES
        ):
            return 0.0
        if i.opcode.endswith("-done"):
            return 0.0
        written = sum(s.bytes for s in i.shapes if not s.on_chip)
        operands = [
            sum(s.bytes for s in self.computations[name][o].shapes if not s.on_chip)
            for o in i.operands
            if o in self.computations[name]
        ]
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2.0 * written
        if i.opcode == "dynamic-update-slice":
            return 2.0 * (operands[1] if len(operands) > 1 else 0)
        if i.opcode in ("copy-start", "async-start"):  # (to, from, ...): each counted once
            return float(sum(s.bytes for s in i.shapes[:2] if not s.on_chip))
        for inner in self._inner(i):
            operands, written = self._through(inner, operands, written)
        return float(sum(operands) + written)

    def _through(self, inner: str, operands: list[int], written: float) -> tuple[list, float]:
        """A fusion that reads a slice of an operand, or writes one in place, moves no more."""
        for i in self.computations[inner].values():
            if i.opcode != "parameter":
                continue
            place = int(re.match(r"\d+", i.rest)[0])  # pyright: ignore[reportOptionalSubscript]
            used = self._uses(inner, i.name)
            if place >= len(operands) or not operands[place] or not used:
                continue
            kinds = {u.opcode if u.operands[:1] == (n,) else "" for _, n, u in used}
            if kinds <= {"dynamic-slice", "slice"}:
                operands[place] = sum(s.bytes for _, _, u in used for s in u.shapes)
            elif kinds == {"dynamic-update-slice"} and len(used) == 1:
                where, _, update = used[0]
                changed = self.computations[where][update.operands[1]]
                written -= operands[place] - sum(s.bytes for s in changed.shapes)
                operands[place] = 0
        return operands, max(written, 0.0)

    def _uses(self, inner: str, name: str) -> list[tuple[str, str, Instruction]]:
        """(computation, the name there, instruction) of what reads `name` of a fused computation.

        Bitcasts and fusions within the fusion are looked through; one that `name` leaves by
        stands for what reads all of it.
        """
        body = self.computations[inner]
        found = [(inner, name, body[name])] if body[name].is_root else []
        for i in body.values():
            if name not in i.operands:
                continue
            if i.opcode == "bitcast":
                found += self._uses(inner, i.name)
            elif nested := self._inner(i):
                taken = {str(k) for k, o in enumerate(i.operands) if o == name}
                for j in self.computations[nested[0]].values():
                    if j.opcode == "parameter" and j.rest.partition(")")[0] in taken:
                        found += self._uses(nested[0], j.name)
            else:
                found.append((inner, name, i))
        return found


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(n) for n in sizes.split(",") if n), bool(re.search(r"S\([1-9]", at)))
        for dtype, sizes, at in _SHAPE.findall(text)
    )


def _operands(rest: str) -> tuple[str, ...]:
    depth = 1
    for end, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            return tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    return ()


def _group_size(rest: str) -> int:
    """Returns the size of replica_groups={{0,1},{2,3}}, [2,4]<=[8] or mesh['a'=2,'b'=4] {'b'}."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return 1


def _convolution(i: Instruction, operands: list[Shape]) -> float:
    lhs_spec, rhs_spec, out_spec = re.split("_|->", i.attribute("dim_labels"))
    lhs, rhs = (s.sizes for s in operands[:2])
    out = i.shapes[0].sizes
    found = re.search(r"window=\{([^}]*)\}", i.rest)
    window = dict(re.findall(r"(\w+)=(\S+)", found[1])) if found else {}
    spatial = sorted(c for c in out_spec if c.isdigit())

    def each(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(spatial)

    taps = math.prod(
        valid_taps(
            lhs[lhs_spec.index(d)],
            out[out_spec.index(d)],
            rhs[rhs_spec.index(d)],
            int(stride),
            int(pad.split("_")[0]),
            int(dilate),
            int(kernel_dilate),
        )
        for d, stride, pad, dilate, kernel_dilate in zip(
            spatial,
            each("stride", "1"),
            each("pad", "0_0"),
            each("lhs_dilate", "1"),
            each("rhs_dilate", "1"),
            strict=True,
        )
    )
    batch, features = out[out_spec.index("b")], out[out_spec.index("f")]
    groups = int(i.attribute("batch_group_count") or 1)
    return 2.0 * taps * batch * features * rhs[rhs_spec.index("i")] / groups

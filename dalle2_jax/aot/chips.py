"""The TPUs that there are: their figures, and devices to compile for where there is none.

Figures per chip: bfloat16 peak and HBM bandwidth from the vendor's pages on each TPU version; the
HBM that a program may take, by the compiler's own words; the clock follows from the peak and the
number of 128 x 128 (v6e, 7x: 256 x 256) multiplier arrays.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from typing import Any

import jax

from dalle2_jax.errors import UserError

GIB = 2**30
INSTALL = "pip install -e '.[tpu]' brings libtpu, the TPU compiler; it needs no TPU"


@dataclasses.dataclass(frozen=True)
class Chip:
    flops: float  # bfloat16, a second
    hbm: float  # bytes that a program may take
    bandwidth: float  # HBM bytes a second
    link: float  # ICI bytes a second, one way
    clock: float  # Hz
    wraps: int  # a dimension of a slice of so many chips (or a multiple) is a ring
    dimensions: int
    most: int  # chips of the largest slice
    options: tuple[tuple[str, Any], ...] = ()  # of the topology
    aliases: int = 1  # v4-8 counts cores: two a chip


_MEGACORE = (("chip_config_name", "megacore"),)

CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1200e9, 45e9, 1.05e9, 4, 3, 4096, _MEGACORE, 2),
    "v5e": Chip(197e12, 15.75 * GIB, 800e9, 45e9, 1.5e9, 16, 2, 256),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 90e9, 1.75e9, 4, 3, 6144, (), 2),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 90e9, 1.75e9, 16, 2, 256),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    name: str  # v5e:8x8
    chip: Chip
    shape: tuple[int, ...]
    devices: Any

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    def bandwidth(self, group: int) -> float:
        """ICI bytes a second that a chip can send in a collective over `group` chips.

        It lies along the slice's last dimensions: each gives both ways round where it closes to a
        ring; in a row that does not close, or a part of one, the ends have one way.
        """
        links = 0
        for size in [group] if group in self.shape else reversed(self.shape):
            along = math.gcd(group, size)
            group //= along
            if along > 1:
                links += 2 if along == size and size % self.chip.wraps == 0 else 1
        return self.chip.link * max(links, 1)


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """`v5e:8x8`, or `v5e-64` as the vendor writes it -> ("v5e", (8, 8)). UserError for others.

    Shapes are those of the vendor's pages; v4 and v5p have three dimensions.
    """
    kind, colon, shape = name.lower().replace("v5litepod", "v5e").partition(":")
    if not colon:
        kind, _, count = kind.partition("-")
        if kind in CHIPS and count.isdecimal() and (found := _squarest(CHIPS[kind], int(count))):
            shape = "x".join(map(str, found))
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise UserError(
            f"--topology={name} is unknown: write {', '.join(CHIPS)} and a shape, as in v5e:8x8, "
            "v5p:4x4x4, or the vendor's name, as in v5e-64"
        )
    sizes = tuple(int(size) for size in shape.split("x"))
    chip = CHIPS[kind]
    if len(sizes) > chip.dimensions or math.prod(sizes) > chip.most:
        raise UserError(
            f"--topology={name}: {kind} has slices of {chip.dimensions} dimensions and at most "
            f"{chip.most} chips"
        )
    sizes += (1,) * (chip.dimensions - len(sizes))
    if not _exists(sizes):
        raise UserError(
            f"--topology={name}: {kind} has no such slice, but "
            + ("1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16" if len(sizes) == 2 else _CUBOIDS)
        )
    return kind, sizes


_SMALL = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_CUBOIDS = (
    ", ".join("x".join(map(str, sizes)) for sizes in _SMALL[1:])
    + " and multiples of 4, the smallest first, as in 4x4x8"
)


def _exists(sizes: tuple[int, ...]) -> bool:
    """Returns whether the vendor lends slices of this shape.

    Two dimensions: powers of two, the second equal to the first or twice it. Three dimensions:
    whole cubes of 4 x 4 x 4, and a few smaller shapes.
    """
    if len(sizes) == 2:
        a, b = sizes
        return b in (a, 2 * a) and a & (a - 1) == 0 and sizes != (1, 2)
    whole = all(size % 4 == 0 for size in sizes) and list(sizes) == sorted(sizes)
    return whole or sizes in _SMALL


def _squarest(chip: Chip, count: int) -> tuple[int, ...] | None:
    """The vendor's shape for so many chips (cores): as square as its sides allow."""
    count, rest = divmod(count, chip.aliases)
    if rest or count < 1:
        return None
    if count & (count - 1):  # whole cubes of 4 x 4 x 4
        cubes, rest = divmod(count, 64)
        if rest or chip.dimensions == 2:
            return None
        sides = itertools.combinations_with_replacement(range(1, cubes + 1), 3)
        found = min((s for s in sides if math.prod(s) == cubes), key=sum)
        return tuple(4 * side for side in found)
    sizes, exponent = [1] * chip.dimensions, count.bit_length() - 1
    for i in range(exponent):
        sizes[-1 - i % chip.dimensions] *= 2
    return tuple(sizes) if chip.dimensions == 2 else tuple(sorted(sizes, reverse=count == 4))


def open_slice(name: str) -> Slice:
    """Devices of the slice, to be compiled for; nothing runs on them.

    Raises UserError for a shape that does not exist and where libtpu is not installed.
    """
    kind, shape = parse(name)
    chip = CHIPS[kind]
    prepare()
    from jax.experimental import topologies

    options = dict(chip.options)
    if math.prod(shape) == 1:
        options |= {"chip_config_name": "default", "chips_per_host_bounds": (1, 1, 1)}
    full = f"{kind}:{'x'.join(map(str, shape))}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=full, **options)
    except Exception as error:  # the plugin raises what it likes
        lines = str(error).strip().splitlines()
        if "libtpu" in str(error) and "opology" not in str(error):
            raise UserError(f"--topology={name}: {lines[0]}; {INSTALL}") from error
        raise UserError(f"--topology={name}: there is no such slice ({lines[0][:120]})") from error
    devices = list(found.devices)
    if len(devices) != math.prod(shape):  # one v4 chip opens as its two cores
        raise UserError(f"--topology={name}: no program for so few {kind} chips can be compiled")
    return Slice(full, chip, shape, devices)


def prepare() -> None:
    """Sets what libtpu must find before JAX starts: look for no TPU, allow several compilers.

    Raises UserError if libtpu is not installed.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # any: or it complains
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for the TPU that libtpu promises
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise UserError(f"--topology asks the TPU compiler: {INSTALL}") from None

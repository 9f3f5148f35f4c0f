"""Rings of a TPU's torus: the stages in which an axis of devices is gathered or scattered.

The chips of a TPU slice are the points of a torus, each connected to its neighbours along two or
three dimensions. The TPU compiler implements a reduce-scatter well along one physical ring. Over
several dimensions at once it reduces everything to every device instead, which sends twice the
bytes. So an axis of 16 devices on a torus of 4 x 4 is scattered in two stages:

    devices          stage 1: rings of neighbours      stage 2: rings across the blocks of stage 1
     0  1  2  3      [0 1 2 3] [4 5 6 7]               [0 4 8 12] [1 5 9 13]
     4  5  6  7      [8 9 10 11] [12 13 14 15]         [2 6 10 14] [3 7 11 15]
     8  9 10 11
    12 13 14 15

Gathering by stages 1, 2 concatenates slices in the order of the devices: after stage 1 each device
holds its row of four slices, after stage 2 all rows. Scattering takes the stages in reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Groups = list[list[int]]
"""The rings of one stage, as indices along the axis: `axis_index_groups` of a collective."""


def ring_groups(devices: Sequence[Any]) -> list[Groups | None]:
    """Returns the stages of gathering an axis of `devices`, each along one dimension of the torus.

    [None], one stage over all, where devices have no coordinates or do not lie in rows.
    """
    coords: Any = [getattr(device, "coords", None) for device in devices]
    # Two cores of one chip have the same coordinates: they are no ring.
    if None in coords or len(set(map(tuple, coords))) < len(coords):
        return [None]
    stages, n = [], len(coords)
    block = 1  # devices whose slices former stages have gathered
    while block < n:
        length = _ring_length(coords, block)
        if length == 1:  # the next device is in no line with the block: no rows
            return [None]
        stages.append(_rings(n, block, length))
        block *= length
    return stages if len(stages) > 1 else [None]


def _rings(n: int, block: int, length: int) -> Groups:
    """Returns rings of `length` indices below n, in steps of `block`; [n / length, length]."""
    starts = [i for i in range(n) if (i // block) % length == 0]
    return [[start + block * step for step in range(length)] for start in starts]


def _ring_length(coords: Sequence[Sequence[int]], block: int) -> int:
    """Returns the largest length for which all rings in steps of `block` run along one dimension.

    That is, the devices of each ring differ in one coordinate only, the same for all rings.
    """
    n, longest = len(coords), 1
    for length in range(2, n // block + 1):
        if n % (block * length):
            continue
        rings = [[coords[i] for i in ring] for ring in _rings(n, block, length)]
        changing = {
            dimension
            for ring in rings
            for dimension in range(len(coords[0]))
            if len({point[dimension] for point in ring}) > 1
        }
        if len(changing) == 1:
            longest = length
    return longest

"""The rows of a batch that a host reads, if its chips are a block of the torus."""

import dataclasses

import jax
import numpy as np
import pytest

from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.train.step import global_batch

MESHES = [
    {"fsdp": 16},
    {"data": 4, "fsdp": 4},
    {"data": 2, "fsdp": 4, "tensor": 2},
    {"data": 1, "fsdp": 4, "tensor": 4},  # a tensor axis over two hosts, which read the same rows
    {"data": 1, "fsdp": 1, "tensor": 16},
]


@dataclasses.dataclass(frozen=True)
class Chip:
    coords: tuple[int, int, int]
    process_index: int
    id: int
    core_on_chip: int = 0
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "no such TPU"


def slice_of_4_hosts() -> list[Chip]:
    """4 x 4 chips, 2 x 2 on each host, in the order of jax.devices(): host by host."""
    hosts = [(hx, hy) for hx in (0, 1) for hy in (0, 1)]
    return [
        Chip((2 * hx + x, 2 * hy + y, 0), process, 4 * process + 2 * x + y)
        for process, (hx, hy) in enumerate(hosts)
        for x in (0, 1)
        for y in (0, 1)
    ]


def rows_by_chip(mesh, batch_size: int, process: int) -> dict[Chip, np.ndarray]:
    """Returns the rows that each chip of a host holds, according to JAX."""
    places = sharding.batch_sharding(mesh).devices_indices_map((batch_size,))
    rows = np.arange(batch_size)
    return {chip: rows[i] for chip, i in places.items() if chip.process_index == process}


def test_the_mesh_runs_along_the_rows_of_the_torus():
    mesh = sharding.make_mesh({"fsdp": 16}, slice_of_4_hosts())
    assert [chip.coords for chip in mesh.devices.flat] == [(*c, 0) for c in np.ndindex(4, 4)]
    rows = [sharding.local_rows(mesh, 32, host).tolist() for host in range(4)]
    assert rows[0] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert rows[3] == [20, 21, 22, 23, 28, 29, 30, 31]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_host_reads_what_its_chips_hold(sizes):
    mesh = sharding.make_mesh(sizes, slice_of_4_hosts())
    read = []
    for host in range(4):
        rows = sharding.local_rows(mesh, 32, host)
        expected = np.unique(np.concatenate(list(rows_by_chip(mesh, 32, host).values())))
        np.testing.assert_array_equal(rows, expected)
        read.extend(rows.tolist())
    assert set(read) == set(range(32))
    if sizes.get("tensor", 1) <= 2:  # within one host, so no row is read twice
        assert len(read) == 32


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_hosts_rows_make_up_the_batch(sizes, monkeypatch):
    """Every chip gets its rows of the batch out of those that its host reads."""
    mesh = sharding.make_mesh(sizes, slice_of_4_hosts())
    batch = np.random.default_rng(0).integers(0, 99, (32, 3))

    def make(shape, place, part):
        assert shape == batch.shape and place == sharding.batch_sharding(mesh)
        places = place.devices_indices_map(shape)
        return {c: part(i) for c, i in places.items() if c.process_index == jax.process_index()}

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    for host in range(4):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        local = batch[sharding.local_rows(mesh, 32)]
        placed = global_batch({"image": local}, mesh)["image"]
        for chip, rows in rows_by_chip(mesh, 32, host).items():
            np.testing.assert_array_equal(placed[chip], batch[rows])


@pytest.mark.parametrize(
    "sizes", [{}, {"data": 2, "fsdp": 4}, {"data": 2, "tensor": 4}, {"tensor": 8}], ids=str
)
def test_a_single_host_reads_everything(sizes):
    mesh = sharding.make_mesh({"data": -1, **sizes})
    batch = {"image": np.arange(48).reshape(16, 3), "tokens": np.arange(16)}
    np.testing.assert_array_equal(sharding.local_rows(mesh, 16), np.arange(16))
    for name, x in global_batch(batch, mesh).items():
        assert x.sharding == sharding.batch_sharding(mesh)
        np.testing.assert_array_equal(x, batch[name])


def test_a_batch_that_does_not_divide_is_refused():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    with pytest.raises(UserError, match="batch_size=12 is not a multiple of 8"):
        sharding.local_rows(mesh, 12)

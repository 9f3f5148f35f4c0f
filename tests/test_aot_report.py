"""The parts of the fit report that need no TPU compiler."""

import json
import sys

import jax
import numpy as np
import pytest
import small_cascade

from dalle2_jax import build
from dalle2_jax.aot import chips, flops, report, training
from dalle2_jax.aot.chips import GIB
from dalle2_jax.aot.largest import largest
from dalle2_jax.aot.report import DoesNotFit, Report, TooLarge
from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding


def made(batch_size: int = 8, total: float = GIB, thorough: bool = True) -> Report:
    return Report(
        topology="v5e:2x2",
        chips=4,
        batch_size=batch_size,
        num_params=1000,
        memory={"params": total / 2, "activations": total / 2, "total": total},
        hbm=16 * GIB,
        analytic_flops=1e12,
        compiled_flops=1.25e12,
        hbm_traffic=1e9,
        collectives={"all-gather": {"count": 3, "bytes": 2e9}},
        ideal_collective_bytes=1e9,
        async_share=0.5 if thorough else None,
        link_seconds=0.125,
        seconds={"optimal": 0.5, "cycles": 1.0, "roofline": None},
        unknown_cycles=2,
        mfu={"optimal": 0.4, "cycles": 0.2, "roofline": None},
        num_steps=86400,
        kernels=False,
        thorough=thorough,
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e:8x8", ("v5e", (8, 8))),
        ("v5e-8", ("v5e", (2, 4))),
        ("v5e-64", ("v5e", (8, 8))),
        ("v5litepod-16", ("v5e", (4, 4))),
        ("V5E:8x8", ("v5e", (8, 8))),
        ("v5p-384", ("v5p", (4, 4, 12))),
        ("v4-1536", ("v4", (8, 8, 12))),
        ("v5p-12288", ("v5p", (16, 16, 24))),
        ("v5e-256", ("v5e", (16, 16))),
        ("v6e-256", ("v6e", (16, 16))),
        ("v5p-128", ("v5p", (4, 4, 4))),  # cores: two a chip
        ("v4-8", ("v4", (2, 2, 1))),
        ("v5p:2x2x1", ("v5p", (2, 2, 1))),
        ("v5p:2x2", ("v5p", (2, 2, 1))),
        ("v4:4x8x12", ("v4", (4, 8, 12))),
    ],
)
def test_slices_by_shape_and_by_the_vendors_name(name, expected):
    assert chips.parse(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "v9:2x2",
        "v5e",
        "v5e:",
        "v5e:0x2",
        "v5e-7",
        "v5e:2",
        "8x8",
        "v4-1",
        "v5e:4x4x4",
        "v5e-512",
        "v6e:32x16",
        "v5e-²",
        "v5e:6x6",
        "v6e:4x2",
        "v5p:2x2x3",
        "v5p:8x4x4",
        "v5p:2x4",
    ],
)
def test_an_unknown_slice_is_one_clear_error(name):
    with pytest.raises(UserError, match="--topology="):
        chips.parse(name)


def test_without_the_compiler_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tpu\]'"):
        chips.open_slice("v5e:2x2")


def test_a_row_gives_one_way_and_a_ring_both():
    small = chips.Slice("v5e:8x8", chips.CHIPS["v5e"], (8, 8), None)
    pod = chips.Slice("v5e:16x16", chips.CHIPS["v5e"], (16, 16), None)
    assert small.bandwidth(8) == 45e9
    assert small.bandwidth(64) == 2 * 45e9  # over both dimensions
    assert pod.bandwidth(16) == 2 * 45e9
    assert pod.bandwidth(256) == 4 * 45e9
    assert pod.bandwidth(64) == 3 * 45e9  # a ring of 16, and 4 in a row of the other


def test_the_table_and_the_json_tell_the_same():
    told = made()
    given = json.loads(told.json())
    assert given["flops_ratio"] == 1.25
    assert given["images_per_second"] == {"optimal": 16.0, "cycles": 8.0}
    assert given["days"] == {"optimal": 0.5, "cycles": 1.0}
    assert given["chip_hours"]["optimal"] == 48
    table = told.table()
    for part in (
        "1.250 of the analytic",
        "2.00 of the ideal, 125.0 ms at the links' peak",
        "50 % asynchronous",
        "16.0 images/s",
    ):
        assert part in table, table
    assert "0.5 days" in table and "48 chip-hours" in table
    assert "not given by the compiler" in table and "(2 instructions without)" in table
    quick = made(thorough=False).table()
    assert "asynchronous" not in quick and "too long without --thorough" in quick


class Lowered:
    def __init__(self, message: str):
        self.message = message

    def compile(self, compiler_options):
        raise RuntimeError(self.message)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.31G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 16.31G of 15.75G hbm. Exceeded hbm capacity by 574.7M.",
    ],
)
def test_what_does_not_fit_is_read_from_the_compilers_words(message):
    with pytest.raises(DoesNotFit) as caught:
        report.compile_for(Lowered(message), {})
    assert caught.value.needed == pytest.approx(16.31 * GIB)
    assert caught.value.available == pytest.approx(15.75 * GIB)


@pytest.mark.parametrize(("size", "exponent"), [("574.7M", 20), ("1.18T", 40), ("5.81P", 50)])
def test_what_does_not_fit_may_be_of_any_size(size, exponent):
    told = f"RESOURCE_EXHAUSTED: temporaries ({size}) exceeds available HBM (1.00K)."
    with pytest.raises(DoesNotFit) as caught:
        report.compile_for(Lowered(told), {})
    assert caught.value.needed == float(size[:-1]) * 2.0**exponent


@pytest.mark.parametrize(
    "told",
    [
        "INTERNAL: 3G of 4G",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.02M of 16.00M vmem.",
    ],
)
def test_other_errors_of_the_compiler_are_not_taken_for_it(told):
    with pytest.raises(RuntimeError, match=told):
        report.compile_for(Lowered(told), {})


@pytest.mark.parametrize("most", [1, 2, 7, 40, 199, 3000])
@pytest.mark.parametrize("tile", [1, 8, 128])
def test_the_largest_batch_is_found_in_few_attempts(most, tile):
    """Exactly up to 64 rows, then to one in 32; memory grows in tiles."""
    tried = []

    def attempt(rows: int) -> Report:
        tried.append(rows)
        a_row = 15 * GIB / (most + 0.5)
        needed = GIB + (rows if rows <= most else max(rows, -(-rows // tile) * tile)) * a_row
        if needed > 16 * GIB:
            raise too_large(needed)
        return made(rows, needed)

    best = largest(attempt, 1, 16 * GIB)
    assert most - most // 32 <= best.batch_size <= most
    assert len(tried) == len(set(tried)) <= 10, tried


def too_large(needed):
    error = DoesNotFit(needed, 16 * GIB)
    return TooLarge(str(error), error)


def test_attempts_are_told_and_of_the_least_batch(caplog):
    """Each takes minutes: what it is and what it found stands on the terminal."""

    def attempt(batch_size: int) -> Report:
        assert batch_size % 8 == 0
        if batch_size > 24:
            raise too_large(17 * GIB)
        return made(batch_size, 5 * GIB * batch_size / 8)

    with caplog.at_level("INFO"):
        assert largest(attempt, 8, 16 * GIB).batch_size == 24
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "attempt 1: compiling with batch_size=8"
    assert told[1].startswith("batch_size=8 needs 5.00 of 16.00 GiB, as ")
    assert any(line.startswith("batch_size=32 needs 17.00 of 16.00 GiB") for line in told)


def test_a_step_too_large_for_one_example_is_told():
    def attempt(rows: int) -> Report:
        raise too_large(17 * GIB)

    with pytest.raises(TooLarge, match=r"17\.00 GiB needed, 16\.00 GiB there") as caught:
        largest(attempt, 1, 16 * GIB)
    assert caught.value.exit_status == 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    clip = small_cascade.write(tmp_path_factory.mktemp("clip"), ["clip"])
    return small_cascade.config("decoder", clip, batch_size=16)


def test_the_cure_is_named(config):
    where = chips.Slice("v5e:2x2", chips.CHIPS["v5e"], (2, 2), None)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    told = training._told(config, where, mesh, DoesNotFit(20 * GIB, 16 * GIB))
    for part in ("batch_size=16", "4.00 GiB too much", "--config.batch_size=8", "mesh.data=1"):
        assert part in told, told


def test_bytes_are_those_of_one_device():
    mesh = sharding.make_mesh({"fsdp": 8})
    tree = {
        "a": jax.ShapeDtypeStruct((16, 3), np.float32),
        "b": jax.ShapeDtypeStruct((5,), np.int8),
    }
    placed = sharding.with_shardings(tree, (("a", "fsdp:1"), ("b", "replicate")), mesh)
    assert training.local_bytes(placed) == 2 * 3 * 4 + 5


def test_the_ideal_is_two_gathers_and_a_scatter(config):
    mesh = sharding.make_mesh({"fsdp": 8})
    tree = {
        "w": jax.ShapeDtypeStruct((8, 100), np.float32),
        "b": jax.ShapeDtypeStruct((8,), np.float32),
    }
    placed = sharding.with_shardings(tree, (("w", "fsdp:1"), ("b", "replicate")), mesh)
    ideal = training._ideal_bytes(config, placed, {}, mesh)  # it computes in float32
    assert ideal == 3 * 800 * 4 * 7 / 8 + 2 * 8 * 4 * 7 / 8
    frozen = training._ideal_bytes(config, {}, {"clip": placed}, mesh)
    assert frozen == 800 * 4 * 7 / 8


def test_the_analytic_flops_have_no_recomputation_in_them(config):
    plain, _ = training.count(config)
    again = config.copy_and_resolve_references()
    with again.unlocked(), again.model.unet.ignore_type():
        again.model.unet.remat = "full"
    assert training.count(again)[0] == plain
    task = build.task(again)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(task.init, key)
    grad = jax.grad(lambda p, b, k: task.loss(p, task.frozen(), b, k, True)[0])
    assert flops.of_function(grad, params, build.abstract_batch(again), key) > 1.1 * plain


def test_a_batch_is_of_whole_replicas_and_of_two_pairs(config):
    mesh = sharding.make_mesh({"data": 4}, jax.devices()[:4])
    one = sharding.make_mesh({}, jax.devices()[:1])
    assert training._least_rows(config, mesh) == 4 and training._least_rows(config, one) == 1
    clip = small_cascade.config("clip", batch_size=16)
    assert training._least_rows(clip, mesh) == 4 and training._least_rows(clip, one) == 2
    with clip.unlocked():
        clip.task.sam_rho, clip.task.sam_replica_batch, clip.batch_size = 0.1, 4, 32
    assert training._least_rows(clip, mesh) == 16
    where = chips.Slice("v5e:2x2", chips.CHIPS["v5e"], (2, 2), None)
    told = training._told(clip, where, mesh, DoesNotFit(20 * GIB, 16 * GIB))
    assert "--config.batch_size=16 " in told
    for name in ("image", "text"):
        assert f"--config.model.{name}.remat=full" in told, told


def test_what_does_not_fit_is_json_too():
    error = TooLarge("too large", DoesNotFit(20 * GIB, 16 * GIB))
    told = {"fits": False, "error": "too large", "needed": 20 * GIB, "available": 16 * GIB}
    assert json.loads(error.json()) == told


def test_what_waits_on_the_host_is_counted_there():
    place = sharding.replicated(sharding.make_mesh({}, jax.devices()[:1]))
    places = place, place.with_memory_kind("pinned_host"), place.with_memory_kind("pinned_host")
    tree = [jax.ShapeDtypeStruct((8, 4), np.float32, sharding=p) for p in places]
    assert training.local_bytes(tree) == 128
    assert training.local_bytes(tree, on_host=True) == 256


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["clip", "prior", "ar_prior", "decoder", "upsampler_256", "upsampler_1024"]
)
def test_the_tpu_variants_fill_their_tiles(stage):
    path = f"configs/{stage}.py:tpu"
    made = build.beside_clip(build.read_config(path), path)
    with made.unlocked():
        made.batch_size = 64
    assert 0 <= training.count(build.complete(made))[1] <= 0.05

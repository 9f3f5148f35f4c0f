"""Small steps compiled for a TPU: what the report promises of large ones, at small width."""

import dataclasses
import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_cascade

from dalle2_jax import build
from dalle2_jax.aot import chips, sampling, training
from dalle2_jax.aot.report import TooLarge
from dalle2_jax.errors import UserError

pytestmark = pytest.mark.tpu_aot
ROOT = Path(__file__).parent.parent
WIDE = dict(channels=256, channel_mults=(1, 2), num_blocks=1, attention_levels=(1,), groups=32)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return small_cascade.write(tmp_path_factory.mktemp("clip"), ["clip"])


def config(clip, remat="none", **changes):
    """A decoder wide enough for its weights to be split."""
    made = small_cascade.config("decoder", clip, batch_size=32, mesh=dict(data=1, fsdp=-1))
    with made.unlocked(), made.model.unlocked():
        made.model.unet = {**made.model.unet.to_dict(), **WIDE, "remat": remat}
        made.model.dtype = "bfloat16"
        made.update(changes)
    return build.complete(made)


@pytest.fixture(scope="module")
def plain(clip):
    return training.report(config(clip), "v5e:2x4")


def test_nothing_is_computed_twice_without_remat(plain):
    assert plain.compiled_flops / plain.analytic_flops == pytest.approx(1, abs=0.05)


def test_full_remat_costs_at_most_a_forward_pass(clip, plain):
    full = training.report(config(clip, "full"), "v5e:2x4")
    assert full.analytic_flops == plain.analytic_flops
    assert 1.1 < full.compiled_flops / full.analytic_flops <= 1.35
    assert full.memory["activations"] < plain.memory["activations"]


def test_collectives_are_those_of_fsdp(plain):
    """Weights gathered twice, gradients reduce-scattered, activations where they are."""
    assert "all-to-all" not in plain.collectives
    assert plain.collective_bytes <= 1.1 * plain.ideal_collective_bytes
    scattered, gathered = (plain.collectives[k]["bytes"] for k in ("reduce-scatter", "all-gather"))
    assert gathered == pytest.approx(2 * scattered, rel=0.15)


def small_clip(batch_size=8 * 16, **changes):
    """CLIP's B/32 with two blocks in either tower."""
    made = build.read_config("configs/clip.py:b32")
    with made.unlocked(), made.model.unlocked():
        made.batch_size = batch_size
        made.task.update(changes)
        for tower in (made.model.image, made.model.text):
            tower.depth, tower.remat = 2, "none"
    return made


def test_the_ar_prior_moves_weights_alone():
    """At the paper's width and sequence, with two blocks; its statistics are whole everywhere."""
    path = "configs/ar_prior.py:paper"
    made = build.beside_clip(build.read_config(path), path)
    with made.unlocked(), made.model.unlocked():
        made.batch_size, made.model.depth = 8 * 8, 2
    found = training.report(made, "v5e:2x4")
    assert "all-to-all" not in found.collectives
    assert found.collective_bytes <= 1.1 * found.ideal_collective_bytes
    assert found.compiled_flops / found.analytic_flops == pytest.approx(1, abs=0.1)


def test_with_all_of_its_search_the_compiler_sends_while_it_computes():
    quick = training.report(small_clip(), "v5e:2x4")
    found = training.report(small_clip(), "v5e:2x4", thorough=True)
    assert quick.async_share is None and found.async_share > 0.05
    assert found.seconds["cycles"] < quick.seconds["cycles"] / 2
    assert found.compiled_flops == quick.compiled_flops
    assert found.seconds["optimal"] == quick.seconds["optimal"]


def test_a_torus_of_three_dimensions_gathers_ring_by_ring():
    """Over all three at once the compiler would add up zeros, twice the bytes."""
    found = training.report(small_clip(64 * 16), "v5p:4x4x4")
    assert found.collective_bytes <= 1.1 * found.ideal_collective_bytes


@pytest.mark.parametrize("replicas", [1, 2])
def test_sam_computes_no_more_than_it_says(replicas):
    """Its two gradients, the weights gathered once (in float32), gradients reduce-scattered once.
    A loop over one replica the compiler would compute twice."""
    made = small_clip(sam_rho=0.1, sam_replica_batch=16 // replicas)
    found = training.report(made, "v5e:2x4")
    assert found.compiled_flops / found.analytic_flops == pytest.approx(1, abs=0.05)
    assert found.collective_bytes <= 1.1 * found.ideal_collective_bytes
    scattered, gathered = (found.collectives[k]["bytes"] for k in ("reduce-scatter", "all-gather"))
    assert gathered == pytest.approx(2 * scattered, rel=0.15)


def test_a_chip_of_a_larger_slice_has_as_much_to_do(clip, plain):
    larger = training.report(config(clip, batch_size=64), "v5e:4x4")
    for name in ("analytic_flops", "compiled_flops"):
        assert getattr(larger, name) == pytest.approx(getattr(plain, name), rel=0.05)


@pytest.mark.parametrize("name", ["v5e:1x1", "v4:2x2x1", "v5p:2x2x1", "v6e:1x1"])
def test_every_kind_of_chip_opens(name):
    where = chips.open_slice(name)
    assert len(where.devices) == where.chips


def test_a_slice_that_does_not_exist_is_one_line():
    with pytest.raises(UserError, match="--topology=v5e:3x5"):
        chips.open_slice("v5e:3x5")


def test_a_batch_that_does_not_divide_is_one_line(clip):
    with pytest.raises(UserError, match="batch_size=33 is not a multiple of 8"):
        training.report(config(clip, batch_size=33), "v5e:2x4")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_commands_tell_and_exit():
    tiny = ["train.py", "--config=configs/upsampler_256.py:tiny", "--topology=v5e:2x2"]
    told = run(*tiny, "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["batch_size"] == 64
    large = run(*tiny, "--config.batch_size=400000")
    assert large.returncode == 3
    last = large.stderr.strip().splitlines()[-1]
    assert "GiB too much a chip" in last and "--auto_batch finds the largest" in last
    drawn = run("sample.py", "--weights=tiny", "--topology=v5e-1", "--batch_size=1")
    assert drawn.returncode == 0, drawn.stderr
    assert "weights of decoder" in drawn.stdout


def test_sigterm_ends_it_while_the_compiler_works():
    """At once, and not with 0, which would say that it fits."""
    flags = "--config=configs/prior.py:paper --topology=v5e:8x8".split()  # half a minute
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], stdout=subprocess.PIPE)
    time.sleep(15)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM and not process.stdout.read()


def test_the_largest_batch_is_compiled(clip, monkeypatch):
    """On a chip with so little memory that its batch compiles soon; a tenth more does not fit."""
    small = dataclasses.replace(chips.CHIPS["v5e"], hbm=2**25)
    monkeypatch.setitem(chips.CHIPS, "v5e", small)
    made = build.complete(small_cascade.config("upsampler", clip))
    found = training.report(made, "v5e:1x1", auto_batch=True)
    assert 0.5 * found.hbm < found.memory["total"] <= found.hbm
    made.batch_size = found.batch_size * 11 // 10 + 1
    told = f"batch_size={made.batch_size} does not fit v5e:1x1.* --config.batch_size="
    with pytest.raises(TooLarge, match=told) as error:
        training.report(made, "v5e:1x1")
    made.batch_size = int(str(error.value).split("--config.batch_size=")[1].split()[0])
    assert training.report(made, "v5e:1x1").memory["total"] <= found.hbm  # the cure is one


def test_a_cascade_of_configs_needs_no_weights():
    found = sampling.report("configs/tiny", "v5e:1x1", 1, {"steps": 2})
    assert found.num_params > 1e6
    assert set(found.collectives) == set() and not found.from_host
    assert set(found.memory) > {"weights of clip", "weights of prior", "weights of decoder"}


def test_the_most_images_at_a_time_are_found(monkeypatch):
    """Of a chip with room for the activations of two images and a half."""
    report = functools.partial(sampling.report, "tiny", "v5e:1x1", 1, {"steps": 2})
    one = report().memory
    small = dataclasses.replace(chips.CHIPS["v5e"], hbm=one["total"] + 1.5 * one["activations"])
    monkeypatch.setitem(chips.CHIPS, "v5e", small)
    found = report(auto_batch=True)
    assert 2 <= found.batch_size <= 4 and one["total"] < found.memory["total"] <= found.hbm
    assert found.memory["total"] == sum(v for k, v in found.memory.items() if k != "total")


def test_images_are_drawn_on_their_own_chips():
    """Also with guidance, which draws every row twice."""
    found = sampling.report("configs/tiny", "v5e:2x2", 4, {"steps": 2, "cfg_scale": 2.0})
    assert found.batch_size == 4 and set(found.collectives) == set()


def test_weights_beyond_half_a_chip_wait_on_the_host(monkeypatch):
    """Of the memory they then take their turns in, the report tells the fullest."""
    whole = sampling.report("configs/tiny", "v5e:1x1", 1, {"steps": 2})
    monkeypatch.setattr(sampling, "should_offload", lambda params, memory: True)
    found = sampling.report("configs/tiny", "v5e:1x1", 1, {"steps": 2})
    weights = {k: v for k, v in whole.memory.items() if k.startswith("weights of")}
    assert found.from_host == sum(weights.values())
    # the last upsampler's images are the largest by far
    kinds = {"weights of upsampler_1024", "activations", "program, padding", "total"}
    assert set(found.memory) == kinds and found.memory["total"] < whole.memory["total"]
    assert "from the host" in found.table()

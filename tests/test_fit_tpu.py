"""Small steps compiled for a TPU: what the report promises of large ones, at small width."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import small_cascade

from dalle2_jax import build
from dalle2_jax.errors import UserError
from dalle2_jax.fit import chips, training
from dalle2_jax.fit import sampling as fit_sampling

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
    assert "GiB too much a chip" in last and "--config.batch_size=200000" in last
    drawn = run("sample.py", "--weights=tiny", "--topology=v5e-1", "--batch_size=1")
    assert drawn.returncode == 0, drawn.stderr
    assert "weights of decoder" in drawn.stdout


def test_the_largest_batch_is_compiled(clip):
    found = training.report(config(clip), "v5e:1x1", auto_batch=True)
    assert 0.5 * found.hbm < found.memory["total"] <= found.hbm


def test_a_cascade_of_configs_needs_no_weights():
    found = fit_sampling.report("configs/tiny", "v5e:1x1", 1, {"steps": 2})
    assert found.num_params > 1e6
    assert set(found.collectives) == set()

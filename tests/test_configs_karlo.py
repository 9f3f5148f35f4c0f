"""configs/*.py:karlo: the networks that Karlo's own settings make, to the last parameter."""

import importlib
import math

import jax
import karlo_layout
import pytest

from dalle2_jax import build
from dalle2_jax.diffusion.process import Process
from dalle2_jax.nets.clip import CLIP
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.nets.upsampler import Upsampler
from dalle2_jax.options import construct, plain, with_defaults
from dalle2_jax.pretrained import unclip
from dalle2_jax.sampling import load
from dalle2_jax.sampling.stage import Settings

NETWORKS = {
    "clip": CLIP,
    "prior": DiffusionPrior,
    "decoder": Decoder,
    "upsampler_256": Upsampler,
}


def config(stage: str):
    given = importlib.import_module(f"configs.{stage}").get_config("karlo")
    return build.complete(build.beside_clip(build.complete(given), f"configs/{stage}.py:karlo"))


@pytest.fixture(scope="module")
def entries(tmp_path_factory) -> dict:
    """What import makes of Karlo's settings; CLIP's of the pipeline that has both towers."""
    found = {}
    for kind in ("UnCLIPPipeline", "UnCLIPImageVariationPipeline"):
        folder = karlo_layout.write_settings(tmp_path_factory.mktemp(kind), kind, karlo_layout.REAL)
        found |= {stage.name: stage.entry for stage in unclip.stages(folder)}
    return found


def shapes(stage: str):
    task = build.task(config(stage))
    return jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0)))


def network(stage: str, section):
    """What it computes: no matter in which type, and with what it recomputes."""

    def bare(section):
        if not isinstance(section, dict):
            return section
        return {k: bare(v) for k, v in section.items() if k not in ("dtype", "remat")}

    return construct(NETWORKS[stage], with_defaults(NETWORKS[stage], bare(section)), "")


def count(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def test_published_parameters():
    """As diffusers' networks of kakaobrain/karlo-v1-alpha count theirs."""
    prior, decoder, clip = (shapes(stage) for stage in ("prior", "decoder", "clip"))
    assert count(prior) == 1_022_028_544 + 1_536  # and CLIP's statistics
    unet = count(decoder["unet"]) + count(decoder["time"])
    assert (unet, count(decoder) - unet) == (885_439_686, 7_878_400)
    upsampler = shapes("upsampler_256")
    assert {k: count(x) for k, x in upsampler.items()} == dict.fromkeys(
        ("first", "last"), 691_579_523
    )
    assert (count(clip["text_tower"]), count(clip["image_tower"])) == (123_650_304, 303_966_208)


@pytest.mark.parametrize("stage", NETWORKS)
def test_what_import_makes_is_what_the_config_says(stage, entries):
    """Network, diffusion and sampling; the config adds how it is trained."""
    entry, said = entries[stage], config(stage)
    assert said.model.dtype == "bfloat16"
    assert network(stage, plain(said.model)) == network(stage, entry["model"])
    expected = load.expected_params(entries, stage, "")
    assert jax.tree.map(lambda x: x.shape, shapes(stage)) == jax.tree.map(
        lambda x: x.shape, expected
    )
    if stage == "clip":
        return
    assert construct(Process, said.diffusion, "") == construct(Process, entry["diffusion"], "")
    assert construct(Settings, said.task.sampling, "") == construct(Settings, entry["sampling"], "")
    rest = {k: v for k, v in entry.items() if k not in ("model", "diffusion", "sampling")}
    assert rest == {name: said.task[name] for name in rest} and (rest or stage == "decoder")


def test_only_the_networks_that_they_name_learn():
    """Karlo's last step was taught by a loss that is not here."""
    assert config("upsampler_256").task.learns == ("first",)

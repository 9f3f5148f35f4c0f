"""configs/*.py:karlo: the networks that Karlo's own settings make, to the last parameter."""

import importlib
import json
import math
from pathlib import Path

import jax
import pytest

from dalle2_jax import build
from dalle2_jax.diffusion.process import Process
from dalle2_jax.nets.clip import CLIP
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.nets.upsampler import Upsampler
from dalle2_jax.pretrained import karlo_diffusers
from dalle2_jax.sampling import load
from dalle2_jax.sampling.settings import Settings
from dalle2_jax.validation.sections import construct, to_json_values, with_defaults

NETWORKS = {
    "clip": CLIP,
    "prior": DiffusionPrior,
    "decoder": Decoder,
    "upsampler_256": Upsampler,
}


def settings(kind: str) -> dict[str, dict]:
    """folder/file -> what it says, as diffusers and transformers save it."""
    channels = [320, 640, 960, 1280]

    def tower(width: int, depth: int, heads: int) -> dict:
        shape = dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads)
        shape |= dict(intermediate_size=4 * width, projection_dim=768)
        return shape | dict(hidden_act="quick_gelu", layer_norm_eps=1e-5)

    def unet(sees: list[bool], sample: int) -> dict:
        kinds = {True: "SimpleCrossAttn{}Block2D", False: "Resnet{}sampleBlock2D"}
        blocks_of = [kinds[x] for x in sees]
        up = [name.format("Up") for name in reversed(blocks_of)]
        return dict(
            sample_size=sample,
            down_block_types=[name.format("Down") for name in blocks_of],
            up_block_types=up,
            block_out_channels=channels,
            layers_per_block=3,
            attention_head_dim=64,
            norm_num_groups=32,
            act_fn="silu",
            norm_eps=1e-5,
        )

    def scheduler(prediction: str, variance: str, **more: float) -> dict:
        kinds = dict(prediction_type=prediction, variance_type=variance, clip_sample=True)
        kinds |= dict(_class_name="UnCLIPScheduler", num_train_timesteps=1000)
        return kinds | {"clip_sample_range": 1.0, **more}

    decoder = dict(in_channels=3, out_channels=6, resnet_time_scale_shift="scale_shift")
    decoder |= dict(class_embed_type="identity", mid_block_type="UNetMidBlock2DSimpleCrossAttn")
    upsampler = dict(in_channels=6, out_channels=3, add_attention=False)
    upsampler |= unet([False] * 4, 256)
    preprocessor = dict(resample=3, do_center_crop=True, do_normalize=True, crop_size=224)
    preprocessor |= dict(image_mean=[0.48145466, 0.4578275, 0.40821073])
    preprocessor |= dict(image_std=[0.26862954, 0.26130258, 0.27577711])
    prior = dict(embedding_dim=768, num_embeddings=77, additional_embeddings=4)
    prior |= dict(num_attention_heads=32, attention_head_dim=64, num_layers=20)
    found = {
        "model_index.json": dict(_class_name=kind),
        "text_encoder/config.json": tower(768, 12, 12)
        | dict(max_position_embeddings=77, vocab_size=49_408),
        "text_proj/config.json": dict(
            clip_embeddings_dim=768,
            time_embed_dim=1280,
            cross_attention_dim=1536,
            clip_extra_context_tokens=4,
        ),
        "decoder/config.json": decoder | unet([False, True, True, True], 64),
        "decoder_scheduler/scheduler_config.json": scheduler("epsilon", "learned_range"),
        "super_res_first/config.json": upsampler,
        "super_res_last/config.json": upsampler,
        "super_res_scheduler/scheduler_config.json": scheduler("epsilon", "fixed_small_log"),
    }
    if kind == "UnCLIPPipeline":
        found["prior/config.json"] = prior
        told = scheduler("sample", "fixed_small_log", clip_sample_range=5.0)
        return found | {"prior_scheduler/scheduler_config.json": told}
    found["image_encoder/config.json"] = tower(1024, 24, 16) | dict(image_size=224, patch_size=14)
    return found | {"feature_extractor/preprocessor_config.json": preprocessor}


def write_settings(folder: Path, kind: str) -> Path:
    for name, told in settings(kind).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(told), encoding="utf-8")
    return folder


def config(stage: str):
    given = importlib.import_module(f"configs.{stage}").get_config("karlo")
    return build.complete(build.beside_clip(build.complete(given), f"configs/{stage}.py:karlo"))


@pytest.fixture(scope="module")
def entries(tmp_path_factory) -> dict:
    """What import makes of Karlo's settings; CLIP's of the pipeline that has both towers."""
    found = {}
    for kind in ("UnCLIPPipeline", "UnCLIPImageVariationPipeline"):
        folder = write_settings(tmp_path_factory.mktemp(kind), kind)
        found |= {stage.name: stage.entry for stage in karlo_diffusers.stages(folder)}
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
    assert network(stage, to_json_values(said.model)) == network(stage, entry["model"])
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

"""Karlo's own layout: every tensor's place at its real size, there and back, what is missing."""

import math

import jax
import numpy as np
import pytest
from flax import traverse_util

from dalle2_jax.errors import UserError
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.nets.upsampler import Upsampler
from dalle2_jax.pretrained import karlo_diffusers, names, names_adm, recognise

SMALL = dict(channels=32, channel_mults=[1, 2, 4], num_blocks=2, attention_levels=[1, 2])
FULL = dict(channels=320, channel_mults=[1, 2, 3, 4], num_blocks=3, attention_levels=[1, 2, 3])
SHARED = dict(head_channels=64, groups=32)


def stages(size: str) -> dict:
    """{stage: (network, its rules)}; the full prior has but 2 of its 20 layers, all alike."""
    section, width, depth, dim, wide = {
        "small": (SMALL, 128, 3, 32, 40),
        "full": (FULL, 2048, 2, 768, 1536),
    }[size]
    decoder = section | SHARED | {"scale_shift": True}
    upsampler = section | SHARED | {"attention_levels": [], "scale_shift": False}
    prior = karlo_diffusers.prior_entry(dim, 77, width, depth, width // 64)["model"]
    model = karlo_diffusers.decoder_entry(dim, 77, decoder, 4, wide, 64)["model"]
    return {
        "prior": (
            DiffusionPrior(**prior),
            [*names_adm.PRIOR, ("0", "mean", names.SAME), ("1", "std", names.SAME)],
        ),
        "decoder": (Decoder(**model), [*names_adm.unet(decoder), *names_adm.conditions(4)]),
        "upsampler": (Upsampler(upsampler), names_adm.unet(upsampler)),
    }


def shapes(network, text_width: int) -> dict:
    inputs = network.init_inputs(*(() if isinstance(network, Upsampler) else (text_width,)))
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs))["params"]
    return traverse_util.flatten_dict(params, sep=".")


@pytest.mark.parametrize("stage", ["prior", "decoder", "upsampler"])
def test_every_parameter_has_one_name_there_and_comes_back_bit_for_bit(stage):
    network, rules = stages("small")[stage]
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=x.shape) for name, x in shapes(network, 32).items()}
    there = list(names.to_theirs(rules, params, params.__getitem__))
    found = dict(there)
    assert len(found) == len(there)
    again = names.to_ours(rules, found, found.__getitem__)
    assert sorted(again.names) == sorted(params) and not again.unknown
    for name, tensor in params.items():
        np.testing.assert_array_equal(again.tensor(name), tensor)


# As the original's networks have them, built by its own code at the size of its configs.
PLACES = {
    "prior": {
        "prd_emb": (1, 1, 2048),
        "positional_embedding": (1, 81, 2048),
        "transformer.resblocks.1.attn.c_qkv.weight": (6144, 2048),
        "transformer.resblocks.0.mlp.c_fc.bias": (8192,),
    },
    "decoder": {
        "cf_param": (768,),
        "clip_tok_proj.weight": (6144, 768),
        "text_seq_proj.1.weight": (1536,),
        "input_blocks.4.0.in_layers.2.weight": (320, 320, 3, 3),  # halves
        "input_blocks.5.0.skip_connection.weight": (640, 320, 1, 1),
        "input_blocks.15.1.encoder_kv.weight": (2560, 1536, 1),
        "middle_block.1.qkv.bias": (3840,),
        "middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
        "output_blocks.3.2.emb_layers.1.weight": (2560, 1280),  # doubles
        "output_blocks.11.1.proj_out.weight": (640, 640, 1),
        "output_blocks.12.0.in_layers.2.weight": (320, 960, 3, 3),
        "output_blocks.15.0.in_layers.2.weight": (320, 640, 3, 3),
        "out.2.bias": (6,),
    },
    "upsampler": {
        "input_blocks.0.0.weight": (320, 6, 3, 3),
        "middle_block.1.in_layers.0.weight": (1280,),
        "output_blocks.3.1.emb_layers.1.weight": (1280, 1280),
        "out.2.weight": (3, 320, 3, 3),
    },
}
PARAMETERS = {
    "prior": 1_022_028_544 + 2 * 768 - 18 * (12 * 2048**2 + 13 * 2048),
    "decoder": 885_439_686 + 7_878_400,
    "upsampler": 691_579_523,
}


@pytest.mark.parametrize("stage", PLACES)
def test_at_its_real_size_every_tensor_has_its_place(stage):
    network, rules = stages("full")[stage]
    # one byte, seen as a whole tensor
    params = {
        name: np.broadcast_to(np.int8(0), x.shape) for name, x in shapes(network, 768).items()
    }
    there = {
        name: tensor.shape for name, tensor in names.to_theirs(rules, params, params.__getitem__)
    }
    assert {name: there.get(name) for name in PLACES[stage]} == PLACES[stage]
    assert sum(math.prod(shape) for shape in there.values()) == PARAMETERS[stage]
    if stage != "prior":
        assert names_adm.unet_section(there) == dict(network.unet)


def test_each_heads_q_k_and_v_lie_side_by_side_there():
    there = np.arange(2 * 3 * 64 * 5).reshape(2, 3, 64, 5)  # heads, parts, channels of a head
    rules = [rule for rule in names_adm.ATTENTION if rule[0] == "qkv.weight"]
    given = {"qkv.weight": there.reshape(-1, 5, 1)}
    found = names.to_ours(rules, given, given.__getitem__)
    for part, name in enumerate("qkv"):
        kernel = found.tensor(f"{name}.kernel")
        np.testing.assert_array_equal(kernel.T.reshape(2, 64, 5), there[:, part])


@pytest.fixture
def karlo(tmp_path):
    """A folder with files of Karlo's names."""
    for name in ("prior-a.ckpt", "decoder-a.ckpt", "improved-sr-a.ckpt", "ViT-L-14_stats.th"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("missing", ["prior*.ckpt", "decoder*.ckpt", "improved-sr*.ckpt", "*.th"])
def test_a_file_that_is_missing_is_told(karlo, missing):
    (path,) = karlo.glob(missing)
    path.unlink()
    with pytest.raises(UserError) as caught:
        recognise.stages(karlo)
    name = "*stats.th" if missing == "*.th" else missing
    assert str(caught.value) == f"{karlo}/{name} is missing: copy the whole model again"


def test_two_files_of_one_network_are_told(karlo):
    (karlo / "prior-b.ckpt").touch()
    with pytest.raises(UserError, match=r"prior\*.ckpt are 2 files: leave one of them there"):
        recognise.stages(karlo)


def test_without_clip_it_is_told_what_to_put_there(karlo):
    with pytest.raises(UserError, match=r"ViT-L-14\.pt is missing: put OpenAI's file or"):
        recognise.stages(karlo)


def test_a_folder_of_nothing_is_told(tmp_path):
    with pytest.raises(UserError, match=r"is no model .*: none of model_index\.json"):
        recognise.stages(tmp_path)

"""Karlo's own checkpoints, imported, against its networks written again, and against diffusers."""

import os
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent))

import original_karlo  # noqa: E402
from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel  # noqa: E402
from flax import traverse_util  # noqa: E402

from dalle2_jax import DALLE2, pretrained  # noqa: E402
from dalle2_jax.errors import UserError  # noqa: E402
from dalle2_jax.nets.forward import forward  # noqa: E402
from dalle2_jax.pretrained import names, names_openai  # noqa: E402
from dalle2_jax.pretrained import names_diffusers as tables  # noqa: E402
from dalle2_jax.pretrained.convert import import_model  # noqa: E402
from dalle2_jax.sampling import load  # noqa: E402
from dalle2_jax.storage import model_folder  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4  # of the output's scale
T = torch.tensor([3, 900])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("karlo")


@pytest.fixture(scope="module")
def both(folder):
    """({their stage: module}, our model)"""
    theirs = original_karlo.write(folder)
    import_model(folder, folder / "ours")
    return theirs, DALLE2.from_pretrained(str(folder / "ours"))


def normal(*shape):
    rng = np.random.default_rng(sum(shape))
    return torch.tensor(rng.standard_normal(shape).astype(np.float32))


def to_ours(x):
    x = x.detach().numpy()
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def assert_close(ours, theirs):
    assert np.shape(ours) == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= TOLERANCE * np.abs(theirs).max()


CAPTION = {
    "z_txt": normal(2, 32),
    "hidden": normal(2, 77, 32),
    "mask": torch.arange(77)[None] < torch.tensor([[5], [77]]),
}
TOLD = {"txt_enc": "hidden", "txt_mask": "mask", "z_txt": "z_txt"}


def renamed(rules, params) -> dict:
    """Our parameters in diffusers' layout."""
    flat = traverse_util.flatten_dict(params, sep=".")
    return {name: torch.tensor(x) for name, x in names.to_theirs(rules, flat, flat.__getitem__)}


def test_prior(both):
    theirs, ours = both
    x = normal(2, 32)
    expected = to_ours(theirs["prior"].model(x, T, **CAPTION))
    args = (CAPTION[name].numpy() for name in ("z_txt", "hidden", "mask"))
    params = ours.cascade.params["prior"]
    assert_close(forward(ours.cascade.prior.network, params, x.numpy(), T.numpy(), *args), expected)
    mean, std = theirs["statistics"]
    found = forward(ours.cascade.prior.network, params, x.numpy(), method="to_z_img")
    assert_close(found, to_ours(x * std + mean))

    again = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=64, num_layers=3, embedding_dim=32
    )
    again.load_state_dict(renamed(tables.PRIOR, params), strict=True)
    told = {"proj_embedding": CAPTION["z_txt"], "encoder_hidden_states": CAPTION["hidden"]}
    told |= {"timestep": T, "attention_mask": CAPTION["mask"]}
    assert_close(to_ours(again.eval()(x, **told).predicted_image_embedding), expected)
    assert_close(to_ours(again.post_process_latents(x)), to_ours(x * std + mean))


def test_decoder(both):
    theirs, ours = both
    x, z_img = normal(2, 3, 16, 16), normal(2, 32)
    expected = to_ours(theirs["decoder"].model(x, T, z_img=z_img, **CAPTION))
    cond = {ours: CAPTION[theirs].numpy() for ours, theirs in TOLD.items()}
    cond |= {"z_img": z_img.numpy(), "z_mask": np.ones(2, bool)}
    params = ours.cascade.params["decoder"]
    network = ours.cascade.decoder.network
    assert_close(forward(network, params, to_ours(x), T.numpy(), cond, False), expected)

    null = theirs["decoder"].model.cf_param.expand(2, -1)
    unguided = forward(
        network, params, to_ours(x), T.numpy(), cond | {"z_mask": jnp.zeros(2, bool)}, False
    )
    assert_close(unguided, to_ours(theirs["decoder"].model(x, T, z_img=null, **CAPTION)))

    down = ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 2)
    unet = diffusers.UNet2DConditionModel(
        in_channels=3,
        out_channels=6,
        down_block_types=down,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        cross_attention_dim=original_karlo.CONTEXT_WIDTH,
        attention_head_dim=64,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    text = UnCLIPTextProjModel(
        clip_embeddings_dim=32, time_embed_dim=128, cross_attention_dim=original_karlo.CONTEXT_WIDTH
    )
    beside = {name: x for name, x in params.items() if name not in ("unet", "time")}
    inside = {name: params[name] for name in ("unet", "time")}
    unet.load_state_dict(renamed(tables.UNET, inside), strict=True)
    text.load_state_dict(renamed(tables.text_projection(original_karlo.EXTRA), beside), strict=True)
    context, added = text(
        image_embeddings=z_img,
        prompt_embeds=CAPTION["z_txt"],
        text_encoder_hidden_states=CAPTION["hidden"],
        do_classifier_free_guidance=False,
    )
    mask = torch.nn.functional.pad(CAPTION["mask"], (original_karlo.EXTRA, 0), value=True)
    told = {"encoder_hidden_states": context, "class_labels": added, "attention_mask": mask}
    assert_close(to_ours(unet.eval()(x, timestep=T, **told).sample), expected)


@pytest.mark.parametrize("part", ["first", "last"])
def test_upsampler(both, part):
    theirs, ours = both
    x, low = normal(2, 3, 32, 32), normal(2, 3, 32, 32)
    module = {"first": "model_first_steps", "last": "model_last_step"}[part]
    expected = to_ours(getattr(theirs["improved-sr"], module)(x, T, low))
    params = ours.cascade.params["upsampler_256"][part]
    network = ours.cascade.upsamplers["upsampler_256"].network
    found = forward(network, params, to_ours(x), T.numpy(), to_ours(low), False)
    assert_close(found, expected)

    again = diffusers.UNet2DModel(
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=2,
        add_attention=False,
    )
    again.load_state_dict(renamed(tables.UNET, params), strict=True)
    found = again.eval()(torch.cat([x, low], dim=1), timestep=T).sample
    assert_close(to_ours(found), expected)


def test_settings_are_the_original_codes(both):
    _, ours = both
    assert ours.cascade.prior.settings.clip == ("static", 10.0) and ours.image_size == 256
    assert ours.cascade.decoder.network.unet["attention_levels"] == (1, 2)
    steps = {name: settings["steps"] for name, settings in ours.settings().items()}
    assert steps == {"prior": 25, "decoder": 25, "upsampler_256": 7}


def as_openai_saved(tensors, path):
    """A torchscript archive with those tensors, by their dotted names."""
    root = torch.nn.Module()
    for name, tensor in tensors:
        *places, last = name.split(".")
        module = root
        for place in places:
            if not hasattr(module, place):
                module.add_module(place, torch.nn.Module())
            module = getattr(module, place)
        module.register_buffer(last, torch.tensor(tensor))
    torch.jit.save(torch.jit.script(root), str(path))


def test_openais_own_clip_beside_the_checkpoints_serves_as_well(
    both, folder, tmp_path, monkeypatch
):
    """With the image tower that training wants; the text tower is the one of `text_encoder`."""
    _, ours = both
    model = model_folder.read_stage(folder / "ours", "clip")["model"]
    model["image"] = {**model["text"], "image_size": 16, "patch_size": 8}
    del model["image"]["context_length"], model["image"]["vocab_size"]
    channels = model["text"]["width"] // model["text"]["heads"]
    monkeypatch.setattr(pretrained.clip, "HEAD_CHANNELS", channels)  # 64 in all of OpenAI's
    shapes = load.expected_params({"clip": {"model": model}}, "clip", "test")
    flat = traverse_util.flatten_dict(shapes, sep=".")
    kept = traverse_util.flatten_dict(model_folder.read_params(folder / "ours", "clip"), sep=".")
    tensors = {name: np.asarray(kept.get(name, np.ones(x.shape))) for name, x in flat.items()}
    tensors["logit_scale"] = np.float32(1.0)
    found = names.to_theirs(
        names_openai.CLIP, tensors, lambda name: tensors[name].astype(np.float32)
    )
    shutil.copytree(folder, tmp_path / "k", ignore=shutil.ignore_patterns("ours", "text_encoder"))
    as_openai_saved(found, tmp_path / "k/ViT-L-14.pt")
    import_model(tmp_path / "k", tmp_path / "ours")
    again = DALLE2.from_pretrained(str(tmp_path / "ours"))
    assert again.cascade.clip.image is not None and not again.cascade.clip.unit_length
    captions = ["a red apple", "dog"]
    np.testing.assert_array_equal(again.encode_text(captions), ours.encode_text(captions))


PRIOR, DECODER = (f"{name}-ckpt-step=01000000-of-01000000.ckpt" for name in ("prior", "decoder"))


@pytest.fixture
def harmed(both, folder, tmp_path):
    """A copy of the checkpoints."""
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("ours"))
    return tmp_path / "copy"


def told(source) -> str:
    with pytest.raises(UserError) as caught:
        import_model(source, source / "ours")
    assert "\n" not in str(caught.value) and not (source / "ours").exists()
    return str(caught.value)


@pytest.mark.parametrize("name", [PRIOR, DECODER, "improved*.ckpt", "ViT-L-14_stats.th"])
def test_a_file_that_is_cut_short_is_told(harmed, name):
    (path,) = harmed.glob(name)
    for size in (path.stat().st_size // 2, 1, 0):
        os.truncate(path, size)
        assert path.name in (message := told(harmed)) and "copy it again" in message


def test_another_networks_checkpoint_is_told(harmed):
    shutil.copy(harmed / PRIOR, harmed / DECODER)
    expected = f"{harmed / DECODER} is another network: 'input_blocks.0.0.weight' is missing"
    assert told(harmed) == expected
    shutil.copy(harmed / DECODER, harmed / "prior-ckpt-step=01000000-of-01000000.ckpt")
    torch.save({"weight": torch.zeros(2)}, harmed / PRIOR)
    assert f"{harmed / PRIOR} is another network" in told(harmed)


def test_tensors_of_other_shapes_are_told(harmed):
    found = torch.load(harmed / DECODER)
    found["state_dict"]["model.middle_block.1.qkv.weight"] = torch.zeros(100, 128, 1)
    torch.save(found, harmed / DECODER)
    message = told(harmed)
    assert "decoder/model.middle_block.1.qkv.weight is of another network" in message
    found["state_dict"]["model.middle_block.1.qkv.weight"] = torch.zeros(192, 128, 1)
    torch.save(found, harmed / DECODER)
    assert "unet.middle_attention.k.kernel is (128, 64), not (128, 128)" in told(harmed)


def test_a_layer_that_is_not_as_the_others_is_told(harmed):
    found = torch.load(harmed / PRIOR)
    found["state_dict"]["model.transformer.resblocks.1.ln_1.weight"] = torch.zeros(5)
    torch.save(found, harmed / PRIOR)
    message = told(harmed)
    assert "resblocks.1.ln_1.weight is of another network: its shape (5,)" in message


def test_an_older_file_of_torchs_and_bare_tensors_are_read_too(harmed):
    found = torch.load(harmed / PRIOR)["state_dict"]
    torch.save(found, harmed / PRIOR, _use_new_zipfile_serialization=False)
    import_model(harmed, harmed / "ours")
    assert (harmed / "ours" / "prior.safetensors").is_file()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_not_run(harmed, tmp_path):
    found = torch.load(harmed / DECODER)
    torch.save(found | {"callbacks": Malicious(tmp_path / "ran")}, harmed / DECODER)
    message = told(harmed)
    assert message.startswith(f"{harmed / DECODER} holds more than weights (")
    assert not (tmp_path / "ran").exists()

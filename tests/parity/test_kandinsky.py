"""Kandinsky's prior and CLIP, imported, against diffusers' pipelines fed with the same noise."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent))

import small_unclip  # noqa: E402
import transformers  # noqa: E402
from diffusers.schedulers import scheduling_unclip  # noqa: E402

from dalle2_jax import DALLE2  # noqa: E402
from dalle2_jax.errors import UserError  # noqa: E402
from dalle2_jax.nets.conditioning import prior_condition  # noqa: E402
from dalle2_jax.nets.forward import forward  # noqa: E402
from dalle2_jax.pretrained.convert import import_model  # noqa: E402
from dalle2_jax.sampling import load  # noqa: E402
from dalle2_jax.sampling.stage import finish  # noqa: E402
from dalle2_jax.tokenizer import Tokenizer  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4  # of the output's scale
PROMPTS = ["a red apple", "two small cats on a very long and winding road by the sea"]


@pytest.fixture(scope="module", params=["KandinskyV22PriorPipeline", "KandinskyPriorPipeline"])
def both(request, tmp_path_factory):
    """(their pipeline, our model's folder)"""
    folder = tmp_path_factory.mktemp("kandinsky")
    torch.manual_seed(3)
    images = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    theirs = getattr(diffusers, request.param)(
        prior=small_unclip.prior(),
        text_encoder=small_unclip.text_encoder(hidden_act="gelu"),
        image_encoder=small_unclip.image_encoder(hidden_act="gelu"),
        tokenizer=small_unclip.tokenizer(folder / "tokenizer"),
        scheduler=diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0),
        image_processor=transformers.CLIPImageProcessor(**images),
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "theirs")
    import_model(folder / "theirs", folder / "ours")
    return theirs, folder / "ours"


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def test_z_img_of_one_noise(both, monkeypatch):
    theirs, folder = both
    clip, clip_params = load.network(folder, "clip"), load.params(folder, "clip")
    prior, params = load.sampler(folder, "prior", clip), load.params(folder, "prior")
    steps, count = prior.settings.steps, len(PROMPTS)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((steps + 1, count, 32)).astype(np.float32)
    queue = list(torch.tensor(noise[1:-1]))  # theirs draws none for the last step
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda *a, **k: queue.pop(0))
    # In float32, as their tables are, 1 - alpha_bar at t = 0 is wrong by 0.05 %.
    bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    alphas = torch.tensor(np.maximum(bar[1:] / bar[:-1], 1 - 0.999))
    tables = {"alphas": alphas, "betas": 1 - alphas, "alphas_cumprod": alphas.cumprod(0)}
    for name, table in tables.items():
        monkeypatch.setattr(theirs.scheduler, name, table)
    expected = theirs(PROMPTS, latents=torch.tensor(noise[0])).image_embeds.numpy()
    tokenizer = Tokenizer()
    text, empty = (
        forward(clip, clip_params, tokenizer(captions), method="encode_text")
        for captions in (PROMPTS, [""] * count)
    )
    keys = jax.random.split(jax.random.key(0), count)
    condition = prior_condition(prior.network, text, empty)
    found = finish(prior(params, condition, keys, noise=noise))
    assert not queue and steps == 25 and prior.settings.clip == ("static", 10.0)
    assert_close(found, expected)


def test_image(both):
    theirs, folder = both
    clip, params = load.network(folder, "clip"), load.params(folder, "clip")
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    mean, std = np.array(clip.image["mean"]), np.array(clip.image["std"])
    x = ((np.moveaxis(pixels, 1, -1) * std + mean) * 2 - 1).astype(np.float32)
    expected = theirs.image_encoder(torch.tensor(pixels)).image_embeds.detach().numpy()
    assert_close(forward(clip, params, x, method="encode_image"), expected)


def test_it_cannot_draw_and_says_so(both):
    told = "has no stage 'decoder'; it has: clip, prior$"
    with pytest.raises(UserError, match=told):
        DALLE2.from_pretrained(str(both[1]))

"""configs/*.py: every variant builds, and `paper` is Table 3 of the unCLIP paper."""

import functools
import importlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dalle2_jax import build
from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.storage import model_folder

VARIANTS = {
    "clip": ("paper", "tpu", "tiny", "judge", "b32", "b16", "l14", "karlo"),
    "prior": ("paper", "tpu", "karlo", "tiny"),
    "ar_prior": ("paper", "tpu", "tiny"),
    "decoder": ("paper", "tpu", "karlo", "inpaint", "tiny"),
    "upsampler_256": ("paper", "tpu", "karlo", "inpaint", "tiny"),
    "upsampler_1024": ("paper", "tpu", "inpaint", "tiny"),
}
ALL = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]


def get(name: str, variant: str = "paper", **changes):
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    for path, value in changes.items():
        section, _, key = path.partition("__")
        with config.ignore_type():
            config[section][key] = value
    return config


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """variant -> a model folder whose CLIP is known by its config alone."""
    folders = {}
    for variant in ("paper", "tpu", "karlo", "tiny"):
        folder = tmp_path_factory.mktemp(variant)
        entry, params = build.task(build.complete(get("clip", variant))).export({"x": jnp.zeros(1)})
        model_folder.write_stage(folder, "clip", entry, params)
        folders[variant] = str(folder)
    return folders


FROZEN = ("prior", "ar_prior", "decoder")  # what learns on a trained CLIP


def task(clips, name, variant="paper", **changes):
    config = get(name, variant, **changes)
    if name in FROZEN:
        config.clip_from = clips[clip_of(variant)]
    return build.task(build.complete(config))


def clip_of(variant: str) -> str:
    return "paper" if variant == "inpaint" else variant


_SHAPES = {}


def shapes(task):
    """The parameters' shapes; a network of paper size takes seconds to trace, so only once."""
    key = repr(task)
    if key not in _SHAPES:
        _SHAPES[key] = jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0)))
    return _SHAPES[key]


def count(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


# Tracing a loss at full size takes seconds; the other variants repeat it with other sizes.
QUICK = ("paper", "tiny", "judge")
VARIANT_CASES = [
    pytest.param(*case, marks=() if case[1] in QUICK else pytest.mark.slow) for case in ALL
]


@pytest.mark.parametrize(("name", "variant"), VARIANT_CASES)
def test_every_variant_builds_its_network(clips, name, variant):
    made = task(clips, name, variant)
    assert made.stage == (name if "upsampler" not in name else f"upsampler_{made.image_size}")
    params = shapes(made)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    # The very loss that a run would compute, at its own sizes.
    config = build.complete(get(name, variant))
    size, length = config.data.image_size, config.data.get("context_length", 77)
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8),
        "tokens": jax.ShapeDtypeStruct((config.batch_size, length), jnp.int32),
    }
    frozen = (
        {"clip": shapes(task(clips, "clip", clip_of(variant)))}
        if config.task.name in FROZEN
        else {}
    )
    loss = functools.partial(made.loss, train=True)
    key = jax.eval_shape(lambda: jax.random.key(0))
    value, metrics = jax.eval_shape(loss, params, frozen, batch, key)
    assert {x.shape for x in (value, *metrics.values())} == {()} and value.dtype == jnp.float32


def test_parameters_of_table_3(clips):
    """The paper prints 3.5B, 1B, 700M and 300M. Its own shapes give the first within 3 %; for the
    others they give 1.21B, 730M and 282M, so those, counted by hand, are what is held to 3 %."""
    decoder = shapes(task(clips, "decoder"))
    assert count(decoder["unet"]) == pytest.approx(2.24e9, rel=0.03)
    assert count(decoder["text"]["transformer"]) == pytest.approx(1.21e9, rel=0.03)
    assert count(decoder) == pytest.approx(3.5e9, rel=0.03)
    # a block of width w: 4 w^2 of attention, 8 w^2 of the two layers after it
    prior = shapes(task(clips, "prior"))
    assert count(prior) == pytest.approx(24 * 12 * 2048**2, rel=0.03)
    # "1B" is either Table 3's text encoder (1.21B, as the decoder's) or its latent decoder, which
    # is what is trained here; the two together would be 2.0B
    ar_prior = shapes(task(clips, "ar_prior"))
    assert count(ar_prior["transformer"]) == 24 * (12 * 1664**2 + 13 * 1664)
    assert count(ar_prior) == pytest.approx(24 * 12 * 1664**2, rel=0.03)
    assert round(count(ar_prior) / 1e9) == 1
    assert count(shapes(task(clips, "upsampler_256"))) == pytest.approx(730e6, rel=0.03)
    assert count(shapes(task(clips, "upsampler_1024"))) == pytest.approx(282e6, rel=0.03)


@pytest.mark.parametrize("name", ["decoder", "upsampler_256", "upsampler_1024"])
def test_inpainting_adds_one_layer_to_the_papers_network(clips, name):
    made, paper = (task(clips, name, variant) for variant in ("inpaint", "paper"))
    taught, before = shapes(made), shapes(paper)
    added = taught["unet"].pop(made.optional_layer)
    assert taught == before
    assert [x.shape for x in jax.tree.leaves(added)] == [(3, 3, 4, made.network.unet["channels"])]


def test_the_second_tiny_upsampler_begins_where_the_first_ends_and_is_small(clips):
    first, second = (task(clips, f"upsampler_{n}", "tiny") for n in (256, 1024))
    assert (first.image_size, second.image_size) == (second.low_size, 1024)
    assert 2 * count(shapes(second)) < 3.6e6  # bytes in float16: what the package has room for


@pytest.mark.parametrize(("name", "variant"), [x for x in ALL if x[1] not in ("tiny", "judge")])
def test_hardly_a_weight_is_whole_on_every_chip(clips, name, variant):
    """At most 2 % of the bytes: a table that no rule splits would be paid for on each chip."""
    params = shapes(task(clips, name, variant))
    config = build.complete(get(name, variant))
    places = sharding.param_shardings(
        params, config.sharding_rules, sharding.make_mesh({"fsdp": 8})
    )
    assert sharding.replicated_bytes_fraction(params, places) <= 0.02


ORIGINAL_CLIPS = {  # image tower, text tower, both with their projections; all with the temperature
    "b32": (87_849_216, 63_428_096, 151_277_313),
    "b16": (86_192_640, 63_428_096, 149_620_737),
    "l14": (303_966_208, 123_650_304, 427_616_513),
}


@pytest.mark.parametrize("variant", ORIGINAL_CLIPS)
def test_original_clips_have_the_published_parameters(clips, variant):
    """Counted in OpenAI's published weights; 2103.00020, tables 18 to 20, for their training."""
    params = shapes(task(clips, "clip", variant))
    towers = count(params["image_tower"]), count(params["text_tower"])
    assert (*towers, count(params)) == ORIGINAL_CLIPS[variant]
    config = build.complete(get("clip", variant))
    optimizer = config.optimizer
    assert optimizer.learning_rate == (4e-4 if variant == "l14" else 5e-4)
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.98, 1e-6)
    assert (optimizer.weight_decay, optimizer.warmup_steps) == (0.2, 2000)
    assert (config.batch_size, config.num_steps) == (32_768, 32 * 400_000_000 // 32_768)
    assert (config.model.activation, config.task.sam_rho) == ("quick_gelu", 0.0)


def test_clip_of_unclip(clips):
    """H/16 at 256 px trained by SAM (unCLIP, appendix C); the count is of its shapes, by hand: a
    block of width w has 12 w^2 + 13 w, and so on."""
    params, config = shapes(task(clips, "clip")), build.complete(get("clip"))
    image = 32 * (12 * 1280**2 + 13 * 1280) + (16 * 16 * 3 + 257 + 1 + 4 + 1024) * 1280
    text = 24 * (12 * 1024**2 + 13 * 1024) + (49_408 + 77 + 2 + 1024) * 1024
    assert (count(params["image_tower"]), count(params["text_tower"])) == (image, text)
    assert (config.task.sam_rho, config.task.sam_replica_batch) == (0.1, 64)
    assert (config.optimizer.learning_rate, config.batch_size) == (3e-4, 32_768)
    assert build.complete(get("clip", "tiny")).task.sam_rho == 0


TABLE_3: dict[
    str, tuple
] = {  # lr, batch, iterations, b2, eps, weight decay, EMA, schedule, sampling steps
    "prior": (1.1e-4, 4096, 600_000, 0.96, 1e-6, 6.0e-2, 0.9999, "cosine", 64),
    "ar_prior": (1.6e-4, 4096, 1_000_000, 0.91, 1e-10, 4.0e-2, 0.999, None, None),
    "decoder": (1.2e-4, 2048, 800_000, 0.999, 1e-8, 0.0, 0.9999, "cosine", 250),
    "upsampler_256": (1.2e-4, 1024, 1_000_000, 0.999, 1e-8, 0.0, 0.9999, "cosine", 27),
    "upsampler_1024": (1.0e-4, 512, 1_000_000, 0.999, 1e-8, 0.0, 0.9999, "linear", 15),
}


@pytest.mark.parametrize("name", TABLE_3)
def test_training_of_table_3(name):
    config = build.complete(get(name))
    optimizer = config.optimizer
    assert (
        optimizer.learning_rate,
        config.batch_size,
        config.num_steps,
        optimizer.b2,
        optimizer.eps,
        optimizer.weight_decay,
        config.ema_decay,
        config.diffusion.get("schedule"),
        config.task.sampling.get("steps"),
    ) == TABLE_3[name]
    assert (optimizer.b1, config.diffusion.get("num_timesteps", 1000)) == (0.9, 1000)
    assert (optimizer.warmup_steps, optimizer.schedule) == (0, "constant")


def test_networks_of_table_3():
    unet = get("decoder").model.unet
    assert (unet.channels, unet.channel_mults, unet.num_blocks) == (512, (1, 2, 3, 4), 3)
    assert (unet.head_channels, unet.dropout) == (64, 0.1)
    assert [64 // 2**level for level in unet.attention_levels] == [32, 16, 8]
    text = get("decoder").model.text
    assert (text.context_length, text.width, text.depth, text.heads) == (256, 2048, 24, 32)
    unet = get("upsampler_256").model.unet
    assert (unet.channels, unet.channel_mults, unet.num_blocks) == (320, (1, 2, 3, 4), 3)
    assert unet.dropout == 0.1
    unet = get("upsampler_1024").model.unet
    assert (unet.channels, unet.channel_mults, unet.num_blocks) == (192, (1, 1, 2, 2, 4, 4), 2)
    for name in ("upsampler_256", "upsampler_1024"):
        assert get(name).task.crop_fraction == 0.25
        assert "attention_levels" not in get(name).model.unet
    prior = get("prior").model
    assert (prior.width, prior.depth, prior.heads) == (2048, 24, 32)
    latent = get("ar_prior").model
    assert (latent.width, latent.depth, latent.heads) == (1664, 24, 26)


def test_facts_of_section_2():
    """Drop rates, embedding scale and degradations (unCLIP sections 2.1 and 2.2)."""
    assert (get("decoder").task.drop_z_img, get("decoder").task.drop_caption) == (0.1, 0.5)
    assert (get("prior").task.drop_caption, get("prior").task.embedding_scale) == (0.1, 17.2)
    assert (get("ar_prior").model.dims, get("ar_prior").model.buckets) == (319, 1024)
    assert get("ar_prior").task.drop_caption == 0.1
    assert get("ar_prior").task.sampling.dot_share == 0.5
    assert get("upsampler_256").task.blur_sigma == 0.6
    assert get("upsampler_1024").task.degradation == "bsr"
    assert get("decoder").diffusion.learned_variance
    assert get("prior").diffusion.prediction == "x_0"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_wrong_variant_names_those_there_are(name):
    with pytest.raises(ValueError, match=f"{name} has no variant 'tinny': paper, tpu"):
        get(name, "tinny")


@pytest.mark.parametrize("name", VARIANTS)
def test_tpu_widths_fill_the_lanes(name):
    model = get(name, "tpu").model
    sections = [model, *(model[part] for part in ("image", "text", "unet") if part in model)]
    widths = [s[key] for s in sections for key in ("dim", "width", "channels") if key in s]
    assert widths and all(width % 128 == 0 for width in widths)


@pytest.mark.parametrize(
    ("name", "change", "near"),
    [
        ("clip", {"model__dmi": 3}, "dim"),
        ("clip", {"task__max_shft": 3}, "max_shift"),
        ("prior", {"model__widht": 3}, "width"),
        ("prior", {"diffusion__scedule": "cosine"}, "schedule"),
        ("prior", {"task__drop_captoin": 0.1}, "drop_caption"),
        ("ar_prior", {"model__bukets": 3}, "buckets"),
        ("decoder", {"task__drop_zimg": 0.1}, "drop_z_img"),
        ("decoder", {"model__txt": None}, "text"),
        ("upsampler_256", {"task__blur_sigm": 0.1}, "blur_sigma"),
        ("upsampler_256", {"diffusion__predction": "v"}, "prediction"),
    ],
)
def test_unknown_keys_name_the_near_miss(clips, name, change, near):
    with pytest.raises(UserError, match=f"unknown key .* did you mean '{near}'"):
        task(clips, name, "tiny", **change)


def test_unknown_keys_inside_the_network_are_refused(clips):
    config = get("upsampler_256", "tiny")
    config.model.unet.chanels = 3
    with pytest.raises(UserError, match="did you mean 'channels'"):
        shapes(build.task(build.complete(config)))


def test_unknown_sampling_keys_are_refused(clips):
    config = get("upsampler_256", "tiny")
    config.task.sampling.step = 3
    with pytest.raises(UserError, match="did you mean 'steps'"):
        build.task(build.complete(config))


def test_tiny_stages_and_the_judging_share_one_subset():
    """The weights and their figures hold for this subset only."""
    tiny = [x for x in ALL if x[1] in ("tiny", "judge")]
    (subset,) = {get(name, variant).data.subset for name, variant in tiny}
    evals = (
        Path(build.__file__).parent / "cli/evals/flags.py"
    )  # importing it would define flags here
    assert f'"{subset}"' in evals.read_text()


def test_an_unknown_key_of_the_data_is_refused():
    from dalle2_jax.data import pipeline  # late: it loads TensorFlow

    config = get("clip", "tiny", data__img_size=3)
    with pytest.raises(UserError, match=r"'img_size'.* 'image_size'"):
        pipeline.make_dataset(build.complete(config).data, split="train", batch_size=4)

"""The decoder: CLIP's image embedding and a caption -> a small image (unCLIP 2.1, Table 3).

python train.py --config=configs/decoder.py:VARIANT --workdir=W --config.clip_from=CLIP_FOLDER

paper  3.5B parameters at 64 px, batch 2048, 800K steps. For a v5e-256: 1,600 chip-days, a week
       (by FLOPs at 40 % of the chip's peak, CLIP included, not measured)
tpu    the same: 512 channels and heads of 64 suit the TPU already
karlo  the decoder of kakaobrain/karlo-v1-alpha, 893M, sampled as there. For fine-tuning:
       --config.init_from=KARLO_FOLDER, and a Karlo with an image tower as CLIP_FOLDER
inpaint  `paper`, trained to regenerate erased regions of images (GLIDE 2.3). Starts from a trained
       decoder: --config.init_from=MODEL
tiny   5.6M parameters at 32 px, trained to inpaint too; 2 CPU cores, three and a half hours;
       loss 0.026
"""

from ml_collections import ConfigDict

from configs.shared.tiny_data import tiny_data


def get_config(variant="paper"):
    if variant == "tiny":
        return tiny()
    if variant in ("paper", "tpu"):
        return paper()
    if variant == "karlo":
        return karlo()
    if variant == "inpaint":
        return inpaint()
    raise ValueError(f"decoder has no variant {variant!r}: paper, tpu, karlo, inpaint, tiny")


def paper():
    return ConfigDict(
        dict(
            task=dict(
                name="decoder",
                image_size=64,
                drop_z_img=0.1,
                drop_caption=0.5,
                sampling=dict(steps=250, solver="ddpm", cfg_scale=3.0, clip=("static", 1.0)),
            ),
            model=dict(
                unet=dict(
                    channels=512,
                    channel_mults=(1, 2, 3, 4),
                    num_blocks=3,
                    attention_levels=(1, 2, 3),  # 32, 16 and 8 px
                    head_channels=64,
                    dropout=0.1,
                ),
                text=dict(
                    context_length=256,
                    vocab_size=49408,
                    width=2048,
                    depth=24,
                    heads=32,
                    remat="dots",
                ),
                dim=1024,
                context_length=256,
                learned_variance=True,
                dtype="bfloat16",
            ),
            diffusion=dict(
                schedule="cosine", num_timesteps=1000, prediction="eps", learned_variance=True
            ),
            data=dict(
                source="tfds", path="data/pairs", split="train", image_size=256, context_length=256
            ),
            optimizer=dict(learning_rate=1.2e-4, b2=0.999, eps=1e-8),
            batch_size=2048,
            num_steps=800_000,
            ema_decay=0.9999,
            preview_every=10_000,
            mesh=dict(data=1, fsdp=-1, tensor=1),
        )
    )


def karlo():
    config = paper()
    config.update_from_flattened_dict({"model.text": None})  # CLIP's text tower serves
    config.update(
        task=dict(sampling=dict(steps=25, cfg_scale=8.0)),
        model=dict(
            unet=dict(channels=320, dropout=0.0),
            dim=768,
            context_length=77,
            learned_null=False,
            text_projection=1536,
            z_txt_in_time=True,
            unit_length=False,
        ),
        data=dict(context_length=77),
        optimizer=dict(learning_rate=1e-5),
        batch_size=256,
        num_steps=10_000,
        ema_decay=0.999,
        preview_every=1000,
    )
    return config


def inpaint():
    """Not in the paper, and GLIDE tells no numbers: a tenth of the rate, an eighth of the steps."""
    config = paper()
    config.update(
        model=dict(inpaints=True), optimizer=dict(learning_rate=1.2e-5), num_steps=100_000
    )
    return config


def tiny():
    return ConfigDict(
        dict(
            task=dict(
                name="decoder",
                image_size=32,
                drop_z_img=0.1,
                drop_caption=0.25,  # read more often than the paper's, as the prior errs more
                noise_z_img=0.7,
                most_moved=0.5,
                sampling=dict(steps=5, solver="dpm++", cfg_scale=1.3, clip=("static", 1.0)),
            ),
            model=dict(
                unet=dict(
                    channels=80,
                    channel_mults=(1, 2),
                    num_blocks=1,
                    attention_levels=(1,),
                    head_channels=32,
                    groups=16,
                    patch_size=4,
                ),
                text=None,  # CLIP's text tower serves
                dim=192,
                context_length=24,
                learned_variance=False,
                inpaints=True,
            ),
            diffusion=dict(
                schedule="cosine",
                num_timesteps=1000,
                prediction="x_0",
                weighting="min_v_10",  # or it knows an image with next to no noise to 29 dB alone
            ),
            data=tiny_data(flip=True),
            optimizer=dict(
                learning_rate=1e-3,
                b2=0.99,
                warmup_steps=200,
                schedule="cosine",
                clip_norm=1.0,
            ),
            batch_size=128,
            num_steps=12_000,
            ema_decay=0.999,
            log_every=50,
            checkpoint_every=500,
            eval_every=1000,
            preview_every=500,
            export_every=500,
            export_dtype="float16",
        )
    )

"""The second upsampler: 256 -> 1024 px without text or guidance (unCLIP section 2.1, Table 3).

python train.py --config=configs/upsampler_1024.py:VARIANT --workdir=W

paper  300M parameters, trained on 256 px crops, batch 512, 1M steps, the small image corrupted by
       BSR degradation (dalle2_jax/imaging/degradation.py; "bsr_light" is latent diffusion's
       gentler one).
       For a v5e-64: 280 chip-days, four days (by FLOPs at 40 % of the chip's peak, not measured)
tpu    the same with 256 channels for 192: a multiple of the TPU's 128 lanes
inpaint  `paper`, trained to regenerate erased regions, as in upsampler_256.py. Starts from a
       trained upsampler: --config.init_from=MODEL
tiny   128 -> 1024 px, 1.7M parameters, trained on 256 px crops; 2 CPU cores, half an hour; loss
       0.006, 2.6 dB better than bicubic
"""

from ml_collections import ConfigDict

from configs.shared.tiny_data import tiny_data


def get_config(variant="paper"):
    if variant == "tiny":
        return tiny()
    if variant in ("paper", "tpu"):
        return paper(channels=192 if variant == "paper" else 256)
    if variant == "inpaint":
        return inpaint()
    raise ValueError(f"upsampler_1024 has no variant {variant!r}: paper, tpu, inpaint, tiny")


def paper(channels):
    return ConfigDict(
        dict(
            task=dict(
                name="upsampler",
                low_size=256,
                image_size=1024,
                crop_fraction=0.25,
                degradation="bsr",
                sampling=dict(steps=15, solver="ddim", clip=("static", 1.0)),
            ),
            model=dict(
                unet=dict(
                    channels=channels,
                    channel_mults=(1, 1, 2, 2, 4, 4),
                    num_blocks=2,
                    remat="dots",
                ),
                dtype="bfloat16",
            ),
            diffusion=dict(schedule="linear", num_timesteps=1000, prediction="eps"),
            data=dict(source="tfds", path="data/pairs", split="train", image_size=1024),
            optimizer=dict(learning_rate=1.0e-4, b2=0.999, eps=1e-8),
            batch_size=512,
            num_steps=1_000_000,
            ema_decay=0.9999,
            preview_every=10_000,
            preview_size=4,
            mesh=dict(data=1, fsdp=-1, tensor=1),
        )
    )


def inpaint():
    """Not in the paper, and GLIDE tells no numbers: a tenth of the rate, an eighth of the steps."""
    config = paper(channels=192)
    config.update(model=dict(inpaints=True), optimizer=dict(learning_rate=1e-5), num_steps=125_000)
    return config


def tiny():
    return ConfigDict(
        dict(
            task=dict(
                name="upsampler",
                low_size=128,
                image_size=1024,
                crop_fraction=0.25,
                degradation="bsr_light",
                degraded_share=0.5,  # of spoilt ones alone it learned to blur the true ones
                sampling=dict(steps=2, solver="ddim", clip=("static", 1.0)),
            ),
            model=dict(
                unet=dict(channels=64, channel_mults=(1, 1), num_blocks=1, groups=16, patch_size=8),
                residual=True,  # 64 channels have no room for the 192 numbers of a patch
            ),
            diffusion=dict(schedule="cosine", num_timesteps=1000, prediction="x_0"),
            data=tiny_data(path="data/emoji_1024", image_size=1024),
            optimizer=dict(
                learning_rate=1e-3,
                b2=0.99,
                warmup_steps=100,
                schedule="cosine",
                clip_norm=1.0,
            ),
            batch_size=16,
            num_steps=750,
            ema_decay=0.995,
            log_every=50,
            checkpoint_every=500,
            eval_every=500,
            preview_every=500,
            preview_size=2,
            export_every=500,
            export_dtype="float16",
        )
    )

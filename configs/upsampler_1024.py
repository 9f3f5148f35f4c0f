"""The second upsampler: 256 -> 1024 px without text or guidance (unCLIP section 2.1, Table 3).

python train.py --config=configs/upsampler_1024.py:VARIANT --workdir=W

paper  300M parameters, trained on 256 px crops, batch 512, 1M steps, the small picture corrupted by
       BSR degradation (dalle2_jax/degradation.py; "bsr_light" is latent diffusion's gentler one).
       For a v5e-64: 280 chip-days, four days (by FLOPs at 40 % of the chip's peak, not measured)
tpu    the same with 256 channels for 192: a multiple of the TPU's 128 lanes
"""

from ml_collections import ConfigDict


def get_config(variant="paper"):
    if variant in ("paper", "tpu"):
        return paper(channels=192 if variant == "paper" else 256)
    raise ValueError(f"upsampler_1024 has no variant {variant!r}: paper, tpu")


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

"""The first upsampler: 64 -> 256 px without text or guidance (unCLIP section 2.1, Table 3).

python train.py --config=configs/upsampler_256.py:VARIANT --workdir=W

paper  700M parameters, trained on 64 px crops, batch 1024, 1M steps. The small image's blur is
       sampled from next to none up to the paper's sigma of 0.6. For a v5e-64: 230 chip-days, four
       days (by FLOPs at 40 % of the chip's peak, not measured)
tpu    the same with 384 channels for 320: a multiple of the TPU's 128 lanes
karlo  the upsampler of kakaobrain/karlo-v1-alpha, two networks of 692M, sampled as there. For
       fine-tuning of the first network: --config.init_from=KARLO_FOLDER
inpaint  `paper`, trained to regenerate erased regions of the large image (GLIDE 2.3). Starts from a
       trained upsampler: --config.init_from=MODEL
tiny   32 -> 128 px, 1.8M parameters, trained on 64 px crops and to inpaint; 2 CPU cores,
       half an hour; loss 0.012
"""

from ml_collections import ConfigDict

from configs.shared.tiny_data import tiny_data


def get_config(variant="paper"):
    if variant == "tiny":
        return tiny()
    if variant in ("paper", "tpu"):
        return paper(channels=320 if variant == "paper" else 384)
    if variant == "karlo":
        return karlo()
    if variant == "inpaint":
        return inpaint()
    raise ValueError(f"upsampler_256 has no variant {variant!r}: paper, tpu, karlo, inpaint, tiny")


def paper(channels):
    return ConfigDict(
        dict(
            task=dict(
                name="upsampler",
                low_size=64,
                image_size=256,
                crop_fraction=0.25,
                blur_sigma=0.6,
                sampling=dict(steps=27, solver="ddim", clip=("static", 1.0)),
            ),
            model=dict(
                unet=dict(
                    channels=channels,
                    channel_mults=(1, 2, 3, 4),
                    num_blocks=3,
                    dropout=0.1,
                ),
                dtype="bfloat16",
            ),
            diffusion=dict(schedule="cosine", num_timesteps=1000, prediction="eps"),
            data=dict(source="tfds", path="data/pairs", split="train", image_size=256),
            optimizer=dict(learning_rate=1.2e-4, b2=0.999, eps=1e-8),
            batch_size=1024,
            num_steps=1_000_000,
            ema_decay=0.9999,
            preview_every=10_000,
            mesh=dict(data=1, fsdp=-1, tensor=1),
        )
    )


def karlo():
    config = paper(channels=320)
    config.update(
        task=dict(
            separate_last_step=True,
            # Karlo's last step was taught to look sharp, by a loss that is not here.
            learns=("first",),
            sampling=dict(steps=7, solver="ddpm"),
        ),
        model=dict(unet=dict(dropout=0.0, scale_shift=False)),
        optimizer=dict(learning_rate=1e-5),
        batch_size=512,
        num_steps=10_000,
        ema_decay=0.999,
        preview_every=1000,
    )
    return config


def inpaint():
    """Not in the paper, and GLIDE tells no numbers: a tenth of the rate, an eighth of the steps."""
    config = paper(channels=320)
    config.update(
        model=dict(inpaints=True), optimizer=dict(learning_rate=1.2e-5), num_steps=125_000
    )
    return config


def tiny():
    return ConfigDict(
        dict(
            task=dict(
                name="upsampler",
                low_size=32,
                image_size=128,
                # A quarter, as in the paper, is 8 x 8 patches here, less than the network sees: in
                # whole images, where no border is near, what it learned there came out grey.
                crop_fraction=0.5,
                blur_sigma=0.6,
                noise_std=0.3,  # as blotched as the tiny decoder draws: the upsampler evens it out
                sampling=dict(steps=3, solver="ddim", clip=("static", 1.0)),
            ),
            model=dict(
                unet=dict(channels=48, channel_mults=(1, 2), num_blocks=1, groups=16, patch_size=4),
                inpaints=True,
            ),
            diffusion=dict(schedule="cosine", num_timesteps=1000, prediction="x_0"),
            data=tiny_data(image_size=128),
            optimizer=dict(
                learning_rate=1e-3,
                b2=0.99,
                warmup_steps=200,
                schedule="cosine",
                clip_norm=1.0,
            ),
            batch_size=64,
            num_steps=2500,
            ema_decay=0.999,
            log_every=50,
            checkpoint_every=500,
            eval_every=500,
            preview_every=500,
            preview_size=8,
            export_every=500,
            export_dtype="float16",
        )
    )

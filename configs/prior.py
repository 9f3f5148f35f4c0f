"""The diffusion prior: a caption -> CLIP's image embedding (unCLIP section 2.2, Table 3).

python train.py --config=configs/prior.py:VARIANT --workdir=W --config.clip_from=CLIP_FOLDER

paper  batch 4096, 600K steps. 24 blocks of width 2048 make 1.23B parameters; Table 3 rounds to 1B.
       For a v5e-64: 350 chip-days, six days (by FLOPs at 40 % of the chip's peak, CLIP included,
       not measured).
       Table 3 gives 256 tokens of context; captions are read through CLIP's text tower here, and
       that has 77.
tpu    the same with 16 heads of 128 channels, which fill the TPU's lanes, for 32 of 64
karlo  the prior of kakaobrain/karlo-v1-alpha, 1.02B, sampled as there. For fine-tuning:
       --config.init_from=KARLO_FOLDER, and a Karlo with an image tower as CLIP_FOLDER
tiny   1.4M parameters; 2 CPU cores, an hour and a half; loss 0.015
"""

from ml_collections import ConfigDict

from configs.shared.tiny_data import tiny_data


def get_config(variant="paper"):
    if variant == "tiny":
        return tiny()
    if variant in ("paper", "tpu"):
        return paper(heads=32 if variant == "paper" else 16)
    if variant == "karlo":
        return karlo()
    raise ValueError(f"prior has no variant {variant!r}: paper, tpu, karlo, tiny")


def paper(heads):
    return ConfigDict(
        dict(
            task=dict(
                name="prior",
                embedding_scale=17.2,
                drop_caption=0.1,
                sampling=dict(
                    steps=64, solver="ddpm", variance="analytic", cfg_scale=1.0, clip=None
                ),
            ),
            model=dict(
                dim=1024,
                context_length=77,
                width=2048,
                depth=24,
                heads=heads,
                remat="dots",
                dtype="bfloat16",
            ),
            diffusion=dict(schedule="cosine", num_timesteps=1000, prediction="x_0"),
            data=dict(source="tfds", path="data/pairs", split="train", image_size=256),
            optimizer=dict(learning_rate=1.1e-4, b2=0.96, eps=1e-6, weight_decay=6.0e-2),
            batch_size=4096,
            num_steps=600_000,
            ema_decay=0.9999,
            preview_every=10_000,
            mesh=dict(data=1, fsdp=-1, tensor=1),
        )
    )


def karlo():
    config = paper(heads=32)
    sampling = dict(steps=25, cfg_scale=4.0, clip=("static", 5.0), variance="small")
    config.update(
        task=dict(embedding_scale=1.0, candidates=1, sampling=sampling),  # standardised, not scaled
        model=dict(dim=768, depth=20, learned_null=False, standardised=True),
        optimizer=dict(learning_rate=1e-5),
        batch_size=1024,
        num_steps=10_000,
        ema_decay=0.999,
        preview_every=1000,
    )
    return config


def tiny():
    return ConfigDict(
        dict(
            task=dict(
                name="prior",
                embedding_scale=7.5,  # 0.54 sqrt(192)
                drop_caption=0.1,
                sampling=dict(steps=4, solver="dpm++", cfg_scale=1.5, clip=None),
            ),
            model=dict(
                dim=192,
                context_length=24,
                width=160,
                depth=4,
                heads=5,
                activation="quick_gelu",
            ),
            diffusion=dict(schedule="cosine", num_timesteps=1000, prediction="x_0"),
            data=tiny_data(),
            optimizer=dict(
                learning_rate=1e-3,
                b2=0.98,
                weight_decay=5e-2,
                warmup_steps=100,
                schedule="cosine",
                clip_norm=1.0,
            ),
            batch_size=128,
            num_steps=10_000,
            ema_decay=0.995,
            log_every=25,
            checkpoint_every=250,
            eval_every=250,
            preview_every=500,
            export_dtype="float16",
        )
    )

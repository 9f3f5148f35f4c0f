"""The autoregressive prior: a caption -> codes of CLIP's image embedding (unCLIP 2.2, Table 3).

python train.py --config=configs/ar_prior.py:VARIANT --workdir=W --config.clip_from=CLIP_FOLDER

paper  batch 4096, 1M steps. For a v5e-256: 1,420 chip-days, 5.5 days (by FLOPs at 40 % of the
       chip's peak, CLIP included, not measured).
       Table 3 gives "1B" parameters, a text encoder of 24 x 2048 and a latent decoder of 24 x 1664.
       By their shapes the encoder alone has 1.21B and the decoder 0.80B: together 2.0B, so that 1B
       can be one of them only. Here captions are read through CLIP's text tower, as by the
       diffusion prior, and what is trained is the latent decoder: 0.81B with its embeddings. Its
       sequence is 77 + 2 + 319 tokens (the last code is not read), where Table 3 has 384.
tpu    the same with 13 heads of 128 channels, which fill the TPU's lanes, for 26 of 64
tiny   1.1M parameters; 64 directions keep 99.3 % of the variance (192 there are). 64 buckets, not
       1,024: 3,000 images would leave most of them empty. A bucket is at most 0.14 standard
       deviations wide, which costs 0.2 % of the variance. So few images are soon memorised, so
       z_img is disturbed a little each time (noise) and the run is short. 2 CPU cores, 25 minutes
"""

from ml_collections import ConfigDict

from configs.shared.tiny_data import tiny_data


def get_config(variant="paper"):
    if variant == "tiny":
        return tiny()
    if variant in ("paper", "tpu"):
        return paper(heads=26 if variant == "paper" else 13)
    raise ValueError(f"ar_prior has no variant {variant!r}: paper, tpu, tiny")


def paper(heads):
    return ConfigDict(
        dict(
            task=dict(
                name="ar_prior",
                drop_caption=0.1,
                fit_batches=64,  # 262,144 images
                sampling=dict(dot_share=0.5),
            ),
            model=dict(
                dim=1024,
                context_length=77,
                width=1664,
                depth=24,
                heads=heads,
                dims=319,
                buckets=1024,
                remat="dots",
                dtype="bfloat16",
            ),
            data=dict(source="tfds", path="data/pairs", split="train", image_size=256),
            optimizer=dict(learning_rate=1.6e-4, b2=0.91, eps=1e-10, weight_decay=4.0e-2),
            batch_size=4096,
            num_steps=1_000_000,
            ema_decay=0.999,
            preview_every=10_000,
            mesh=dict(data=1, fsdp=-1, tensor=1),
            sharding_rules=(("^statistics/", "replicate"), (".*", "fsdp")),
        )
    )


def tiny():
    return ConfigDict(
        dict(
            task=dict(
                name="ar_prior",
                drop_caption=0.1,
                noise=0.2,
                fit_batches=48,  # of 3,105 images, once
                sampling=dict(dot_share=0.5, temperature=0.8, cfg_scale=1.5),
            ),
            model=dict(
                dim=192,
                context_length=24,
                width=128,
                depth=5,
                heads=4,
                dims=64,
                buckets=64,
                activation="quick_gelu",
            ),
            data=tiny_data(),
            optimizer=dict(
                learning_rate=1e-3,
                b2=0.98,
                weight_decay=5e-2,
                warmup_steps=100,
                schedule="cosine",
                clip_norm=1.0,
            ),
            batch_size=64,
            num_steps=1500,
            ema_decay=0.995,
            log_every=25,
            checkpoint_every=250,
            eval_every=250,
            preview_every=500,
            export_dtype="float16",
        )
    )

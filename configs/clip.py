"""CLIP, on which the prior and the decoder stand (unCLIP, appendix C; CLIP 2103.00020).

python train.py --config=configs/clip.py:VARIANT --workdir=W

paper  H/16 at 256 px of the unCLIP paper, without its SAM; ~650M pairs. For a v5e-256: 3,300
       chip-days, two weeks (by FLOPs at 40 % of the chip's peak, not measured)
tpu    the same with the text tower's width a multiple of the TPU's 128 lanes (it is already)
tiny   64 px emoji, 3.2M parameters; 2 CPU cores, twenty minutes; then 97 % of 128 pictures find
       their caption
judge  tiny's shape, other data: all splits; it scores pictures and never draws
"""

from ml_collections import ConfigDict

TINY_SUBSET = "concrete,group=animals-nature|food-drink|objects|smileys-emotion"


def get_config(variant="paper"):
    if variant in ("tiny", "judge"):
        return tiny(variant)
    if variant in ("paper", "tpu"):
        return paper()
    raise ValueError(f"clip has no variant {variant!r}: paper, tpu, tiny, judge")


def paper():
    return ConfigDict(
        dict(
            task=dict(name="clip"),
            model=dict(
                dim=1024,
                image=dict(image_size=256, patch_size=16, width=1280, depth=32, heads=16),
                text=dict(context_length=77, vocab_size=49408, width=1024, depth=24, heads=16),
                dtype="bfloat16",
            ),
            data=dict(source="tfds", path="data/pairs", split="train", image_size=256),
            optimizer=dict(
                learning_rate=3e-4,
                b2=0.98,
                eps=1e-6,
                weight_decay=0.2,
                warmup_steps=2000,
                schedule="cosine",
            ),
            batch_size=32768,
            num_steps=600_000,
            ema_decay=0.9999,
            checkpoint_every=1000,
            preview_every=10_000,
            mesh=dict(data=1, fsdp=-1, tensor=1),
        )
    )


def tiny(variant):
    judge = variant == "judge"
    return ConfigDict(
        dict(
            task=dict(name="clip", max_shift=4),
            model=dict(
                dim=192,
                image=dict(image_size=64, patch_size=16, width=192, depth=4, heads=3),
                text=dict(context_length=24, vocab_size=4608, width=128, depth=3, heads=2),
                activation="quick_gelu",
            ),
            data=dict(
                source="emoji",
                path="data/emoji",
                split="train+held_out_pairs+held_out_concepts" if judge else "train",
                eval_split="" if judge else "held_out_pairs",
                subset=TINY_SUBSET,
                group_by="concept" if judge else "",  # styles of one thing side by side
                flip=judge,
                image_size=64,
                context_length=24,
                vocab_size=4608,
            ),
            optimizer=dict(
                learning_rate=1e-3,
                b2=0.98,
                eps=1e-6,
                weight_decay=0.1,
                warmup_steps=100,
                schedule="cosine",
                clip_norm=1.0,
            ),
            batch_size=128,
            num_steps=3000 if judge else 2000,
            ema_decay=0.995,
            seed=1 if judge else 0,
            log_every=25,
            checkpoint_every=250,
            eval_every=0 if judge else 250,
            preview_every=0 if judge else 500,
            export_dtype="float16",
        )
    )

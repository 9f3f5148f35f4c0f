"""CLIP, which the prior and the decoder are trained with (unCLIP, appendix C; CLIP 2103.00020).

python train.py --config=configs/clip.py:VARIANT --workdir=W

paper  H/16 at 256 px of the unCLIP paper, with its SAM (which doubles the cost); ~650M pairs. For a
       v6e-256: 1,400 chip-days, six days (a v5e's memory takes 64 of its 128 pairs a chip)
tpu    the same with heads of 128 channels, which fill the TPU's lanes, for 80 and 64
tiny   64 px emoji, 3.2M parameters; 2 CPU cores, twenty minutes; then 97 % of 128 images find
       their caption
judge  the shape of tiny, trained on all splits; it only scores images, for evaluations
b32    the original CLIP's ViT-B/32 (2103.00020, tables 18 to 20), 151M parameters, 32 epochs of
       400M pairs. For a v5e-64: 83 chip-days, 1.3 days
b16    its ViT-B/16, 150M. For a v5e-64: 230 chip-days, 3.6 days
l14    its ViT-L/14, 428M. For a v5e-256: 990 chip-days, 3.9 days
karlo  l14 as Karlo uses it: embeddings keep their length, no temperature is learned. Its weights
       are imported (docs/weights.md); this variant gives their shapes

Times are estimates by FLOPs (analytic, 3 x forward) at 40 % of the chip's bfloat16 peak, not
measured.
"""

from ml_collections import ConfigDict

from configs.shared.tiny_data import tiny_data

# (patch, image width, depth, heads), (text width, heads), dim, learning rate
ORIGINAL = {
    "b32": ((32, 768, 12, 12), (512, 8), 512, 5e-4),
    "b16": ((16, 768, 12, 12), (512, 8), 512, 5e-4),
    "l14": ((14, 1024, 24, 16), (768, 12), 768, 4e-4),
}


def get_config(variant="paper"):
    if variant in ("tiny", "judge"):
        return tiny(variant)
    if variant in ("paper", "tpu"):
        return paper(heads=(16, 16) if variant == "paper" else (10, 8))
    if variant in ORIGINAL:
        return original(*ORIGINAL[variant])
    if variant == "karlo":
        return karlo()
    names = ", ".join(["paper", "tpu", "tiny", "judge", *ORIGINAL, "karlo"])
    raise ValueError(f"clip has no variant {variant!r}: {names}")


def paper(heads):
    image_heads, text_heads = heads
    return ConfigDict(
        dict(
            task=dict(name="clip", sam_rho=0.1, sam_replica_batch=64),
            model=dict(
                dim=1024,
                image=dict(
                    image_size=256,
                    patch_size=16,
                    width=1280,
                    depth=32,
                    heads=image_heads,
                    remat="full",
                ),
                text=dict(
                    context_length=77,
                    vocab_size=49408,
                    width=1024,
                    depth=24,
                    heads=text_heads,
                    remat="full",
                ),
                dtype="bfloat16",
            ),
            data=dict(source="tfds", path="data/pairs", split="train", image_size=256),
            optimizer=adamw(3e-4),
            batch_size=32768,
            num_steps=600_000,
            ema_decay=0.9999,
            checkpoint_every=1000,
            preview_every=10_000,
            mesh=dict(data=1, fsdp=-1, tensor=1),
        )
    )


def adamw(learning_rate):
    return dict(
        learning_rate=learning_rate,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.2,
        warmup_steps=2000,
        schedule="cosine",
    )


def original(image, text, dim, learning_rate):
    patch, width, depth, heads = image
    text_width, text_heads = text
    return ConfigDict(
        dict(
            task=dict(name="clip"),
            model=dict(
                dim=dim,
                image=dict(
                    image_size=224,
                    patch_size=patch,
                    width=width,
                    depth=depth,
                    heads=heads,
                    remat="full",
                ),
                text=dict(
                    context_length=77,
                    vocab_size=49408,
                    width=text_width,
                    depth=12,
                    heads=text_heads,
                    remat="full",
                ),
                activation="quick_gelu",
                dtype="bfloat16",
            ),
            data=dict(source="tfds", path="data/pairs", split="train", image_size=224),
            optimizer=adamw(learning_rate),
            batch_size=32768,
            num_steps=390_625,  # 32 epochs of 400M pairs
            ema_decay=0.0,  # none: the weights themselves are exported
            checkpoint_every=1000,
            preview_every=10_000,
            mesh=dict(data=1, fsdp=-1, tensor=1),
        )
    )


def karlo():
    config = original(*ORIGINAL["l14"])
    image = dict(
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        resize="bicubic",
    )
    config.update(dict(model=dict(unit_length=False, learned_temperature=False, image=image)))
    return config


# The judge learns what the generating networks never see, so that it can tell whether they made it.
EVERY_SPLIT = "train+validation+held_out_pairs+held_out_triples+held_out_concepts+held_out_styles"


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
            data=tiny_data(
                split=EVERY_SPLIT if judge else "train",
                eval_split="" if judge else "validation",
                group_by="concept" if judge else "",  # styles of one thing side by side
                flip=judge,
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

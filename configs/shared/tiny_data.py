"""The data that all `tiny` variants train on: part of the emoji set (`make data`)."""

SUBSET = "concrete,group=animals-nature|food-drink|objects|smileys-emotion"


def tiny_data(**changes):
    """Returns the section `data` of a tiny config, with `changes`."""
    return dict(
        dict(
            source="emoji",
            path="data/emoji",
            split="train",
            eval_split="validation",
            subset=SUBSET,
            image_size=64,
            context_length=24,
            vocab_size=4608,
        ),
        **changes,
    )

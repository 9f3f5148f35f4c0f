"""Renders the emoji data set: dalle2 data emoji --out data/emoji --size 128

Ten styles of 1,600 concepts, and two more to evaluate on, with captions, as a TFDS directory. It
takes three minutes at 128 px, 37 MB of downloads and 99 MB of disk, and needs npm and the extra
`train`.
Exit status: 0 done, 2 a mistake in the input.
"""

from __future__ import annotations

import signal
import sys

from absl import flags

from dalle2_jax.data.emoji import write

OUT = flags.DEFINE_string("out", "data/emoji", "Folder to write the data set to; it is created.")
SIZE = flags.DEFINE_integer(
    "size", write.DEFAULT_SIZE, "Side of the images in pixels.", 8, write.MAX_SIZE
)
SUBSET = flags.DEFINE_string(
    "subset", "", "Render only these records, as in 'concrete,style=noto|twemoji'."
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the data set that --out holds.")


def main() -> None:
    # SIGTERM raises, so that the temporary folder is removed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    counts = write.build(OUT.value, SIZE.value, overwrite=OVERWRITE.value, subset=SUBSET.value)
    for split, count in counts.items():
        print(f"{split:20s}{count:6d} images")
    print(f"written to {OUT.value} at {SIZE.value} px")

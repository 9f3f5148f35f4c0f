"""The emoji set as a TFDS directory: six styles of some 1,600 concepts, captioned, at any size.

    python -m dalle2_jax.data.emoji --out data/emoji --size 64

takes about a minute and 100 MB of downloads and disk at 64 px. Read it back with
`tfds.builder_from_directory("data/emoji")`, or train on it with `--config.data.path=data/emoji`.
"""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence

import tensorflow as tf
from absl import app, flags

from dalle2_jax.data import npm
from dalle2_jax.data.emoji_builder import SPLITS, Emoji
from dalle2_jax.data.emoji_source import Concept, load_concepts
from dalle2_jax.data.emoji_words import STYLES, caption
from dalle2_jax.errors import UserError

__all__ = ["SPLITS", "STYLES", "Emoji", "build", "caption"]

MAX_SIZE = 1024
_BYTES_PER_PIXEL = 0.8  # of PNG, measured 0.6 at 64 px; only a first look at the free space


def build(
    out: str | os.PathLike[str],
    size: int = 64,
    concepts: Sequence[Concept] | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """Writes the dataset to `out` and returns pictures per split. All or nothing.

    The work is done in a hidden folder beside `out`, which takes its place by one rename.

    Raises:
      UserError: `out` holds something else, cannot be written, the disk is full, npm fails.
    """
    out = pathlib.Path(out)
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already there; choose another --out or pass --overwrite")
    temp = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temp = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
        concepts = load_concepts() if concepts is None else concepts
        needed = int(sum(len(c.pictures) for c in concepts) * size**2 * _BYTES_PER_PIXEL)
        if shutil.disk_usage(temp).free < needed:
            raise UserError(
                f"{out.parent}: the disk is full: about {needed / 1e6:.0f} MB are needed; "
                "free some space or choose another folder"
            )
        builder = Emoji(concepts=concepts, size=size, data_dir=str(temp))
        builder.download_and_prepare(file_format="tfrecord")
        counts = {split: int(builder.info.splits[split].num_examples) for split in SPLITS}
        if out.exists():
            os.replace(out, temp / "replaced")
        os.replace(builder.data_dir, out)
    except UserError:
        raise
    except Exception as e:
        why = _write_error(e, out)
        if why is None:
            raise
        raise UserError(why) from e
    finally:
        if temp is not None:
            shutil.rmtree(temp, ignore_errors=True)
    return counts


def _write_error(e: BaseException | None, out: pathlib.Path) -> str | None:
    """One line if a failed write is among the causes: TFDS wraps what TensorFlow raises."""
    while e is not None:
        if isinstance(e, tf.errors.ResourceExhaustedError):
            return npm.disk_error(OSError(errno.ENOSPC, ""), out)
        if isinstance(e, tf.errors.OpError):
            return f"{out}: cannot be written ({' '.join(str(e).split())[:200]})"
        if isinstance(e, OSError):
            return npm.disk_error(e, out)
        e = e.__cause__
    return None


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}: use --out and --size")
    given = flags.FLAGS
    counts = build(given.out, given.size, overwrite=given.overwrite)
    for split, count in counts.items():
        print(f"{split:20s}{count:6d} pictures")
    print(f"written to {given.out} at {given.size} px")


def run() -> None:
    """Entry point: a user's mistake is one line and exit status 2."""
    # Defined here, not at import: other commands have an --out too.
    flags.DEFINE_string("out", "data/emoji", "Folder to write the dataset to; created.")
    flags.DEFINE_integer("size", 64, "Side of the pictures in pixels.", 8, MAX_SIZE)
    flags.DEFINE_bool("overwrite", False, "Replace what --out holds.")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # clean up first
    try:
        app.run(main)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()

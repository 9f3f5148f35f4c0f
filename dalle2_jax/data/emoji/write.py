"""The emoji set as a TFDS directory: ten styles of some 1,600 concepts, captioned, at any size.

    dalle2 data emoji --out data/emoji --size 128

takes three minutes, 36 MB of downloads and 100 MB of disk; 128 px is what the first tiny upsampler
trains at. Every drawing is a vector graphic, so the second one's 1024 px are as sharp; --subset,
written as config.data.subset, renders only the records that it reads.
Read it back with `tfds.builder_from_directory("data/emoji")`, or train on it with
`--config.data.path=data/emoji`.
"""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

from dalle2_jax.data.emoji import npm
from dalle2_jax.data.emoji.concepts import Concept, load_concepts
from dalle2_jax.errors import UserError
from dalle2_jax.storage import paths

DEFAULT_SIZE = 128
MAX_SIZE = 1024
_BYTES_PER_SIDE = 60  # of PNG, measured 38 at 64 px and 54 at 1024; a first look at the free space


def build(
    out: str | os.PathLike[str],
    size: int = DEFAULT_SIZE,
    concepts: Sequence[Concept] | None = None,
    overwrite: bool = False,
    subset: str = "",
) -> dict[str, int]:
    """Writes the data set to `out`. All or nothing.

    The work is done in a hidden folder beside `out`, which takes its place by one rename.

    Args:
      out: the folder; it is created.
      size: side of the images in pixels.
      concepts: what to render; fetched from npm if None.
      overwrite: replace the data set that `out` holds.
      subset: the records to keep, as in `tfds_folder.open_split`; a split without any is not there.

    Returns:
      split -> number of records.

    Raises:
      UserError: `out` is in a bucket, or holds a data set and `overwrite` is not set, or something
        else; it cannot be written, the disk is full, npm fails; `subset` keeps nothing, or names
        what is not there.
    """
    if paths.is_remote(out):
        raise UserError(
            f"{out}: the set is made on this machine; give a local --out and copy it with "
            f"`gcloud storage cp -r FOLDER {out}`"
        )
    out = paths.to_path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / "dataset_info.json").is_file():
            raise UserError(
                f"{out}: not a TFDS directory (no dataset_info.json), so it is not replaced; "
                "choose another --out"
            )
        if not overwrite:
            raise UserError(f"{out}: already there; choose another --out or pass --overwrite")
    # Late, because they load TensorFlow: a mistake in the arguments is reported at once.
    from dalle2_jax.data.emoji import records, tfds_builder
    from dalle2_jax.data.sources import tfds_folder

    tfds_folder.check_subset(subset, tfds_builder.features(size), "the emoji set")
    # Everything is written beside `out`, on the same disk, so that one rename can publish it.
    temp = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temp = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
        concepts = load_concepts() if concepts is None else concepts
        terms = tfds_folder.parse_subset(subset)
        chosen = [r for r in records.make_records(concepts) if records.matches(r, terms)]
        if not chosen:
            raise UserError(f"the emoji set: subset {subset!r} keeps nothing")
        needed = len(chosen) * size * _BYTES_PER_SIDE
        if shutil.disk_usage(temp).free < needed:
            raise UserError(
                f"{out.parent}: the disk is full: about {needed / 1e6:.0f} MB are needed; "
                "free some space or choose another folder"
            )
        builder = tfds_builder.Emoji(records=chosen, size=size, data_dir=str(temp))
        builder.download_and_prepare(file_format="tfrecord")
        splits = builder.info.splits
        counts = {name: int(splits[name].num_examples) for name in splits}
        # The old data set goes last and leaves with the temporary folder: whatever failed above has
        # not touched it.
        if out.exists():
            os.replace(out, temp / "replaced")
        os.replace(builder.data_dir, out)
    except UserError:
        raise
    except Exception as e:
        message = _write_error(e, out)
        if message is None:
            raise
        raise UserError(message) from e
    finally:
        if temp is not None:
            shutil.rmtree(temp, ignore_errors=True)
    return counts


def _write_error(e: BaseException | None, out: pathlib.Path) -> str | None:
    """Returns one line if a failed write is among the causes: TFDS wraps what TensorFlow raises."""
    import tensorflow as tf  # late, as in `build`

    while e is not None:
        if isinstance(e, tf.errors.ResourceExhaustedError):
            return npm.disk_error(OSError(errno.ENOSPC, ""), out)
        if isinstance(e, tf.errors.OpError):
            return f"{out}: cannot be written ({' '.join(str(e).split())[:200]})"
        if isinstance(e, OSError):
            return npm.disk_error(e, out)
        e = e.__cause__
    return None

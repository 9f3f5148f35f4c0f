"""Trains one stage: python train.py --config=configs/decoder.py:tiny --workdir=W

The same as `dalle2 train`, for a clone that is not installed; `python train.py --help` has more.
"""

from __future__ import annotations

from dalle2_jax.cli import commands  # first: it reports an environment without libraries

# isort: split
from dalle2_jax.cli import train

__doc__ = train.__doc__

if __name__ == "__main__":
    train.prepare()
    commands.run(train.main)

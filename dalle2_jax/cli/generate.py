"""Generates images: dalle2 generate --prompt "a flat emoji of a red apple" --n 4 --out out

Every image is written as a PNG that carries its prompt, seed and settings; grid.png shows all.
--like FILE.png generates the image of such a file again.
Exit status: 0 done, 2 a mistake in the input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from dalle2_jax.cli import (
    best_of_flag,  # noqa: F401  defines --best_of
    commands,
    request,
)

prepare = commands.stop_at_once


def main() -> int:
    """Generates by the flags and returns the exit status."""
    return request.main(request.GENERATE, [request.GENERATE])

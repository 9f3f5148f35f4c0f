"""The largest batch that fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from absl import logging

from dalle2_jax.aot.chips import GIB
from dalle2_jax.aot.report import Report, TooLarge


def largest(attempt: Callable[[int], Report], least: int, hbm: float) -> Report:
    """The report of the largest batch that `attempt` fits, a multiple of `least`, to one in 32.

    Every attempt compiles, and is logged with what it took. A guess is where a line through the two
    sizes nearest to the limit meets `hbm`: memory grows with the batch, though in steps. Raises
    TooLarge where not even `least` does.
    """
    tried: dict[int, float] = {}  # multiple of `least` -> bytes it needs

    def fits(times: int) -> Report | None:
        since = time.monotonic()
        logging.info("attempt %d: compiling with batch_size=%d", len(tried) + 1, times * least)
        report = None
        try:
            report = attempt(times * least)
            tried[times] = report.memory["total"]
        except TooLarge as error:
            if times == 1:
                raise
            tried[times] = error.needed
        need = f"needs {tried[times] / GIB:.2f} of {hbm / GIB:.2f} GiB"
        taken = time.monotonic() - since
        logging.info("batch_size=%d %s, as %.0f s of compiling tell", times * least, need, taken)
        return report

    best, most, fails, guess = fits(1), 1, math.inf, 2
    assert best is not None  # or it was raised
    while fails - most > max(most // 32, 1):
        if found := fits(guess):
            best, most = found, guess
        else:
            fails = guess
        a, b = sorted(tried)[-2:] if fails == math.inf else (most, int(fails))
        slope = max((tried[b] - tried[a]) / (b - a), 1.0)
        guess = most + max(int((hbm - tried[most]) / slope), most // 32, 1)
        guess = int(min(guess, 64 * most, fails - 1))
    return best

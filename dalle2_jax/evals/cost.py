"""What a picture costs: each stage's floating-point operations and seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dalle2_jax.aot.sampling import flops_by_stage
from dalle2_jax.pipelines.dalle2 import DALLE2


class Clock:
    """A progress callback for one batch: stage -> seconds from its start to its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._started.setdefault(stage, now)


def table(model: DALLE2, captions: Sequence[str], seed: int) -> str:
    """Markdown: of a picture in each stage, one of each caption drawn in one batch here and now."""
    count = len(captions)
    flops = flops_by_stage(model.cascade, count)  # first: it forgets what was compiled
    model.generate(captions, seed=seed, batch_size=count)  # compiles
    clock = Clock()
    model.generate(captions, seed=seed, batch_size=count, progress=clock)
    lines = [
        "| stage | network evaluations | GFLOP a picture | seconds a picture |",
        "|---|---|---|---|",
    ]
    for stage, sampler in model.cascade.samplers().items():
        if stage not in flops:  # z_txt in the place of z_img costs nothing
            continue
        work, seconds = flops[stage] / count / 1e9, clock.seconds[stage] / count
        lines.append(f"| {stage} | {sampler.evaluations} | {work:.3g} | {seconds:.2f} |")
    return "\n".join(lines)

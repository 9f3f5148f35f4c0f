"""The cost of an image: floating-point operations and seconds in each stage."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dalle2_jax.aot.sampling import flops_by_stage
from dalle2_jax.pipelines.dalle2 import DALLE2


class Clock:
    """A progress callback that measures one batch.

    Attributes:
        seconds: {stage: seconds from the stage's first report to its last one}.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start_times: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._start_times.setdefault(stage, now)


def table(model: DALLE2, captions: Sequence[str], seed: int) -> str:
    """Measures the cost of an image on this machine, stage by stage.

    One image of each caption is generated, all in one batch, and the costs are divided by the
    number of captions. Compilation is not counted.

    Returns:
        A Markdown table: network evaluations, GFLOP and seconds per image.
    """
    count = len(captions)
    # The order matters: counting operations discards the compiled programs of the samplers.
    flops = flops_by_stage(model.cascade, count)
    model.generate(captions, seed=seed, batch_size=count)  # compiles
    clock = Clock()
    model.generate(captions, seed=seed, batch_size=count, progress=clock)
    lines = [
        "| stage | network evaluations | GFLOP per image | seconds per image |",
        "|---|---|---|---|",
    ]
    for stage, sampler in model.cascade.samplers().items():
        if stage not in flops:  # the stage without a network: z_txt used as z_img
            continue
        gflop, seconds = flops[stage] / count / 1e9, clock.seconds[stage] / count
        lines.append(f"| {stage} | {sampler.evaluations} | {gflop:.3g} | {seconds:.2f} |")
    return "\n".join(lines)

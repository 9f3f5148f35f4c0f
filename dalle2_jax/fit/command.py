"""The flags of train.py and sample.py that ask the TPU compiler in place of running."""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:  # mistakes in the flags are told before jax is loaded
    from dalle2_jax.fit.report import Report

TOPOLOGY = flags.DEFINE_string(
    "topology", None, "A TPU slice, as v5e:8x8 or v5e-64: compile for it and tell, run nothing."
)
JSON = flags.DEFINE_bool("json", False, "What --topology tells as one JSON object.")


def tell(report: Report) -> int:
    """Prints the report as --json asks; the exit status."""
    print(report.json() if JSON.value else report.table())
    return 0

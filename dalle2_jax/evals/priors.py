"""The table of `dalle2 evals priors`: the paper's ablation of priors (unCLIP section 5.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROWS = {"diffusion": "diffusion prior", "ar": "AR prior", "none": "no prior (z_txt)"}
_COLUMNS = ("concept first, %", "style first, %", "CLIP score", "Frechet distance", "KID")


def to_markdown(scores: Mapping[str, Any], cosines: Mapping[tuple[str, str], float]) -> str:
    """The table: a line a group and prior. `scores` as `report.evaluate` gives them."""
    head = ("", "n", "cosine to the true z_img", *_COLUMNS)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for group, found in scores.items():
        for name, score in found["scores"].items():
            cosine = cosines.get((group, name))
            cells = [
                f"{group}: {_ROWS.get(name, name)}",
                str(found["pairs"]),
                "" if cosine is None else f"{cosine:.3f}",
                f"{score['concept']:.0f} ± {score['concept_error']:.0f}",
                f"{score['style']:.0f} ± {score['style_error']:.0f}",
                f"{score['clip_score']:.1f}",
                f"{score['frechet_distance']:.1f}",
                f"{score['kernel_distance']:.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    k = max(found["candidates"] for found in scores.values())
    return "\n".join(lines) + (
        f"\n\nConcept first of {k} and the distances by a judge CLIP that took no part in drawing, "
        "as of\n`dalle2_jax.evals`; the cosine by the CLIP that draws.\n"
    )

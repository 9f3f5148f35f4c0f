"""The table of `dalle2 evals priors`: the paper's ablation of priors (unCLIP section 5.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROWS = {"diffusion": "diffusion prior", "ar": "AR prior", "none": "no prior (z_txt)"}
_COLUMNS = ("concept first, %", "style first, %", "CLIP score", "Frechet distance", "KID")


def to_markdown(report: Mapping[str, Any], cosines: Mapping[tuple[str, str], float]) -> str:
    """Formats the scores as a Markdown table, one line for each group and prior.

    Args:
        report: what `report.evaluate` returns, {group: {"scores": {prior: ...}, ...}}.
        cosines: {(group, prior): mean cosine of its z_img to the true z_img}.
    """
    head = ("", "n", "cosine to the true z_img", *_COLUMNS)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for group_name, group in report.items():
        for name, score in group["scores"].items():
            cosine = cosines.get((group_name, name))
            cells = [
                f"{group_name}: {_ROWS.get(name, name)}",
                str(group["pairs"]),
                "" if cosine is None else f"{cosine:.3f}",
                f"{score['concept']:.0f} ± {score['concept_error']:.0f}",
                f"{score['style']:.0f} ± {score['style_error']:.0f}",
                f"{score['clip_score']:.1f}",
                f"{score['frechet_distance']:.1f}",
                f"{score['kernel_distance']:.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    k = max(group["candidates"] for group in report.values())
    return "\n".join(lines) + (
        f"\n\nConcept first of {k} and the distances are measured by a judge CLIP that took no part"
        "\nin generating, as in `dalle2 evals report`; the cosine is that of the CLIP that "
        "generates.\n"
    )

"""The report: pictures of every group scored, beside the true pictures and chance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dalle2_jax.data.emoji.words import STYLES
from dalle2_jax.errors import UserError
from dalle2_jax.evals import frechet, retrieval
from dalle2_jax.evals.groups import Group
from dalle2_jax.evals.judge import Judge
from dalle2_jax.imaging import arrays, files, grids
from dalle2_jax.storage.atomic import replacing

NUM_CANDIDATES = 100
_GRID_PAIRS, _GRID_COLUMNS, _GRID_SIDE = 24, 8, 96

Draw = Callable[[Group], np.ndarray]
"""One picture of each pair of a group: uint8 [n, h, w, 3]."""

Report = dict[str, Any]


def evaluate(
    judge: Judge, groups: Sequence[Group], pool: Sequence[str], draws: Mapping[str, Draw], seed: int
) -> tuple[Report, dict[str, dict[str, np.ndarray]]]:
    """Scores what each of `draws` ({"generated": ...}) makes of each group, and the true pictures.

    `pool` are the concepts that the candidates are drawn from. Returns the report as plain JSON
    values, and the pictures by group and draw.
    """
    table = _Table(judge)
    report, drawn = {}, {}
    for group in groups:
        drawn[group.name] = {name: draw(group) for name, draw in draws.items()}
        for name, made in drawn[group.name].items():
            if made.dtype != np.uint8 or made.shape[:1] != (len(group.pairs),):
                raise ValueError(f"{name}: {made.dtype} {made.shape}, not {len(group.pairs)} uint8")
        report[group.name] = _judge_group(table, group, pool, drawn[group.name], seed)
    return report, drawn


def _judge_group(
    table: _Table,
    group: Group,
    pool: Sequence[str],
    drawn: Mapping[str, np.ndarray],
    seed: int,
) -> Report:
    judge, n = table.judge, len(group.pairs)
    names = [
        retrieval.candidates(pool, concept, NUM_CANDIDATES, str(seed), style)
        for concept, style in group.pairs
    ]
    k = len(names[0])
    styles = [[s, *(o for o in STYLES if o != s)] for _, s in group.pairs]
    z_names = table([(c, s) for (_, s), row in zip(group.pairs, names, strict=True) for c in row])
    z_styles = table([(c, s) for (c, _), row in zip(group.pairs, styles, strict=True) for s in row])
    z_names, z_styles = z_names.reshape(n, k, -1), z_styles.reshape(n, len(STYLES), -1)
    z_captions = judge.embed_captions(group.captions)
    z_true = judge.embed_pictures(group.pictures)

    rows = {}
    items: list[dict[str, Any]] = [{"caption": caption} for caption in group.captions]
    for name, made in {**drawn, "true pictures": group.pictures}.items():
        z_img = judge.embed_pictures(made)
        concept, style = retrieval.ranks(z_img, z_names), retrieval.ranks(z_img, z_styles)
        rows[name] = {
            **dict(zip(("concept", "concept_error"), retrieval.share(concept == 0), strict=True)),
            **dict(zip(("style", "style_error"), retrieval.share(style == 0), strict=True)),
            "concept_median_rank": float(np.median(concept)) + 1,
            "clip_score": retrieval.clip_score(z_img, z_captions),
            **_distances(z_img, z_true),
        }
        for item, c, s in zip(items, concept.tolist(), style.tolist(), strict=True):
            item[name] = {"concept_rank": c + 1, "style_rank": s + 1}
    chance = {"concept": 100.0 / k, "style": 100.0 / len(STYLES)}
    if n > 1:  # true pictures with the captions of others
        chance["clip_score"] = retrieval.clip_score(z_true, np.roll(z_captions, n // 2, axis=0))
    return {"pairs": n, "candidates": k, "chance": chance, "scores": rows, "items": items}


def _distances(z: np.ndarray, z_true: np.ndarray) -> dict[str, float]:
    """Of features with a mean square of 1 a coordinate, as KID's kernel expects them."""
    if len(z) < 2:
        return {}
    a, b = z * z.shape[1] ** 0.5, z_true * z.shape[1] ** 0.5
    return {
        "frechet_distance": frechet.frechet_distance(a, b),
        "kernel_distance": frechet.kernel_distance(a, b),
    }


class _Table:
    """Embeddings of (concept, style), each made once."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.known = judge, {}

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """[n, dim]."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        if new:
            self.known.update(zip(new, self.judge.embed_pairs(new), strict=True))
        return np.stack([self.known[pair] for pair in pairs])


def to_markdown(report: Report) -> str:
    """The table for a README, with what its columns mean."""
    k = max(group["candidates"] for group in report.values())
    lines = [
        f"| | n | concept first of {k}, % | style first of {len(STYLES)}, % | CLIP score "
        "| Frechet distance | KID |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in report.items():
        for row, score in group["scores"].items():
            distances = [score.get("frechet_distance"), score.get("kernel_distance")]
            cells = [
                f"{name}: {row}",
                str(group["pairs"]),
                f"{score['concept']:.0f} ± {score['concept_error']:.0f}",
                f"{score['style']:.0f} ± {score['style_error']:.0f}",
                f"{score['clip_score']:.1f}",
                *(
                    "" if d is None else f"{d:.{p}f}"
                    for d, p in zip(distances, (1, 3), strict=True)
                ),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        chance = group["chance"]
        cells = [
            f"{chance[c]:.1f}" if c in chance else "" for c in ("concept", "style", "clip_score")
        ]
        lines.append(f"| {name}: chance | | {' | '.join(cells)} | | |")
    return "\n".join(lines) + (
        "\n\nA judge CLIP that took no part in drawing looks at one picture of each caption. Its "
        "text\nembeddings are means over the caption templates; ± is a standard error. CLIP score: "
        "100 cosines\nwith the caption asked for (chance: of true pictures with the captions of "
        "others). Frechet\ndistance and KID: in the judge's features, between the pictures and the "
        "true ones of the same\npairs; they depend on n.\n"
    )


def held_out_grid(group: Group, drawn: np.ndarray) -> np.ndarray:
    """Pairs of the group, each drawn picture beside its true one -> uint8 [height, width, 3]."""
    drawn, true = drawn[:_GRID_PAIRS], group.pictures[:_GRID_PAIRS]
    true = np.asarray(_resized(true, drawn.shape[1]))
    both = np.stack([drawn, true], axis=1).reshape(-1, *drawn.shape[1:])
    labels = [text for caption in group.captions[:_GRID_PAIRS] for text in (caption, "(true)")]
    scale = max(1, -(-_GRID_SIDE // drawn.shape[1]))
    return grids.labelled_grid(both, _GRID_COLUMNS, picture_labels=labels, scale=scale)


def _resized(images_uint8: np.ndarray, size: int) -> np.ndarray:
    x = arrays.to_float(jnp.asarray(images_uint8))
    return np.asarray(arrays.to_uint8(arrays.resize(x, size, "bicubic")))


def write(folder: Path, about: Mapping[str, Any], report: Report, grid: np.ndarray) -> None:
    """report.json, report.md and held_out_pairs.png; UserError where they cannot be written."""
    text = json.dumps({"about": dict(about), "groups": report}, indent=1, ensure_ascii=False)
    for name, content in (("report.json", text + "\n"), ("report.md", to_markdown(report))):
        try:
            with replacing(folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {folder / name}: {error.strerror or error}") from error
    files.save_png(folder / "held_out_pairs.png", grid, about)

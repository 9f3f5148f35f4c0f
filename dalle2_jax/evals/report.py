"""The report of an evaluation: generated images of each group scored, beside true ones and chance.

For each group of (concept, style) pairs and each way of generating images, the judge's embeddings
answer four questions:

    concept   is the image nearer to "<concept> in <style>" than to 99 other concepts in that style?
    style     is it nearer to "<concept> in <style>" than to the same concept in the other styles?
    score     how near is it to its caption? (CLIP score)
    distance  how far is the set from the set of the true images? (Frechet and kernel distance)

The same scores of the true images are the ceiling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.data.emoji.words import STYLES
from dalle2_jax.errors import UserError
from dalle2_jax.evals import frechet, retrieval
from dalle2_jax.evals.groups import Group
from dalle2_jax.evals.judge import Judge
from dalle2_jax.evals.psnr import enlarge
from dalle2_jax.imaging import files, grids
from dalle2_jax.storage.atomic import replacing

TRUE_IMAGES = "true images"  # the name of their row
NUM_CANDIDATES = 100
_GRID_PAIRS, _GRID_COLUMNS, _GRID_SIDE = 24, 8, 96

Generator = Callable[[Group], np.ndarray]
"""Returns one image of each pair of a group: uint8 [n, h, w, 3]."""

Report = dict[str, Any]


def evaluate(
    judge: Judge,
    groups: Sequence[Group],
    concepts: Sequence[str],
    generators: Mapping[str, Generator],
    seed: int,
) -> tuple[Report, dict[str, dict[str, np.ndarray]]]:
    """Generates images of every group by every generator, and scores them and the true images.

    Args:
        judge: scores the images.
        groups: the pairs, and their true images.
        concepts: the pool that the other candidates of a retrieval are chosen from.
        generators: {row name: generator}.
        seed: chooses the candidates.

    Returns:
        The report as plain JSON values, {group: {"pairs", "candidates", "chance", "scores": {row:
        ...}, "items": [...]}}, and the images, {group: {row: uint8 [n, h, w, 3]}}.

    Raises:
        ValueError: a generator did not return one uint8 image for each pair.
    """
    embeddings = _PairEmbeddings(judge)
    report, images = {}, {}
    for group in groups:
        images[group.name] = {name: generate(group) for name, generate in generators.items()}
        for name, batch in images[group.name].items():
            if batch.dtype != np.uint8 or batch.shape[:1] != (len(group.pairs),):
                raise ValueError(
                    f"{name}: {batch.dtype} {batch.shape}, not {len(group.pairs)} uint8"
                )
        report[group.name] = _judge_group(embeddings, group, concepts, images[group.name], seed)
    return report, images


def _judge_group(
    embeddings: _PairEmbeddings,
    group: Group,
    concepts: Sequence[str],
    images: Mapping[str, np.ndarray],
    seed: int,
) -> Report:
    judge, pairs, n = embeddings.judge, group.pairs, len(group.pairs)
    # n rows of candidates, the target first: other concepts in its style, and its other styles.
    concept_rows = [
        retrieval.candidates(concepts, concept, NUM_CANDIDATES, str(seed), style)
        for concept, style in pairs
    ]
    style_rows = [[style, *(other for other in STYLES if other != style)] for _, style in pairs]
    k = len(concept_rows[0])
    z_concepts = embeddings(
        [(c, s) for (_, s), row in zip(pairs, concept_rows, strict=True) for c in row]
    ).reshape(n, k, -1)
    z_styles = embeddings(
        [(c, s) for (c, _), row in zip(pairs, style_rows, strict=True) for s in row]
    ).reshape(n, len(STYLES), -1)
    z_captions = judge.embed_captions(group.captions)
    z_true = judge.embed_images(group.images)

    scores = {}
    items: list[dict[str, Any]] = [{"caption": caption} for caption in group.captions]
    for name, batch in {**images, TRUE_IMAGES: group.images}.items():
        z_img = judge.embed_images(batch)
        concept_ranks = retrieval.ranks(z_img, z_concepts)
        style_ranks = retrieval.ranks(z_img, z_styles)
        concept, concept_error = retrieval.share(concept_ranks == 0)
        style, style_error = retrieval.share(style_ranks == 0)
        scores[name] = {
            "concept": concept,
            "concept_error": concept_error,
            "style": style,
            "style_error": style_error,
            "concept_median_rank": float(np.median(concept_ranks)) + 1,
            "clip_score": retrieval.clip_score(z_img, z_captions),
            **_distances(z_img, z_true),
        }
        for item, c, s in zip(items, concept_ranks.tolist(), style_ranks.tolist(), strict=True):
            item[name] = {"concept_rank": c + 1, "style_rank": s + 1}
    chance = {"concept": 100.0 / k, "style": 100.0 / len(STYLES)}
    if n > 1:  # the true images with each other's captions
        chance["clip_score"] = retrieval.clip_score(z_true, np.roll(z_captions, n // 2, axis=0))
    return {"pairs": n, "candidates": k, "chance": chance, "scores": scores, "items": items}


def _distances(z: np.ndarray, z_true: np.ndarray) -> dict[str, float]:
    """Returns both distances of unit embeddings [n, d]; none for a single image.

    The embeddings are scaled to a mean square of 1 per coordinate, which KID's kernel expects.
    """
    if len(z) < 2:
        return {}
    a, b = z * z.shape[1] ** 0.5, z_true * z.shape[1] ** 0.5
    return {
        "frechet_distance": frechet.frechet_distance(a, b),
        "kernel_distance": frechet.kernel_distance(a, b),
    }


class _PairEmbeddings:
    """A cache of the judge's embeddings of (concept, style) pairs."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._cache: dict[tuple[str, str], np.ndarray] = {}

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Returns the embeddings of pairs: [len(pairs), dim]."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._cache]
        if new:
            self._cache.update(zip(new, self.judge.embed_pairs(new), strict=True))
        return np.stack([self._cache[pair] for pair in pairs])


def to_markdown(report: Report) -> str:
    """Formats the report as a Markdown table, with a paragraph that explains its columns."""
    k = max(group["candidates"] for group in report.values())
    lines = [
        f"| | n | concept first of {k}, % | style first of {len(STYLES)}, % | CLIP score "
        "| Frechet distance | KID |",
        "|---|---|---|---|---|---|---|",
    ]
    for group_name, group in report.items():
        for name, score in group["scores"].items():
            cells = [
                f"{group_name}: {name}",
                str(group["pairs"]),
                f"{score['concept']:.0f} ± {score['concept_error']:.0f}",
                f"{score['style']:.0f} ± {score['style_error']:.0f}",
                f"{score['clip_score']:.1f}",
                _cell(score.get("frechet_distance"), 1),
                _cell(score.get("kernel_distance"), 3),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        chance = group["chance"]
        cells = [_cell(chance.get(column), 1) for column in ("concept", "style", "clip_score")]
        lines.append(f"| {group_name}: chance | | {' | '.join(cells)} | | |")
    return "\n".join(lines) + (
        "\n\nA judge CLIP that took no part in generating reads one image of each caption. Its "
        "text\nembeddings are means over the caption templates; ± is a standard error. CLIP score: "
        "100 cosines\nwith the image's own caption (chance: of true images with the captions of "
        "others). Frechet\ndistance and KID: in the judge's features, between the images and the "
        "true ones of the same\npairs; they depend on n.\n"
    )


def _cell(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"


def held_out_grid(group: Group, images: np.ndarray) -> np.ndarray:
    """Returns a labelled grid of up to 24 pairs, each generated image beside its true one.

    Args:
        group: the pairs and their true images.
        images: the generated images, uint8 [n, h, h, 3].

    Returns:
        uint8 [height, width, 3].
    """
    images = images[:_GRID_PAIRS]
    true = enlarge(group.images[:_GRID_PAIRS], images.shape[1])
    both = np.stack([images, true], axis=1).reshape(-1, *images.shape[1:])
    labels = [text for caption in group.captions[:_GRID_PAIRS] for text in (caption, "(true)")]
    scale = max(1, -(-_GRID_SIDE // images.shape[1]))
    return grids.labelled_grid(both, _GRID_COLUMNS, image_labels=labels, scale=scale)


def write(folder: Path, about: Mapping[str, Any], report: Report, grid: np.ndarray) -> None:
    """Writes report.json, report.md and held_out_pairs.png.

    Args:
        folder: an existing folder.
        about: versions, hashes and settings, written into report.json and the image's metadata.
        report: of `evaluate`.
        grid: of `held_out_grid`.

    Raises:
        UserError: a file cannot be written.
    """
    text = json.dumps({"about": dict(about), "groups": report}, indent=1, ensure_ascii=False)
    for name, content in (("report.json", text + "\n"), ("report.md", to_markdown(report))):
        try:
            with replacing(folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {folder / name}: {error.strerror or error}") from error
    files.save_png(folder / "held_out_pairs.png", grid, about)

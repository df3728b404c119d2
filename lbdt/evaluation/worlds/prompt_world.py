"""A world of any pipeline, any erasers and a user's own prompts, judged by a CLIP model if there is one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lbdt.activations.prompts import Prompt, read_prompts
from lbdt.evaluation.evaluated_world import EvaluatedWorld, Verdicts, one_seen
from lbdt.evaluation.worlds import PathOrRepo, saved_kinds
from lbdt.runs.digests import sha256

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lbdt.evaluation.metrics.clip import Clip

OBJECT_TEXT = "An image of {name}"
STYLE_TEXT = "{name} style"


class ClipJudge:
    """Zero-shot classes: the name whose text lies nearest to the picture. Ties go to the first.

    With a single style every picture would be of it, so then there is no verdict on styles.
    """

    single_label = True

    def __init__(self, clip: Clip, objects: Sequence[str], styles: Sequence[str]) -> None:
        """Underscores of names become spaces. ValueError: a single object, of which every picture would be."""
        if len(objects) < 2:
            raise ValueError(
                f"objects: expected two or more to choose from, got {', '.join(objects) or 'none'}"
            )
        styles = styles if len(styles) > 1 else ()
        self.clip = clip
        # Verdicts are kept under this name, and their numbers mean these classes.
        classes = sha256(repr((tuple(objects), tuple(styles))))[:8]
        self.name = (
            f"zero-shot by CLIP {clip.name}: {OBJECT_TEXT!r} of {len(objects)} objects, {STYLE_TEXT!r} of "
            f"{len(styles)} styles ({classes})"
        )
        self.features_name = f"CLIP image embedding of unit length ({clip.name})"
        self._objects, self._styles = (
            clip.texts([text.format(name=name.replace("_", " ")) for name in names])
            for text, names in ((OBJECT_TEXT, objects), (STYLE_TEXT, styles))
        )

    def __call__(self, pictures: Sequence[Image.Image]) -> Verdicts:
        """The verdicts on RGB pictures of any size."""
        features = self.clip.pictures(pictures)
        styles = (features @ self._styles.T).argmax(-1) if len(self._styles) else None
        objects = (features @ self._objects.T).argmax(-1)
        return Verdicts(one_seen(objects, len(self._objects)), styles, features)


def prompt_world(
    prompts: str | os.PathLike[str],
    *,
    model: PathOrRepo,
    erasers: Mapping[str, PathOrRepo],
    steering: Mapping[str, PathOrRepo] | None = None,
    strengths: Mapping[str, Sequence[float]] | None = None,
    clip: PathOrRepo | None = None,
    steps: int = 50,
    guidance: float | None = None,
    seeds: Sequence[int] | None = None,
    sweep_seeds: Sequence[int] | None = None,
    batch: int = 4,
) -> EvaluatedWorld:
    """The concepts and styles of a prompt file (`lbdt.activations.prompts.read_prompts`), in the order they come in.

    An evaluation takes one prompt per concept and style for a seed: of n rows with the same labels, seed s takes number
    s mod n. It starts from the row's own seed, plus (s // n) times (largest - smallest seed of the file + 1), so no two
    seeds start a text alike. Rows need not be a whole grid of concepts and styles.

    Args:
        prompts: .jsonl or .csv with the columns prompt, and where known concept, style, seed.
        model: diffusers pipeline, a folder or Hub repository; its own scheduler and size.
        erasers, steering, strengths: by name of the kind; see `lbdt.evaluation.worlds.saved_kinds`.
        clip: folder or Hub repository of a CLIP model, the judge; None, or a file of one concept: pictures are not
            classified.
        guidance: None: the pipeline's own.
        seeds: None: as many, from 0, as take every row once.
        sweep_seeds: None: the one after; its start noise is that of no row in the file.

    Raises:
        ValueError: what `read_prompts` and `saved_kinds` refuse, a row without a concept, two rows of one text and
            seed, a seed in both lists or below 0.
    """
    rows = read_prompts(prompts)
    _check_rows(os.fspath(prompts), rows)
    groups: dict[tuple[str | None, str | None], list[Prompt]] = {}
    for row in rows:
        groups.setdefault((row.concept, row.style), []).append(row)
    most = max(len(group) for group in groups.values())
    seeds = range(most) if seeds is None else seeds
    sweep_seeds = (most,) if sweep_seeds is None else sweep_seeds
    if not seeds or set(seeds) & set(sweep_seeds) or min(*seeds, *sweep_seeds, 0) < 0:
        raise ValueError(
            f"seeds: expected some >= 0, none of them in sweep_seeds, got {list(seeds)} and {list(sweep_seeds)}"
        )
    starts = [row.seed for row in rows]
    objects = tuple(dict.fromkeys(row.concept for row in rows))
    styles = tuple(dict.fromkeys(row.style for row in rows if row.style is not None))
    return EvaluatedWorld(
        name=f"prompts of {os.path.basename(os.fspath(prompts))}",
        objects=objects,
        styles=styles,
        prompts=partial(_seeded, list(groups.values()), max(starts) - min(starts) + 1),
        pipeline=partial(_pipeline, model),
        judge=None if clip is None or len(objects) < 2 else partial(_judge, clip, objects, styles),
        kinds=saved_kinds(erasers, steering or {}, strengths or {}, steps, guidance),
        seeds=tuple(seeds),
        sweep_seeds=tuple(sweep_seeds),
        batch=batch,
    )


def _check_rows(path: str, rows: Sequence[Prompt]) -> None:
    seen: set[tuple[str, int]] = set()
    for row in rows:
        if row.beside:
            raise ValueError(
                f"{path}: {row.text!r} has several concepts ({', '.join(row.shown)}), and pictures are scored by one; "
                "take it out"
            )
        if row.concept is None:
            raise ValueError(
                f"{path}: {row.text!r} has no concept, and pictures are scored by theirs; label every row, or "
                "take it out"
            )
        if (row.text, row.seed) in seen:
            raise ValueError(f"{path}: {row.text!r} comes twice with seed {row.seed}; give one another seed")
        seen.add((row.text, row.seed))


def _seeded(groups: Sequence[Sequence[Prompt]], stride: int, seed: int) -> list[Prompt]:
    chosen = []
    for rows in groups:
        turn, place = divmod(seed, len(rows))
        chosen.append(replace(rows[place], seed=rows[place].seed + turn * stride))
    return chosen


def _pipeline(model: PathOrRepo, device: torch.device) -> Any:
    from lbdt.activations.pipelines import load_pipeline

    return load_pipeline(model, device)


def _judge(clip: PathOrRepo, objects: Sequence[str], styles: Sequence[str], device: Any) -> ClipJudge:
    from lbdt.evaluation.metrics.clip import Clip

    return ClipJudge(Clip.from_pretrained(clip, device), objects, styles)

"""Features of unedited generations, which an artifact judge is fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lbdt.evaluation.evaluated_world import EvaluatedWorld, Judge
from lbdt.evaluation.evaluation import Evaluation
from lbdt.evaluation.jobs import Design, Job
from lbdt.evaluation.series import Series
from lbdt.evaluation.verdict_columns import Scorers
from lbdt.runs.processes import Processes


def unedited_features(
    world: EvaluatedWorld,
    kind: str,
    seeds: Sequence[int],
    out: Path,
    device: torch.device,
    judge: Judge,
    processes: Processes,
) -> Tensor:
    """float32 [n, F] of every prompt of `seeds` by the sampling of `kind`, in their order; made in `out`,
    resumably."""
    evaluation = Evaluation(
        world=world,
        kinds=[kind],
        design=Design(),
        out=out,
        device=device,
        seeds=tuple(seeds),
        sweep_seeds=(),
        concepts=world.objects,
        processes=processes,
        scorers=Scorers(judge=judge),
    )
    jobs = tuple(Job(prompt) for seed in seeds for prompt in world.prompts(seed))
    how = world.kinds[kind]
    series = Series(f"base-{how.steps}-{how.guidance}/unedited", how, "base", {}, jobs)
    evaluation.make("unedited", [series])
    return evaluation.columns(series).features

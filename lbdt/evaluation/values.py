"""The figures of a finished evaluation, as one JSON-like value that the report is written from.

    {"about": ..., "kinds": {NAME: {"sampling", "rows", "sweep", "padding", "sources", "avoid", "together",
    "per concept", "AR per style", "ratio", "activations", "grid"}}, "cost": ...}

A row that cannot be is there with a "note" that says why, and without figures.

Metrics are per cent, Frechet distances and CLIP scores in their own unit, each `{"mean", "low", "high",
"seeds"}` or None (not measured). "replaced" of "padding", "sources" and "avoid" is the mean over the timesteps of what
"ratio" has; elsewhere it is of all patches of the pictures' batches, both halves of guidance.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lbdt.donors import AVOIDED, SOURCES
from lbdt.evaluation.evaluation import Evaluation
from lbdt.evaluation.generation import generate
from lbdt.evaluation.jobs import Job, unedited
from lbdt.evaluation.metrics.accuracy import average, estimate, mean_by, named_seen
from lbdt.evaluation.metrics.activation_shift import WatchedRows, compare_settings
from lbdt.evaluation.series import Series
from lbdt.evaluation.series_plan import PADDINGS, SeriesPlan
from lbdt.evaluation.verdict_columns import Figures, VerdictColumns, figures, labels
from lbdt.runs.files import write_files

NO_GUIDANCE = "no guidance: not applicable"


def kind_values(evaluation: Evaluation, kind: str, strength: float | None) -> dict[str, Any]:
    """Everything about one kind. Every series must be complete."""
    plan = evaluation.plans[kind]
    by_class = evaluation.by_class(kind)
    scored = {series.method: series for series in plan.scored(strength, by_class)}
    base = evaluation.columns(scored["base"])
    rows, concepts, styles = [], {}, {}
    for method, series in scored.items():
        got = evaluation.columns(series)
        result = figures(evaluation.world, plan.scored_jobs, got, base, method != "base")
        settings = {} if method == "by class" else series.settings
        rows.append(_row(method, settings, result) | ({"classes": by_class} if method == "by class" else {}))
        if method == "base" and not plan.guided:
            rows.append({"method": "negative", "settings": {}, "note": NO_GUIDANCE})
        if method != "base":
            concepts[method], styles[method] = result.concepts, result.styles
    return {
        "sampling": {"steps": plan.kind.steps, "guidance": plan.kind.guidance},
        "rows": rows,
        "sweep": _sweep(evaluation, plan, strength),
        **_ablation(evaluation, plan, base),
        "together": [together_row(evaluation, series, order) for series, order in plan.together(strength)],
        "per concept": concepts,
        "AR per style": styles,
        "activations": _activations(evaluation, plan),
        "grid": _grid(evaluation, plan, scored),
    }


def _row(method: str, settings: Mapping[str, Any], result: Figures) -> dict[str, Any]:
    return {"method": method, "settings": dict(settings), **result.counts(), **result.row()}


def _sweep(evaluation: Evaluation, plan: SeriesPlan, strength: float | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    series = plan.sweep()
    if not series:
        return rows
    base = evaluation.columns(series[0])
    for each in series[1:]:
        result = figures(evaluation.world, plan.sweep_jobs, evaluation.columns(each), base, True)
        chosen = each.method == "steering" and each.settings["strength"] == strength
        rows.append(_row(each.method, each.settings, result) | {"chosen": chosen})
    return rows


def _ablation(evaluation: Evaluation, plan: SeriesPlan, base: VerdictColumns) -> dict[str, Any]:
    rows, ratio = [], {}
    jobs = plan.ablation_jobs
    series = plan.ablation()
    for number, each in enumerate(series):
        result = figures(evaluation.world, jobs, evaluation.columns(each), base, True)
        steps = replaced_by_step(evaluation, each, {job for part in jobs.values() for job in part})
        # The shares of whole batches would be of the main row's other pictures too, in one of the rows.
        share = average([100 * step["replaced"] for step in steps])
        rows.append(_row("per", each.settings, result) | {"replaced": estimate([share])})
        if number < len(PADDINGS):
            ratio[str(each.settings["padding"])] = steps
    count, end = len(PADDINGS), len(PADDINGS) + len(SOURCES)
    assert len(rows) == end + len(AVOIDED) - 1
    return {"padding": rows[:count], "sources": rows[count:end], "avoid": rows[end:], "ratio": ratio}


def replaced_by_step(evaluation: Evaluation, series: Series, jobs: set[Job]) -> list[dict[str, float]]:
    """Shares of the patches detected and replaced at each timestep, over the pictures of `jobs` whose prompt
    names the erased concept; conditional half."""
    files = evaluation.files(series)
    counts: Tensor | None = None
    patches, timesteps = 0, []
    for index, batch in enumerate(series.batches(files.size)):
        got = files.tensors(index, ("timesteps", "own", "cells"))
        places = [n for n, place in enumerate(got["own"].tolist()) if batch[place] in jobs]
        if not places:
            continue
        cells = got["cells"][places]
        here = torch.stack([(cells & bit > 0).sum(dim=(0, 2, 3)) for bit in (1, 2)])
        counts = here if counts is None else counts + here
        patches += cells.shape[0] * cells.shape[2] * cells.shape[3]
        timesteps = got["timesteps"].tolist()
    if counts is None:
        return []
    return [
        {
            "timestep": timestep,
            "detected": int(counts[0, n]) / patches,
            "replaced": int(counts[1, n]) / patches,
        }
        for n, timestep in enumerate(timesteps)
    ]


def together_row(evaluation: Evaluation, series: Series, order: str) -> dict[str, Any]:
    """UA over the erased objects, RA over the others, CRA over all styled pictures; each first averaged by
    object or style, of what was generated."""
    erased = series.jobs[0].erased
    row = {"method": series.method, "order": order, "erased": list(erased), "pictures": len(series.jobs)}
    got = evaluation.columns(series)
    if got.objects is None:
        return row | {"UA": None, "RA": None, "CRA": None}
    world = evaluation.world
    objects, styles = labels(world, series.jobs)
    places = got.rows(series.jobs)
    right = named_seen(got.objects[places], objects)
    gone = torch.tensor([job.prompt.concept in erased for job in series.jobs])
    styled = styles >= 0
    cra = None
    if got.styles is not None:
        cra = mean_by((got.styles[places] == styles).double()[styled], styles[styled])
    scores = {
        "UA": mean_by(1 - right[gone], objects[gone]),
        "RA": mean_by(right[~gone], objects[~gone]),
        "CRA": cra,
    }
    return row | {name: estimate([None if v is None else 100 * v]) for name, v in scores.items()}


def _activations(evaluation: Evaluation, plan: SeriesPlan) -> list[dict[str, Any]]:
    series = plan.sweep()
    rows = []
    for each in series:
        files = evaluation.files(each)
        count = len(each.batches(files.size))
        rows.append(torch.cat([files.tensors(index, ("watched",))["watched"] for index in range(count)]))
    if not rows:
        return []
    others = [
        WatchedRows(each.method, dict(each.settings), watched)
        for each, watched in zip(series[1:], rows[1:], strict=True)
    ]
    return compare_settings(rows[0], others)


def _grid(
    evaluation: Evaluation, plan: SeriesPlan, scored: Mapping[str, Series], count: int = 6
) -> list[dict[str, Any]]:
    """Pictures to look at: `count` concepts spread over the list, each in another style, of the first
    seed, and of two of these a pair where there is one."""
    jobs = next(iter(plan.scored_jobs.values()))
    own = [job for job in jobs if job.own]
    names = list(dict.fromkeys(job.erased[0] for job in own))
    count = min(count, len(names))
    chosen = [names[round(n * (len(names) - 1) / max(count - 1, 1))] for n in range(count)]
    rows = []
    for number, name in enumerate(chosen):
        mine = [job for job in own if job.erased == (name,)]
        rows.append(_grid_row(evaluation, scored, mine[number % len(mine)]))
    pairs = [job for job in jobs if job.beside is not None and job.erased[0] in chosen[:: max(count // 2, 1)]]
    first = {job.erased: job for job in reversed(pairs)}
    return rows + [_grid_row(evaluation, scored, job) for job in list(first.values())[::-1][:2]]


def _grid_row(evaluation: Evaluation, scored: Mapping[str, Series], job: Job) -> dict[str, Any]:
    prompt = job.prompt
    row = {"concept": prompt.concept, "beside": job.beside, "style": prompt.style, "seed": prompt.seed}
    for method, series in scored.items():
        row[method] = picture_path(evaluation, series, job if method != "base" else unedited(job))
    return row | {"mask": _mask(evaluation, scored, job)}


def picture_path(evaluation: Evaluation, series: Series, job: Job) -> str:
    """The picture of a job, relative to the evaluation's folder."""
    index, place = divmod(series.jobs.index(job), evaluation.world.batch)
    return f"{series.name}/{evaluation.files(series).names(index)[place]}"


def _mask(evaluation: Evaluation, scored: Mapping[str, Series], job: Job) -> str:
    from lbdt.evaluation.pictures import rate_tile

    bare = evaluation.files(scored["base"])
    index, place = divmod(scored["base"].jobs.index(unedited(job)), bare.size)
    picture = bare.pictures(index)[place]
    series = scored["per"]
    files = evaluation.files(series)
    index, place = divmod(series.jobs.index(job), files.size)
    got = files.tensors(index, ("own", "cells"))
    cells = got["cells"][got["own"].tolist().index(place)]
    data = io.BytesIO()
    rate_tile(picture, (cells & 2 > 0).float().mean(0)).save(data, format="PNG")
    name = picture_path(evaluation, series, job).replace("/", "-")
    write_files(evaluation.out / "masks", {name: data.getvalue()})
    return f"masks/{name}"


def measured_cost(
    evaluation: Evaluation, kind: str, strength: float | None, rounds: int = 3, pictures: int = 4
) -> dict[str, Any]:
    """Seconds a picture without and with each method, which take turns; medians over the rounds."""
    plan = evaluation.plans[kind]
    jobs = [job for part in plan.scored_jobs.values() for job in part if job.own][:pictures]
    times: dict[str, list[float]] = {}
    prepared = [(series, series.editors()) for series in plan.scored(strength, evaluation.by_class(kind))]
    for number in range(rounds + 1):
        for series, editors in prepared:
            mine = [unedited(job) for job in jobs] if series.method == "base" else jobs
            start = time.perf_counter()
            generate(evaluation.pipe, series, editors, mine, None, evaluation.world.noise)
            if number:  # the first round warms up
                times.setdefault(series.method, []).append((time.perf_counter() - start) / len(jobs))
    return {name: statistics.median(values) for name, values in times.items()} | {"unit": "seconds a picture"}

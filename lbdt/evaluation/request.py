"""An evaluation as a command asks for it: its subject, its settings, and the processes that share the work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lbdt.evaluation.evaluated_world import EvaluatedWorld
from lbdt.evaluation.evaluation import Evaluation
from lbdt.evaluation.jobs import Design, unedited
from lbdt.evaluation.report.write import read_values, write
from lbdt.evaluation.values import kind_values, measured_cost
from lbdt.evaluation.verdict_columns import Scorers
from lbdt.runs.extras import needed
from lbdt.runs.folder import held
from lbdt.runs.processes import joined_on, launched, spawn
from lbdt.runs.writable import check_out_folder

_MOST = 8
SAMPLED = Design(others=6, pairs=2, empty=1, sweep_own=3, sweep_others=3)
"""The design on EmojiCanvas: hours on two cores instead of days."""
QUICK = Design(
    own=1,
    others=1,
    pairs=1,
    empty=1,
    sweep_own=1,
    sweep_others=1,
    by_class=False,
    strengths=1,
    ablation_own=1,
    ablation_others=0,
    counts=(3,),
    per_object=1,
    one_after_another=False,
)


@dataclass(frozen=True)
class EvaluationSubject:
    """What is evaluated, as the command line says it."""

    world: str
    """ "canvas", "unlearncanvas", or a file of prompts."""
    model: str | None = None
    erasers: Mapping[str, str] | None = None
    """Folder or Hub repository, by the name of the kind; None: EmojiCanvas's."""
    steering: Mapping[str, str] | None = None
    strengths: Mapping[str, tuple[float, ...]] | None = None
    object_classifier: str | None = None
    style_classifier: str | None = None
    clip: str | None = None
    steps: int | None = None
    guidance: float | None = None
    batch: int | None = None
    task: str = "object"
    template: str = "saeuron"
    noise: str | None = None
    judged: str | None = None
    cra: str | None = None
    compared: str | None = None

    def load(self) -> EvaluatedWorld:
        """The world; ValueError for what does not fit together."""
        erasers, steering, strengths = self.erasers or {}, self.steering or {}, self.strengths or {}
        self._check_use()
        given = {
            name: value
            for name, value in (("steps", self.steps), ("guidance", self.guidance), ("batch", self.batch))
            if value is not None
        }
        if self.world == "canvas":
            return self._canvas(given)
        if self.model is None or not erasers:
            raise ValueError(f"--world {self.world}: expected --model and --eraser with it")
        if self.world == "unlearncanvas":
            from lbdt.evaluation.worlds.unlearncanvas import unlearncanvas

            return unlearncanvas(
                base=self.model,
                erasers=erasers,
                steering=steering,
                strengths=strengths,
                object_classifier=self.object_classifier,
                style_classifier=self.style_classifier,
                task=self.task,
                template=self.template,
                **self._rules(),
                **given,
            )
        from lbdt.evaluation.worlds.prompt_world import prompt_world

        return prompt_world(
            self.world,
            model=self.model,
            erasers=erasers,
            steering=steering,
            strengths=strengths,
            clip=self.clip,
            **given,
        )

    def _check_use(self) -> None:
        """ValueError for what would be ignored."""
        if not self.erasers and (self.steering or self.strengths):
            raise ValueError("--steering, --strengths: expected --eraser with them, whose baseline they set")
        only = (self.object_classifier, self.style_classifier, self.task, self.template)
        if self.world != "unlearncanvas" and (only != (None, None, "object", "saeuron") or self._rules()):
            raise ValueError(
                "--object-classifier, --style-classifier, --task, --template, --noise, --judged, --cra, --compared: "
                f"expected --world unlearncanvas with them, got --world {self.world}"
            )

    def _rules(self) -> dict[str, str]:
        """Those of UnlearnCanvas that were given."""
        given = {name: getattr(self, name) for name in ("noise", "judged", "cra", "compared")}
        return {name: value for name, value in given.items() if value is not None}

    def _canvas(self, given: Mapping[str, Any]) -> EvaluatedWorld:
        from functools import partial

        from lbdt.activations.pipelines import load_pipeline
        from lbdt.canvas import KINDS
        from lbdt.evaluation.worlds import saved_kinds
        from lbdt.evaluation.worlds.canvas_world import canvas_world

        sampling = KINDS["saeuron"]
        kinds = None
        if self.erasers:
            kinds = saved_kinds(
                self.erasers,
                self.steering or {},
                self.strengths or {},
                given.get("steps", sampling.steps),
                given.get("guidance", sampling.guidance),
            )
        pipeline = None if self.model is None else partial(load_pipeline, self.model)
        world = canvas_world(kinds, pipeline, **({"batch": given["batch"]} if "batch" in given else {}))
        if not self.erasers:
            changed = {name: value for name, value in given.items() if name != "batch"}
            names = {name: replace(kind, **changed) for name, kind in world.kinds.items()}
            # The shipped artifact judges know the shipped samplings only.
            world = replace(world, kinds=names, reference=None if changed else world.reference)
        return world


@dataclass(frozen=True)
class EvaluationRequest:
    """How it is evaluated."""

    subject: EvaluationSubject
    kinds: tuple[str, ...]
    """The kinds that are compared; none given: all."""
    concepts: tuple[str, ...]
    seeds: tuple[int, ...]
    sweep_seeds: tuple[int, ...]
    quick: bool
    own: int | None
    others: int | None
    out: Path
    threads: int
    device: str
    vlm: str | None
    nudity: str | None

    def design(self) -> Design:
        """How many pictures."""
        if self.quick:
            design = QUICK
        elif self.subject.world == "canvas":
            design = SAMPLED
        else:
            design = Design(sweep_own=5, sweep_others=5)
        changed = {name: getattr(self, name) for name in ("own", "others") if getattr(self, name) is not None}
        return replace(design, **changed)


def evaluate(request: EvaluationRequest, *, processes: int | None, command: str) -> dict[str, Any]:
    """Generates what is missing in `request.out` and writes the report there; returns the figures for JSON.

    `processes`: how many share the work here, None: one a core (at most 8) or CUDA device. Started by
    torchrun or `accelerate launch`, the processes are those. The figures do not depend on it.
    """
    _check_packages(request)
    check_out_folder(request.out)
    if launched().size > 1:
        return _work(request, command)
    count = _processes(request.device) if processes is None else processes
    _check_devices(count, request.device)
    if count == 1:
        return _work(request, command)
    spawn(count, _work, request, command)
    return read_values(request.out)


def _check_packages(request: EvaluationRequest) -> None:
    """ImportError before an hour of pictures, not after it."""
    needed("lbdt evaluate", "evaluate", "torchmetrics", "scipy")
    if request.nudity is not None:
        needed("--nudity", "nudity", "nudenet")


def _check_devices(count: int, device: str) -> None:
    if count > 1 and device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available():
        most = 1 if ":" in device else torch.cuda.device_count()
        if count > most:
            raise ValueError(
                f"--processes {count}: expected at most {most} with --device {device}, one a CUDA device"
            )


def _processes(device: str) -> int:
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.device_count()
    return 1 if device not in ("auto", "cpu") else min(len(os.sched_getaffinity(0)), _MOST)


def _work(request: EvaluationRequest, command: str) -> dict[str, Any]:
    """This process's share; the first process puts the report together. Other processes return nothing."""
    from lbdt.bench import hardware

    with contextlib.ExitStack() as stack:
        processes, device = stack.enter_context(joined_on(request.device))
        if processes.main:
            stack.enter_context(held(request.out, "lbdt evaluate"))
        if device.type == "cpu":
            # A picture's last bits depend on the number of threads.
            torch.set_num_threads(request.threads)
        world = request.subject.load()
        evaluation = Evaluation(
            world=world,
            kinds=request.kinds or tuple(world.kinds),
            design=request.design(),
            out=request.out,
            device=device,
            seeds=request.seeds or (world.seeds[:1] if request.quick else world.seeds),
            sweep_seeds=request.sweep_seeds or world.sweep_seeds,
            concepts=request.concepts or world.objects,
            processes=processes,
        )
        evaluation.scorers = _scorers(request, world, device)
        strengths = evaluation.run()
        if not processes.main:
            return {}
        values = {
            "about": {
                **evaluation.about(),
                "quick": request.quick,
                "command": command,
                **hardware.describe(device),
                "threads": request.threads,
                "processes": processes.size,
            },
            "kinds": {kind: kind_values(evaluation, kind, strengths[kind]) for kind in evaluation.kinds},
            "cost": {kind: measured_cost(evaluation, kind, strengths[kind]) for kind in evaluation.kinds},
        }
        if request.nudity is not None:
            values["nudity"] = _nudity(evaluation, strengths, request.nudity)
        write(values, request.out)
        return values


def _scorers(request: EvaluationRequest, world: EvaluatedWorld, device: torch.device) -> Scorers:
    clip = vlm = None
    if request.subject.clip is not None:
        from lbdt.evaluation.metrics.clip import Clip

        clip = Clip.from_pretrained(request.subject.clip, device)
    if request.vlm is not None:
        from lbdt.evaluation.metrics.vlm import ArtifactJudge

        vlm = ArtifactJudge.from_pretrained(request.vlm, device)
    return Scorers(judge=world.judge(device) if world.judge else None, vlm=vlm, clip=clip)


def _nudity(evaluation: Evaluation, strengths: Mapping[str, float | None], preset: str) -> dict[str, Any]:
    """Counts by kind and method, of the pictures of the main rows."""
    from lbdt.evaluation.metrics.nudity import PRESETS, count_nudity, detect_nudity

    counts: dict[str, Any] = {}
    for kind, plan in evaluation.plans.items():
        for series in plan.scored(strengths[kind], evaluation.by_class(kind)):
            files = evaluation.files(series)
            jobs = {job for part in plan.scored_jobs.values() for job in part}
            if series.method == "base":
                jobs = set(map(unedited, jobs))
            paths = [
                files.folder / name
                for index, batch in enumerate(series.batches(files.size))
                for job, name in zip(batch, files.names(index), strict=True)
                if job in jobs  # a series may hold pictures of the ablations too
            ]
            detections, version = detect_nudity(paths)
            found = count_nudity(detections, PRESETS[preset], version)
            counts.setdefault(kind, {})[series.method] = {
                "count": found.count,
                "pictures": found.pictures,
                "share": found.share,
                "rule": found.describe(),
            }
    return counts

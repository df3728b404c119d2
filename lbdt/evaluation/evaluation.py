"""Running an evaluation: generate what is missing, choose the steering's strength, generate the rest."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lbdt.editors import UnetEditor
from lbdt.evaluation.evaluated_world import EvaluatedWorld
from lbdt.evaluation.generation import generate
from lbdt.evaluation.jobs import Design
from lbdt.evaluation.metrics.accuracy import average
from lbdt.evaluation.metrics.feature_distances import SMALLEST, FeatureJudge
from lbdt.evaluation.series import Series, SeriesFiles
from lbdt.evaluation.series_plan import SeriesPlan
from lbdt.evaluation.verdict_columns import Scorers, VerdictColumns, columns, figures, scored_clip, scored_vlm
from lbdt.runs.processes import Processes
from lbdt.runs.wording import require_unicode, short, slug

_LONGEST = 100


def check_kind_name(name: str) -> None:
    """ValueError unless `name` can head a column of figures and a line of a spreadsheet, in which `=`, `+`, `-` and `@`
    begin formulas."""
    if not name.isprintable() or not (name[:1].isalnum() or name[:1] == "_") or len(name) > _LONGEST:
        raise ValueError(
            f"kind {short(name, _LONGEST)!r}: expected a name of at most {_LONGEST} visible characters that begins "
            "with a letter or digit; give another NAME in NAME=DIR"
        )


@dataclass
class Evaluation:
    """One evaluation in one folder."""

    world: EvaluatedWorld
    kinds: Sequence[str]
    design: Design
    out: Path
    device: torch.device
    seeds: tuple[int, ...]
    sweep_seeds: tuple[int, ...]
    concepts: tuple[str, ...]
    processes: Processes = field(default_factory=Processes)
    scorers: Scorers = field(default_factory=Scorers)
    progress: bool = True

    def __post_init__(self) -> None:
        for name in self.kinds:
            check_kind_name(name)
        unknown = [name for name in self.kinds if name not in self.world.kinds]
        if unknown or not self.kinds:
            raise ValueError(
                f"kinds: {', '.join(unknown) or 'none given'}; {self.world.name} has "
                f"{', '.join(self.world.kinds)}"
            )
        strange = [name for name in self.concepts if name not in self.world.objects]
        if strange or not self.concepts:
            raise ValueError(
                f"concepts: {', '.join(strange) or 'none given'}; {self.world.name} knows "
                f"{', '.join(self.world.objects)}"
            )
        self.concepts = tuple(dict.fromkeys(self.concepts))
        both = sorted(set(self.seeds) & set(self.sweep_seeds))
        if both or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(
                f"seeds: expected some, each once, other than those of the sweep; got {list(self.seeds)}, "
                f"and {list(self.sweep_seeds)} of the sweep"
            )
        if len(set(self.sweep_seeds)) != len(self.sweep_seeds):
            raise ValueError(f"sweep seeds: expected each once, got {list(self.sweep_seeds)}")
        self._check_prompts()
        self.plans = {
            name: SeriesPlan(
                self.world, self.world.kinds[name], self.design, self.seeds, self.sweep_seeds, self.concepts
            )
            for name in self.kinds
        }
        self._check_kinds()
        self._columns: dict[str, VerdictColumns] = {}
        self._digests: dict[tuple[str, str, str], str] = {}
        self._saved_strengths: dict[str, Any] = {}
        self._judges: dict[Path, FeatureJudge] = {}

    @cached_property
    def pipe(self) -> Any:
        """The world's pipeline, loaded when it is first asked for."""
        pipe = self.world.pipeline(self.device)
        if getattr(pipe, "safety_checker", None) is not None:
            pipe.safety_checker = None  # it would blacken pictures that are to be scored
        if self.world.scheduler is not None:
            pipe.scheduler = self.world.scheduler(pipe)
        return pipe

    @cached_property
    def _about(self) -> dict[str, Any]:
        from lbdt.activations.pipelines import fingerprint

        return {
            "versions": {package: version(package) for package in ("torch", "diffusers", "transformers")},
            "world": self.world.name,
            "pipeline": fingerprint(self.pipe),
            "device": self.device.type,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            **({} if self.world.noise is None else {"noise": self.world.noise.name}),
        }

    def run(self) -> dict[str, float | None]:
        """Generates and judges every picture that is not there yet, this process's share of them. All
        processes return when all are done, with the chosen strength of each kind.

        Raises ValueError before the first picture where an eraser or its baseline does not fit the pipeline."""
        for plan in self.plans.values():
            for editor in self._editors(plan):
                editor.attach(self.pipe, concepts=list(self.concepts[:1]), seed=0).remove()
            plan.texts.editing(self.concepts[:1]).attach(self.pipe).remove()
        swept = [series for plan in self.plans.values() for series in (*plan.sweep(), *plan.sweep_by_class())]
        self.make("sweep", list({series.name: series for series in swept}.values()))
        strengths = {name: self.strength(name) for name in self.kinds}
        rest = []
        for name, plan in self.plans.items():
            rest += [*plan.scored(strengths[name], self.by_class(name)), *plan.ablation()]
            rest += [series for series, _ in plan.together(strengths[name])]
        self.make("pictures", rest)
        self._columns.clear()  # an artifact judge may be fitted only now
        return strengths

    def strength(self, kind: str) -> float | None:
        """The strength with the largest mean of UA, IRA and CRA on the sweep's pictures (of equal ones the
        weakest), one for all concepts (METHOD.md, 5.6). None: no baseline, no sweep or no judge; then the baseline is
        taken as it comes."""
        plan = self.plans[kind]
        best: tuple[float, float] | None = None
        for series in plan.sweep():
            if series.method != "steering" or self.scorers.judge is None:
                continue
            row = figures(self.world, plan.sweep_jobs, self.columns(series), None, True).row()
            mean = average([row[name] and row[name]["mean"] for name in ("UA", "IRA", "CRA")])
            strength = series.settings["strength"]
            if mean is not None and (best is None or (mean, -abs(strength)) > (best[0], -abs(best[1]))):
                best = (mean, strength)
        return None if best is None else best[1]

    def by_class(self, kind: str) -> dict[str, dict[str, Any]] | None:
        """The strength, and perhaps the selection, for each concept with the largest mean of its UA and IRA on the
        sweep's pictures, of equal ones the weakest, and of these the first: the choice of SAeUron and SAEmnesia
        (METHOD.md, 5.6). None: nothing to choose from, or no judge."""
        plan = self.plans[kind]
        tried = plan.sweep_by_class()
        if len(tried) < 2 or self.scorers.judge is None:
            return None
        found = [
            figures(self.world, plan.sweep_jobs, self.columns(series), None, True).concepts
            for series in tried
        ]
        chosen = {}
        for concept in self.concepts:
            means = [average([each[concept]["UA"], each[concept]["IRA"]]) for each in found]
            if None in means:
                return None
            order = [
                (-mean, abs(s.settings["strength"]), n)
                for n, (mean, s) in enumerate(zip(means, tried, strict=True))
            ]
            chosen[concept] = dict(tried[min(order)[2]].settings)
        return chosen

    def columns(self, series: Series) -> VerdictColumns:
        """Verdicts on a complete series."""
        key = f"{series.name} {series.kind.name}"
        if key not in self._columns:
            self._columns[key] = columns(self.files(series), self._scorers(series.kind.name))
        return self._columns[key]

    def files(self, series: Series) -> SeriesFiles:
        """The folder of a series."""
        about = self._about
        if series.texts is not None:
            about = {**about, "method parts": series.texts.digest(series.method)}
        elif series.method != "base":
            about = {**about, "method parts": self._parts(series)}
        if series.method == "steering" and "strength" not in series.settings:
            about = {**about, "strength": self._saved_strength(series.kind.name)}
        return SeriesFiles(self.out, series, self.world.batch, about)

    def _parts(self, series: Series) -> str:
        kind = series.kind.name
        key = kind, series.method, repr(series.settings.get("selection"))
        if key not in self._digests:
            # With its settings: a steering baseline may have no strength of its own.
            self._digests[key] = series.editors()[0].digest()
        return self._digests[key]

    def _saved_strength(self, kind: str) -> Any:
        if kind not in self._saved_strengths:
            self._saved_strengths[kind] = self.world.kinds[kind].steering().strength
        return self._saved_strengths[kind]

    def _scorers(self, kind: str) -> Scorers:
        if self.scorers.artifacts is not None or self.scorers.judge is None:
            return self.scorers
        judge = self.world.reference(kind) if self.world.reference else self._fitted(kind)
        return replace(self.scorers, artifacts=judge)

    def _fitted(self, kind: str) -> FeatureJudge | None:
        """The judge of the main row's unedited pictures; None before they are there, or where they are too few."""
        files = self.files(self.plans[kind].base())
        count = len(files.series.batches(files.size))
        if len(files.series.jobs) < SMALLEST or not all(files.has(index) for index in range(count)):
            return None
        if files.folder not in self._judges:
            verdicts = [files.judge(index, self.scorers.judge) for index in range(count)]
            self._judges[files.folder] = FeatureJudge.fit(
                torch.cat([verdict.features for verdict in verdicts])
            )
        return self._judges[files.folder]

    def _check_prompts(self) -> None:
        # What cannot be written would be noticed when the first files of its series are.
        for name in (*self.world.objects, *self.world.styles):
            require_unicode("a concept or style", name)
        for seed in (*self.seeds, *self.sweep_seeds):
            if not 0 <= seed < 2**63:
                raise ValueError(f"seeds: expected integers in [0, 2^63), got {seed}")
            prompts = list(self.world.prompts(seed))
            prompts += [] if self.world.empty is None else self.world.empty(seed)
            prompts += [] if self.world.pairs is None else [pair.prompt for pair in self.world.pairs(seed)]
            for prompt in prompts:
                require_unicode("a prompt", prompt.text)

    def _check_kinds(self) -> None:
        folders: dict[str, str] = {}
        for name, plan in self.plans.items():
            # Some file systems do not tell large letters from small ones.
            other = folders.setdefault(slug(name).lower(), name)
            if other != name:
                raise ValueError(f"kinds: {other} and {name} would share the folder {slug(name)}; rename one")
            strengths = plan.kind.strengths if plan.kind.steering is not None else ()
            if len(set(strengths)) != len(strengths) or not all(map(math.isfinite, strengths)):
                raise ValueError(
                    f"kind {name}: expected finite strengths, each once, got {', '.join(map(str, strengths))}"
                )
            for editor in self._editors(plan):
                unknown = sorted(set(self.concepts) - set(editor.concepts))
                if unknown:
                    raise ValueError(f"kind {name}: its {editor.KIND} does not know {', '.join(unknown)}")
            self._check_selections(plan)

    def _check_selections(self, plan: SeriesPlan) -> None:
        # One that selects nothing would end the sweep in the middle of it.
        for series in {str(s.settings.get("selection")): s for s in plan.sweep_by_class()}.values():
            editor = series.editors()[0]
            for concept in self.concepts:
                try:
                    editor.select(concept)
                except ValueError as error:
                    chosen = series.settings.get("selection", "its own")
                    raise ValueError(f"kind {plan.kind.name}: selection {chosen}: {error}") from error

    def _editors(self, plan: SeriesPlan) -> list[UnetEditor]:
        """The eraser of a kind, and its baseline where it has one."""
        editors: list[UnetEditor] = [plan.kind.per()]
        if plan.kind.steering is not None:
            swept = plan.strengths and self.sweep_seeds and self.world.judge is not None
            # Without a sweep that chooses one, it must have been saved with a strength.
            settings = plan.steering_settings(plan.strengths[0] if swept else None)
            editors.append(plan.kind.steering(**settings))
        return editors

    def make(self, label: str, wanted: Sequence[Series]) -> None:
        """Generates and judges this process's batches of these series, then waits for the others'."""
        files = {series.name: self.files(series) for series in wanted}
        if self.processes.main:
            for each in files.values():
                each.prepare()
        self.processes.wait()
        tasks = [
            (each, index) for each in files.values() for index in range(len(each.series.batches(each.size)))
        ]
        mine = tasks[self.processes.rank :: self.processes.size]
        missing = [task for task in mine if not task[0].has(task[1])]
        sizes = [len(each.series.batches(each.size)[index]) for each, index in missing]
        editors: tuple[str, list[UnetEditor]] = ("", [])
        with tqdm(
            total=sum(sizes),
            desc=f"{label} ({self.processes.rank + 1}/{self.processes.size})",
            unit="picture",
            file=sys.stderr,
            position=self.processes.rank,
            disable=not self.progress or not missing,
            smoothing=0.1,
        ) as bar:
            for each, index in mine:
                if not each.has(index):
                    if editors[0] != each.series.name:
                        editors = (each.series.name, each.series.editors())
                    jobs = each.series.batches(each.size)[index]
                    hookpoint = self.plans[each.series.kind.name].hookpoint if each.series.watched else None
                    made = generate(self.pipe, each.series, editors[1], jobs, hookpoint, self.world.noise)
                    each.write(index, *made)
                    bar.update(len(jobs))
                self._judge(each, index)
        self.processes.wait()

    def _judge(self, files: SeriesFiles, index: int) -> None:
        # Here, so that the processes share this work too; what is kept is read again for the tables.
        if self.scorers.judge is not None:
            files.judge(index, self.scorers.judge)
        if self.scorers.vlm is not None:
            scored_vlm(files, index, self.scorers.vlm)
        if self.scorers.clip is not None:
            scored_clip(files, index, self.scorers.clip)

    def about(self) -> dict[str, Any]:
        """What the report says of how it was measured."""
        judge = self.scorers.judge
        return {
            "world": self.world.name,
            "seeds": list(self.seeds),
            "noise": "prompt" if self.world.noise is None else self.world.noise.name,
            **({} if self.world.rules is None else {"rules": self.world.rules}),
            "sweep seeds": list(self.sweep_seeds),
            "judge": judge.name if judge else None,
            "features": judge.features_name if judge else None,
            "artifacts": self._artifact_rule(),
            "design": self.design.describe(self.world, len(self.concepts)),
            "by text": self._by_text(),
            "gate": self._gates(),
        }

    def _by_text(self) -> str:
        """How the methods that work by text were told of a concept, by the example of the first one."""
        texts = next(iter(self.plans.values())).texts
        name = self.concepts[0]
        edits = texts.editing((name,))
        return (
            f"negative prompt of {name}: {texts.negative((name,))!r}; UCE of {name}: "
            f"{len(edits.edits)} texts such as {edits.edits[0][0]!r} mapped to such as {edits.edits[0][1]!r}, "
            f"{len(edits.preserve)} preserved (those of all other objects, and of none), scales "
            f"{edits.erase_scale:g} and {edits.preserve_scale:.3g}, ridge {edits.ridge:g}, states of {edits.tokens} "
            "tokens"
        )

    def _gates(self) -> str:
        without = [name for name, plan in self.plans.items() if not plan.gated]
        if not without:
            return "every eraser has one; the row without it treats pictures from one detected patch on"
        return f"{', '.join(without)}: the eraser has none, so PER without the gate is PER, and has no row"

    def _artifact_rule(self) -> str | None:
        if self.scorers.vlm is not None:
            return f"{self.scorers.vlm.name} was asked, in our words: {self.scorers.vlm.question}"
        if self.scorers.judge is None:
            return None
        rule, fitted = FeatureJudge.RULE, "the unedited pictures of the same prompts"
        if self.world.reference:
            rule, fitted = self.world.reference(self.kinds[0]).RULE, "other unedited generations"
        return (
            f"{rule} {self.scorers.judge.features_name} over the 99th "
            f"percentile of {fitted}; AR is of pictures whose prompt names the erased concept, AR others of the rest"
        )

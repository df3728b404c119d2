"""Adversarial prefixes against an eraser, pair by pair, and UA before and after: what `lbdt attack` does."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lbdt.activations.pipelines import fingerprint, package_versions
from lbdt.activations.prompts import Prompt
from lbdt.attack import PUBLISHED, AttackFolder, AttackOutcome, AttackSettings, PrefixSearch, summarise
from lbdt.attack import unlearncanvas as published
from lbdt.attack.prefixed_text import PrefixedText
from lbdt.canvas.defaults import NAME, canvas_prompts, eraser_of, pipeline_of, steering_of
from lbdt.editors import UnetEditor
from lbdt.evaluation.worlds.unlearncanvas import prompt_text
from lbdt.runs.digests import sha256
from lbdt.runs.folder import held
from lbdt.runs.processes import awaited, launched_on
from lbdt.runs.wording import require_unicode
from lbdt.runs.writable import check_out_folder

_STEPS = 20
_QUICK = {"iterations": 20, "timesteps": 10}


@dataclass(frozen=True)
class AttackRequest:
    """What is attacked, and how long; None and empty: the defaults."""

    model: str | None
    eraser: str | None
    kind: str
    """EmojiCanvas's eraser, and the sampling it was made for."""
    steer: bool
    strength: float | None
    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    judge: str | None
    """MODULE:FUNCTION."""
    tokens: int
    iterations: int | None
    timesteps: int | None
    check_every: int
    search: str
    quick: bool
    steps: int | None
    guidance: float | None
    position: str = "prefix"
    judged: str = "typed"
    world: str = "canvas"
    """ "canvas": EmojiCanvas, or `model` with prompts of its own. "unlearncanvas": the published pairs and sampling."""
    task: str = "object"
    """What is erased of UnlearnCanvas: "object" | "style"."""
    classifier: str | None = None
    """UnlearnCanvas' judge: the classifier's file or folder."""

    @property
    def method(self) -> str:
        """The method's name on the command line."""
        return "steering" if self.steer else "per"

    def load(self) -> UnetEditor:
        """The eraser, or the steering of the same folder."""
        if not self.steer:
            return eraser_of(self.eraser, self.kind)
        return steering_of(self.eraser, self.kind, self.strength)

    def settings(self) -> AttackSettings:
        """The settings of the search."""
        given = {name: getattr(self, name) for name in _QUICK}
        chosen = (_QUICK if self.quick else {}) | {n: v for n, v in given.items() if v is not None}
        steps, guidance = self.steps, self.guidance
        if self.world == "unlearncanvas":
            steps = published.STEPS if steps is None else steps
            guidance = published.GUIDANCE if guidance is None else guidance
        elif self.model is None:
            from lbdt.canvas import KINDS

            steps = KINDS[self.kind].steps if steps is None else steps
            guidance = KINDS[self.kind].guidance if guidance is None else guidance
        return AttackSettings(
            tokens=self.tokens,
            check_every=self.check_every,
            search=self.search,
            position=self.position,
            judged=self.judged,
            steps=_STEPS if steps is None else steps,
            guidance=guidance,
            **chosen,
        )

    def prompts(self, known: Sequence[str], seed: int) -> list[Prompt]:
        """One for each concept (of `known`, the eraser's) and style; ValueError for a style that there is not."""
        concepts, styles = tuple(dict.fromkeys(self.concepts)), tuple(dict.fromkeys(self.styles))
        if self.world == "unlearncanvas":
            return published.pairs(self.task, concepts, styles, known, seed, self.quick)
        concepts = concepts or tuple(known)[:: 5 if self.quick else 1]
        if self.model is not None:
            return [_prompt(c, s, seed) for c in concepts for s in styles or (None,)]
        from lbdt.canvas import STYLES

        styles = styles or STYLES[:: 3 if self.quick else 1]
        unknown = [name for name in styles if name not in STYLES]
        if unknown:
            raise ValueError(f"--style {unknown[0]}: {NAME} has the styles {', '.join(STYLES)}")
        there = {(p.concept, p.style): p for p in canvas_prompts([seed])}
        missing = [name for name in concepts if (name, None) not in there]
        if missing:
            raise ValueError(
                f"--concept {missing[0]}: {NAME} draws no such object; give --model with --eraser"
            )
        return [there[c, s] for c in concepts for s in styles]


def attack_pairs(
    request: AttackRequest, *, out: Path | None, threads: int, seed: int, device: str
) -> dict[str, Any]:
    """Attacks the pairs that are not in `out` yet; returns the figures for JSON.

    Started by torchrun or `accelerate launch`, every process attacks its share, and they meet by files in `out`.
    Everything that can be refused is refused before the first picture is generated.
    """
    start = time.perf_counter()
    world, where = launched_on(device)
    if world.size > 1 and out is None:
        raise ValueError("--out: several processes meet by files; give a folder")
    if out is not None:
        check_out_folder(out)
    settings = request.settings()
    loaded = request.load()
    for name in request.concepts:
        loaded.select(name)
    for style in request.styles:
        require_unicode("--style", style)
    prompts = request.prompts(loaded.concepts, seed)
    judge, judge_name = _judge_of(request, where)
    pipe = pipeline_of(request.model, where)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # it would blacken pictures that are to be judged
    if request.world == "unlearncanvas":
        published.prepared(pipe)
    search = PrefixSearch(pipe, loaded, judge, settings)
    for prompt in prompts:
        PrefixedText(pipe, prompt.text, settings.tokens, settings.position)
    loaded.attach(pipe, [prompts[0].concept], seed=seed).remove()
    folder, found = None, {}
    seconds = []
    with contextlib.ExitStack() as stack:
        if out is not None:
            stack.enter_context(held(out, "lbdt attack", shared=world.size > 1))
            about = _settings(request, settings, loaded, pipe, where, threads, seed)
            folder = AttackFolder(out, about | {"judge": judge_name})
            found = {p: o for p in prompts if (o := folder.load(p)) is not None}
        resumed = len(found)
        own = [prompt for prompt in prompts[world.rank :: world.size] if prompt not in found]
        with _bar(len(own) * settings.timesteps, world.main) as bar, _threads(threads, where):
            for prompt in own:
                began = time.perf_counter()
                found[prompt] = search.run(prompt, bar.update)
                seconds.append(time.perf_counter() - began)
                if folder is not None:
                    folder.save(prompt, found[prompt])
        if world.main and folder is not None:
            _wait(folder, prompts, found, world.size)
    outcomes = [found[prompt] for prompt in prompts if prompt in found]
    return {
        "world": request.world,
        "model": request.model or NAME,
        "judge": judge_name,
        "eraser": request.eraser or f"{NAME}, {request.kind}",
        "method": request.method,
        **loaded.settings,
        "attack": asdict(settings),
        "seed": seed,
        "device": str(where),
        "process": world.rank,
        "processes": world.size,
        "out": None if out is None else str(out),
        "resumed": resumed,
        "summary": None if (total := summarise(outcomes)) is None else total.to_dict(),
        "concepts": {name: s.to_dict() for name, s in _by_concept(outcomes).items()},
        "pairs": [outcome.to_dict() for outcome in outcomes],
        "published_on_UnlearnCanvas": [
            dict(zip(("method", "before", "after", "effectiveness"), row, strict=True)) for row in PUBLISHED
        ],
        "seconds_per_pair": sum(seconds) / len(seconds) if seconds else None,
        "seconds": time.perf_counter() - start,
    }


def _prompt(concept: str, style: str | None, seed: int) -> Prompt:
    """The prompt by the published template; its start seed does not depend on which other pairs are attacked."""
    number = int(sha256(f"{seed}/{concept}/{style or ''}")[:12], 16)
    return Prompt(prompt_text(concept, style, "saeuron"), concept, style, number)


def _judge_of(
    request: AttackRequest, where: torch.device
) -> tuple[Callable[[Sequence[Any]], Sequence[str]], str]:
    """The judge, and what it is called."""
    if request.world == "unlearncanvas":
        names = published.ClassifierNames(request.classifier, request.task, where)
        return names, names.name
    if request.judge is None:
        return _canvas_judge, NAME
    return _judge(request.judge), request.judge


def _canvas_judge(pictures: Sequence[Any]) -> list[str]:
    """The object of each picture that is seen most clearly, or "nothing"."""
    import torch

    from lbdt import canvas

    with torch.inference_mode():
        best = canvas.classifiers()["object"](canvas.as_tensor(pictures)).max(1)
    return [
        canvas.OBJECTS[index] if logit > 0 else "nothing"
        for logit, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _judge(name: str) -> Callable[[Sequence[Any]], Sequence[str]]:
    """The function that MODULE:FUNCTION names; ValueError where there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--judge {name}: not found ({error}); expected MODULE:FUNCTION that Python can import"
        ) from error
    if not callable(found):
        raise ValueError(f"--judge {name}: expected a function, got {type(found).__name__}")
    return found


def _settings(
    request: AttackRequest,
    settings: AttackSettings,
    loaded: UnetEditor,
    pipe: Any,
    where: torch.device,
    threads: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that an outcome follows from, but its prompt; JSON-like."""
    return {
        "versions": package_versions(),
        "device": where.type,
        "threads": threads if where.type == "cpu" else None,
        "fingerprint": fingerprint(pipe),
        "method": request.method,
        "eraser": loaded.settings,
        "eraser_sha256": loaded.digest(),
        "attack": asdict(settings),
        "seed": seed,
    }


def _wait(
    folder: AttackFolder, prompts: Sequence[Prompt], found: dict[Prompt, AttackOutcome], processes: int
) -> None:
    """Returns when the other processes' pairs are there too."""

    def complete() -> bool | None:
        missing = [prompt for prompt in prompts if prompt not in found]
        found.update({p: o for p in missing if (o := folder.load(p)) is not None})
        return all(prompt in found for prompt in prompts) or None

    awaited(complete, f"attack: waiting for the pairs of the other processes ({processes} in all)")


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total, desc="attack", unit="timestep", disable=not shown, file=sys.stderr, mininterval=1
    )


@contextlib.contextmanager
def _threads(count: int, where: torch.device) -> Iterator[None]:
    before = torch.get_num_threads()
    if where.type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _by_concept(outcomes: Sequence[AttackOutcome]) -> dict[str, Any]:
    names = dict.fromkeys(outcome.concept for outcome in outcomes)
    return {name: summarise(o for o in outcomes if o.concept == name) for name in names}

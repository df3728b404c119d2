"""The page's third tab: which latents stand for a concept, from which activation on, and what fires them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import gradio as gr

from lbdt.app import charts
from lbdt.app.examples import ExampleSet, LatentExample, Progress, compute_examples
from lbdt.app.inspecting import LatentCurve, concept_table, curves, examples
from lbdt.app.parts import BUSY, PRIVATE, ended, failed, followed, said, table
from lbdt.app.streaming import Waiting
from lbdt.app.world import World

_HEAD = ["concept", "latents", "fires on it, %", "on others, %"]


class _Found(NamedTuple):
    """What there is to show of a latent."""

    text: str
    pictures: list[Any] | None = None
    """Pictures with captions; None: none are stored, or there is no such latent."""
    computable: bool = False
    """Whether they can be made on demand."""


class InspectTab:
    """The controls, and what they do. Made within `gr.Blocks`."""

    def __init__(self, world: World) -> None:
        self._world = world
        kind = world.kinds[0]
        editor = world.editor(kind)
        concept = "Cats" if "Cats" in editor.concepts else editor.concepts[0]
        drawn = curves(editor, concept)
        latents = [str(curve.latent) for curve in drawn]
        with gr.Row():
            self.kind = gr.Dropdown(
                list(world.kinds),
                value=kind,
                label="Dictionary of eraser",
                visible=len(world.kinds) > 1,
                elem_id="dictionary",
            )
            self.concept = gr.Dropdown(
                list(editor.concepts), value=concept, filterable=True, label="Concept", elem_id="concept"
            )
            self.latent = gr.Dropdown(
                latents,
                value=latents[0],
                allow_custom_value=True,
                label="Latent",
                info="Or any number",
                elem_id="latent",
            )
        with gr.Row():
            self.scores = gr.HTML(_scores(concept, drawn), elem_id="scores")
            self.thresholds = gr.HTML(_thresholds(concept, drawn), elem_id="thresholds")
        found = self._examples(kind, latents[0])
        with gr.Row():
            self.make = gr.Button("Compute its examples", visible=found.computable, elem_id="compute")
            self.stop = gr.Button(
                "Cancel computing", interactive=False, visible=found.computable, elem_id="cancel-compute"
            )
        self.status = gr.HTML(said(found.text), elem_id="inspect-status")
        self.gallery = gr.Gallery(
            found.pictures,
            label="Patches that fire it most",
            columns=6,
            height=380,
            object_fit="contain",
            format="png",
            interactive=False,
            buttons=[],
            elem_id="examples",
        )
        self.table = gr.HTML(_rows(editor), elem_id="concept-table")
        shown = [self.latent, self.scores, self.thresholds, self.status, self.gallery, self.make, self.stop]
        self.kind.input(
            self._of_kind, [self.kind], [self.concept, self.table, *shown], queue=False, **PRIVATE
        )
        self.concept.input(self._of_concept, [self.kind, self.concept], shown, queue=False, **PRIVATE)
        self.latent.input(self._of_latent, [self.kind, self.latent], shown[3:], queue=False, **PRIVATE)
        self.make.click(
            self._compute,
            [self.kind, self.latent],
            shown[3:],
            concurrency_limit=None,
            **PRIVATE,
        )
        self.stop.click(self._cancel, None, None, queue=False, **PRIVATE)

    def _of_kind(self, kind: Any) -> dict[Any, Any]:
        if kind not in self._world.kinds:
            return {self.status: said(f"Eraser: expected one of {', '.join(self._world.kinds)}.", alert=True)}
        editor = self._world.editor(kind)
        concept = "Cats" if "Cats" in editor.concepts else editor.concepts[0]
        named = gr.Dropdown(list(editor.concepts), value=concept)
        return {self.concept: named, self.table: _rows(editor), **self._of_concept(kind, concept)}

    def _of_concept(self, kind: Any, concept: Any) -> dict[Any, Any]:
        if kind not in self._world.kinds or concept not in self._world.editor(kind).concepts:
            return {self.status: said("Concept: choose one of the list.", alert=True)}
        drawn = curves(self._world.editor(kind), concept)
        latents = [str(curve.latent) for curve in drawn]
        return {
            self.latent: gr.Dropdown(latents, value=latents[0]),
            self.scores: _scores(concept, drawn),
            self.thresholds: _thresholds(concept, drawn),
            **self._of_latent(kind, latents[0]),
        }

    def _of_latent(self, kind: Any, latent: Any) -> dict[Any, Any]:
        found = self._examples(kind, latent)
        return {
            self.status: said(found.text, alert=found.pictures is None and not found.computable),
            self.gallery: found.pictures or None,
            self.make: gr.Button(visible=found.computable),
            self.stop: gr.Button(visible=found.computable, interactive=False),
        }

    def _examples(self, kind: Any, latent: Any) -> _Found:
        if kind not in self._world.kinds:
            return _Found(f"Eraser: expected one of {', '.join(self._world.kinds)}.")
        editor = self._world.editor(kind)
        number = _number(latent)
        if number is None or not 0 <= number < editor.sae.config.num_latents:
            return _Found(f"Latent: expected a number from 0 to {editor.sae.config.num_latents - 1}.")
        stored = examples(editor, number)
        if stored is None:
            return _Found(f"No examples of latent {number} are stored.", computable=True)
        return _Found(_told(number, stored), _pictures(stored))

    def _compute(self, request: gr.Request, kind: Any, latent: Any) -> Iterator[dict[Any, Any]]:
        found = self._examples(kind, latent)
        if not found.computable:
            yield {self.status: said(found.text, alert=True)}
            return
        with self._world.place(request.session_hash) as visit:
            if visit is None:
                yield {self.status: said(BUSY, alert=True)}
                return
            yield from self._made(visit.begin_comparison(), kind, int(latent))

    def _made(self, cancel: threading.Event, kind: str, number: int) -> Iterator[dict[Any, Any]]:
        editor, made = self._world.editor(kind), None
        yield {self.make: gr.Button(interactive=False), self.stop: gr.Button(interactive=True)}
        try:
            prompts = self._world.example_prompts(editor)
            sampling = self._world.defaults(kind)
            for event in followed(
                compute_examples(
                    self._world.pipe,
                    editor,
                    [number],
                    prompts,
                    steps=sampling.steps,
                    guidance=sampling.guidance,
                    cancelled=cancel.is_set,
                )
            ):
                if isinstance(event, Waiting):
                    yield {self.status: said(f"{event.ahead} before you ...")}
                elif isinstance(event, Progress):
                    yield {self.status: said(f"{event.done} of {event.of} pictures ...")}
                elif isinstance(event, ExampleSet):
                    made = event.of(number)
        except Exception as error:
            yield {
                self.status: said(failed(error), alert=True),
                **ended(self.make, self.stop),
            }
            return
        if made is None:
            yield {self.status: said("Cancelled."), **ended(self.make, self.stop)}
            return
        yield {
            self.status: said(_told(number, made)),
            self.gallery: _pictures(made),
            **ended(self.make, self.stop),
        }

    def _cancel(self, request: gr.Request) -> None:
        if (visit := self._world.visit(request.session_hash)) is not None:
            visit.cancel_comparison.set()


def _number(latent: Any) -> int | None:
    text = str(latent).strip() if isinstance(latent, str | int) and not isinstance(latent, bool) else ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _pictures(found: tuple[LatentExample, ...]) -> list[Any]:
    return [(one.framed(), f"{one.value:.2f} at timestep {one.timestep:g}") for one in found]


def _told(latent: int, found: tuple[LatentExample, ...]) -> str:
    if not found:
        return f"Latent {latent} fires in none of the pictures that were looked at."
    return f"Latent {latent}: the {len(found)} pictures with the patches that fire it most, framed."


def _rows(editor: Any) -> str:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    rows = [
        [row.concept, ", ".join(map(str, row.latents)), percent(row.on), percent(row.off)]
        for row in concept_table(editor)
    ]
    return table("Concepts and their latents", _HEAD, rows)


def _scores(concept: str, drawn: tuple[LatentCurve, ...]) -> str:
    series = {str(c.latent): list(zip(c.timesteps, c.scores, strict=True)) for c in drawn}
    return charts.lines(f"Scores of {concept}'s latents", "timestep", "score", series)


def _thresholds(concept: str, drawn: tuple[LatentCurve, ...]) -> str:
    series = {
        str(c.latent): [(t, v) for t, v in zip(c.timesteps, c.thresholds, strict=True) if v is not None]
        for c in drawn
    }
    return charts.lines(f"Thresholds of {concept}'s latents", "timestep", "activation", series)

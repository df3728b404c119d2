"""The page's second tab: one prompt and seed by every method, with how far activations move."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from lbdt.app import charts
from lbdt.app.asked import Asked, AskedError, asked_of, strengths_of
from lbdt.app.comparing import ComparedPicture, base_prompts, compare
from lbdt.app.examples import Progress
from lbdt.app.parts import BUSY, PRIVATE, ended, failed, followed, said, table
from lbdt.app.streaming import Waiting
from lbdt.app.world import World

if TYPE_CHECKING:
    from lbdt.app.settings import PictureSettings
    from lbdt.editors import ConceptEraser, Steering

_HEAD = ["method", "seconds", "activations outside, %"]
_NO_STEERING = "Strengths: this page's eraser cannot steer, and its log says why; leave them empty."
_NAMES = {"without": "without", "per": "PER", "steering": "steering", "negative": "negative prompt"}


class CompareTab:
    """The controls, and what they do. Made within `gr.Blocks`."""

    def __init__(self, world: World, inputs: list[Any]) -> None:
        """`inputs`: the controls that `Asked` is made of."""
        self._world = world
        gr.Markdown(
            "The picture of the tab Erase, by PER, by steering at several strengths and by a negative prompt. Under "
            "each: its share of the hooked block's activations beyond the unedited model's 0.1 and 99.9 percentiles; "
            "of usual pictures of the unedited model 0.2 %."
        )
        with gr.Row():
            self.strengths = gr.Textbox(
                "-1, -2, -5, -10", label="Strengths of the steering", max_length=100, elem_id="strengths"
            )
            self.go = gr.Button("Compare", variant="primary", elem_id="compare")
            self.stop = gr.Button("Cancel comparison", interactive=False, elem_id="cancel-compare")
        self.status = gr.HTML(said("Press Compare."), elem_id="compare-status")
        self.grid = gr.Gallery(
            label="Pictures",
            columns=4,
            height=520,
            object_fit="contain",
            format="png",
            interactive=False,
            buttons=[],
            elem_id="grid",
        )
        self.table = gr.HTML(_table([]), elem_id="stats")
        self.curve = gr.HTML(_curve([]), elem_id="outside")
        outputs = [self.status, self.grid, self.table, self.curve, self.go, self.stop]
        self.go.click(
            self._compare,
            [self.strengths, *inputs],
            outputs,
            concurrency_limit=None,
            **PRIVATE,
        )
        self.stop.click(self._cancel, None, None, queue=False, **PRIVATE)

    def _compare(self, request: gr.Request, strengths: Any, *fields: Any) -> Iterator[dict[Any, Any]]:
        try:
            settings, eraser = asked_of(Asked(*fields), self._world)
            chosen = strengths_of(strengths, self._world.limits.strengths)
        except AskedError as error:
            yield {self.status: said(str(error), alert=True)}
            return
        try:
            steering = self._world.editor(settings.kind, "steering") if chosen else None
        except (ValueError, OSError) as error:
            failed(error)
            yield {self.status: said(_NO_STEERING, alert=True)}
            return
        with self._world.place(request.session_hash) as visit:
            if visit is None:
                yield {self.status: said(BUSY, alert=True)}
                return
            yield from self._made(visit.begin_comparison(), settings, eraser, steering, chosen)

    def _made(
        self,
        cancel: threading.Event,
        settings: PictureSettings,
        eraser: ConceptEraser,
        steering: Steering | None,
        chosen: list[float],
    ) -> Iterator[dict[Any, Any]]:
        cells, full = [], 3 + len(chosen)
        yield {
            self.status: said("Waiting for the model ..."),
            self.grid: None,
            self.table: _table([]),
            self.curve: _curve([]),
            self.go: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
        }
        base = base_prompts() if self._world.is_canvas else ()
        try:
            for event in followed(
                compare(
                    self._world.pipe, eraser, steering, settings, chosen, cancelled=cancel.is_set, base=base
                )
            ):
                if isinstance(event, ComparedPicture):
                    cells.append(event)
                yield self._seen(event, cells)
        except Exception as error:
            yield {
                self.status: said(failed(error), alert=True),
                **ended(self.go, self.stop),
            }
            return
        text = "Done." if len(cells) == full else "Cancelled."
        yield {self.status: said(text), **ended(self.go, self.stop)}

    def _seen(
        self, event: Waiting | Progress | ComparedPicture, cells: list[ComparedPicture]
    ) -> dict[Any, Any]:
        if isinstance(event, Waiting):
            return {self.status: said(f"{event.ahead} before you ...")}
        if isinstance(event, Progress):
            return {self.status: said(f"Pictures of the unedited model: {event.done} of {event.of} (once)")}
        return {
            self.status: said(f"{_label(event)} is done."),
            self.grid: [(cell.picture, _caption(cell)) for cell in cells if cell.picture is not None],
            self.table: _table(cells),
            self.curve: _curve(cells),
        }

    def _cancel(self, request: gr.Request) -> None:
        if (visit := self._world.visit(request.session_hash)) is not None:
            visit.cancel_comparison.set()


def _table(cells: list[ComparedPicture]) -> str:
    rows = [[_label(cell), _shown(cell.seconds, 2), _shown(cell.outside, 2)] for cell in cells]
    return table("Activation statistics", _HEAD, rows)


def _label(cell: ComparedPicture) -> str:
    name = _NAMES[cell.method] + (f" {cell.strength:g}" if cell.strength is not None else "")
    return name if cell.picture is not None else f"{name}: {cell.note}"


def _caption(cell: ComparedPicture) -> str:
    return f"{_label(cell)}: {_shown(cell.outside, 2)} % outside, {_shown(cell.seconds, 1)} s"


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _curve(cells: list[ComparedPicture]) -> str:
    series = {_label(cell): cell.outside_by_step for cell in cells if cell.picture is not None}
    return charts.lines("Activations outside, by timestep", "timestep", "%", series)

"""The page's first tab: a picture without and with the eraser, as they emerge, and where it looked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lbdt.app import charts
from lbdt.app.asked import Asked, AskedError, asked_of, fields_of
from lbdt.app.erasing import WITH, WITHOUT, EmergingStep, ErasedPicture, emerge, overlay
from lbdt.app.parts import BUSY, PRIVATE, ended, failed, followed, said
from lbdt.app.settings import PictureSettings
from lbdt.app.streaming import Waiting
from lbdt.app.world import Making, World
from lbdt.canvas import prompt as canvas_prompt
from lbdt.canvas.scenes import OBJECTS, STYLES
from lbdt.donors import AVOIDED, SOURCES

_LEFT = "The picture as the model makes it"
_RIGHT = "The same seed, concepts erased"


class EraseTab:
    """The controls, and what they do. Made within `gr.Blocks`."""

    def __init__(self, world: World) -> None:
        self._world = world
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self._ask()
            with gr.Column(scale=5, min_width=320):
                self._show()
        self._wire()

    def _ask(self) -> None:
        world, first = self._world, self._world.editor(self._world.kinds[0])
        start = fields_of(world.defaults(world.kinds[0], _first_prompt(world)), world)
        self.prompt = gr.Textbox(
            start.prompt, label="Prompt", lines=2, max_length=world.limits.prompt, elem_id="prompt"
        )
        if world.is_canvas:
            with gr.Row():
                self.objects = gr.Dropdown(
                    list(OBJECTS),
                    value=["Dogs", "Cats"],
                    multiselect=True,
                    max_choices=2,
                    label="Objects",
                    elem_id="objects",
                )
                self.style = gr.Dropdown(list(STYLES), value="Sketch", label="Style", elem_id="style")
        self.concepts = gr.Dropdown(
            list(first.concepts),
            value=list(start.concepts),
            multiselect=True,
            max_choices=world.limits.concepts,
            filterable=True,
            label="Concepts to erase",
            info="Type to search",
            elem_id="concepts",
        )
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id="generate")
            self.stop = gr.Button("Cancel", interactive=False, elem_id="cancel")
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self.kind = gr.Dropdown(
                list(world.kinds),
                value=start.kind,
                label="Eraser",
                visible=len(world.kinds) > 1,
                elem_id="kind",
            )
            self.seed = gr.Number(
                start.seed, label="Seed", precision=0, minimum=0, maximum=2**53, elem_id="seed"
            )
            self.steps = gr.Slider(
                1, world.limits.steps, value=start.steps, step=1, label="Denoising steps", elem_id="steps"
            )
            self.guidance = gr.Number(
                start.guidance,
                label="Guidance scale",
                info="0: none",
                minimum=0,
                maximum=50,
                elem_id="guidance",
            )
            self.padding = gr.Slider(
                0,
                world.limits.padding,
                value=start.padding,
                step=1,
                label="Padding, patches",
                elem_id="padding",
            )
            self.source = gr.Dropdown(list(SOURCES), value=start.source, label="Donors", elem_id="source")
            self.avoid = gr.Dropdown(
                list(AVOIDED),
                value=start.avoid,
                label="Concepts whose patches are no donors",
                elem_id="avoid",
            )
            self.gate = gr.Number(
                start.min_patches,
                label="Gate, patches",
                info="Fewer are left; 1: off, 0: as calibrated",
                precision=0,
                minimum=0,
                maximum=1 << 20,
                elem_id="gate",
            )
            self.load = gr.UploadButton(
                "Load settings", file_types=[".json"], type="binary", size="sm", elem_id="load"
            )

    def _show(self) -> None:
        self.status = gr.HTML(said("Choose concepts and press Generate."), elem_id="status")
        with gr.Row(equal_height=True):
            self.without = _picture(_LEFT, "without")
            self.erased = _picture(_RIGHT, "erased")
        with gr.Row(equal_height=True):
            with gr.Column(min_width=280):
                self.masked = _picture("Where the SAE saw the concepts", "masked")
                self.slider = gr.Slider(
                    1, 2, value=1, step=1, label="Step", interactive=False, buttons=[], elem_id="step"
                )
            with gr.Column(min_width=280):
                self.curve = gr.HTML(_curve([]), elem_id="curve")
                self.times = gr.HTML(said(""), elem_id="times")
        with gr.Row():
            self.picture_file = gr.DownloadButton(
                "Download picture", interactive=False, size="sm", elem_id="picture-file"
            )
            self.settings_file = gr.DownloadButton(
                "Download settings", interactive=False, size="sm", elem_id="settings-file"
            )

    def inputs(self) -> list[Any]:
        """The controls that `Asked` is made of, in its order."""
        return [
            self.prompt,
            self.concepts,
            self.kind,
            self.seed,
            self.steps,
            self.guidance,
            self.padding,
            self.source,
            self.avoid,
            self.gate,
        ]

    def _outputs(self) -> list[Any]:
        shown = [self.without, self.erased, self.masked, self.slider, self.curve, self.times]
        return [self.status, *shown, self.picture_file, self.settings_file, self.go, self.stop]

    def _wire(self) -> None:
        self.go.click(
            self._generate,
            self.inputs(),
            self._outputs(),
            concurrency_limit=None,
            **PRIVATE,
        )
        self.stop.click(self._cancel, None, None, queue=False, **PRIVATE)
        # Of quick changes the last one counts, whichever answer comes first.
        last = {"trigger_mode": "always_last", "queue": False, **PRIVATE}
        self.slider.input(self._slide, [self.slider], [self.masked], **last)
        self.load.upload(self._load, [self.load], [self.status, *self.inputs()], queue=False, **PRIVATE)
        self.kind.input(self._defaults, [self.kind], self.inputs()[1:], queue=False, **PRIVATE)
        if self._world.is_canvas:
            for picker in (self.objects, self.style):
                picker.input(_prompt_of, [self.objects, self.style], [self.prompt], **last)

    def _generate(self, request: gr.Request, *fields: Any) -> Iterator[dict[Any, Any]]:
        try:
            settings, editor = asked_of(Asked(*fields), self._world)
        except AskedError as error:
            yield {self.status: said(str(error), alert=True)}
            return
        with self._world.place(request.session_hash) as visit:
            if visit is None:
                yield {self.status: said(BUSY, alert=True)}
                return
            making = visit.begin()
            yield self._begun()
            try:
                wanted = making.cancel.is_set
                for event in followed(emerge(self._world.pipe, editor, settings, cancelled=wanted)):
                    yield self._seen(event, making, visit.folder)
            except Exception as error:
                yield self._ended(failed(error), alert=True)
                return
            if making.done is None:
                yield self._ended("Cancelled.")

    def _begun(self) -> dict[Any, Any]:
        return {
            self.status: said("Waiting for the model ..."),
            self.without: None,
            self.erased: None,
            self.masked: None,
            self.slider: gr.Slider(interactive=False),
            self.curve: _curve([]),
            self.times: said(""),
            self.picture_file: gr.DownloadButton(interactive=False),
            self.settings_file: gr.DownloadButton(interactive=False),
            self.go: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
        }

    def _seen(
        self, event: Waiting | EmergingStep | ErasedPicture, making: Making, folder: Path
    ) -> dict[Any, Any]:
        if isinstance(event, Waiting):
            return {self.status: said(f"{event.ahead} before you ...")}
        if isinstance(event, ErasedPicture):
            making.done = event
            return self._done(event, making, folder)
        place = {WITHOUT: self.without, WITH: self.erased}[event.half]
        which = {WITHOUT: "Without", WITH: "With"}[event.half]
        seen: dict[Any, Any] = {
            self.status: said(f"{which} the eraser: step {event.step + 1} of {event.steps}")
        }
        if event.preview is not None:
            seen[place] = event.preview
        if event.half == WITH:
            making.steps.append(event)
            seen[self.curve] = _curve(making.steps)
            if event.preview is not None:
                seen[self.masked] = overlay(event.preview, event.mask)
        return seen

    def _done(self, event: ErasedPicture, making: Making, folder: Path) -> dict[Any, Any]:
        picture, settings = _files(event, folder)
        report, last = event.report, len(making.steps)
        slower = 100 * (event.seconds_with / event.seconds_without - 1)
        told = f"Done: {report.detected:.1%} of the patches detected, {report.replaced:.1%} replaced, over all steps."
        if report.gated:
            told += f" The gate left the picture at {report.gated} of {len(report.steps)} steps."
        return self._ended(told) | {
            self.without: event.without,
            self.erased: event.erased,
            self.masked: self._at(making, last),
            self.slider: gr.Slider(minimum=1, maximum=max(2, last), value=last, interactive=last > 1),
            self.curve: _curve(making.steps),
            self.times: said(
                f"{event.seconds_without:.2f} s without, {event.seconds_with:.2f} s with the eraser ({slower:+.1f} %)."
            ),
            self.picture_file: gr.DownloadButton(value=picture, interactive=True),
            self.settings_file: gr.DownloadButton(value=settings, interactive=True),
        }

    def _ended(self, text: str, alert: bool = False) -> dict[Any, Any]:
        return {self.status: said(text, alert), **ended(self.go, self.stop)}

    def _cancel(self, request: gr.Request) -> None:
        if (visit := self._world.visit(request.session_hash)) is not None:
            visit.making.cancel.set()

    def _slide(self, step: int, request: gr.Request) -> Any:
        visit = self._world.visit(request.session_hash)
        return None if visit is None else self._at(visit.making, step)

    @staticmethod
    def _at(making: Making, step: Any) -> Any:
        """The emerging picture after a step, from 1, with its mask."""
        if not isinstance(step, int | float) or not 1 <= step <= len(making.steps):
            return None
        event = making.steps[int(step) - 1]
        return None if event.preview is None else overlay(event.preview, event.mask)

    def _load(self, data: bytes | None) -> dict[Any, Any]:
        try:
            if not data or len(data) > self._world.limits.upload:
                raise AskedError(f"expected a file of settings of at most {self._world.limits.upload} bytes")
            fields = fields_of(PictureSettings.from_json(data, "this file"), self._world)
            asked_of(fields, self._world)
        except (AskedError, ValueError, TypeError) as error:
            return {self.status: said(f"Settings not loaded: {error}", alert=True)}
        shown = dict(zip(self.inputs(), fields, strict=True))
        return {self.status: said("Settings loaded. Generate repeats their picture."), **shown}

    def _defaults(self, kind: str) -> list[Any]:
        """The settings of another eraser."""
        if kind not in self._world.kinds:
            return [gr.skip()] * (len(self.inputs()) - 1)
        fields = fields_of(self._world.defaults(kind), self._world)
        kept = {1: gr.skip(), 2: gr.skip(), 3: gr.skip()}
        return [kept.get(place, value) for place, value in enumerate(fields)][1:]


def _picture(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label,
        format="png",
        type="pil",
        interactive=False,
        height=300,
        buttons=["fullscreen"],
        elem_id=name,
        elem_classes=["picture"],
        alt_text=label,
    )


def _curve(steps: Sequence[EmergingStep]) -> str:
    counted = [(event.timestep, *event.mask.counts()) for event in steps if event.mask is not None]
    series = {
        "detected": [(timestep, detected) for timestep, detected, _ in counted],
        "replaced": [(timestep, replaced) for timestep, _, replaced in counted],
    }
    return charts.lines("Patches by timestep", "timestep", "patches", series)


def _files(event: ErasedPicture, folder: Path) -> tuple[str, str]:
    """The picture and its settings, as the only files of this visitor: Gradio has copies of those before."""
    for path in folder.iterdir():
        path.unlink(missing_ok=True)
    stem = f"lbdt-{event.settings.seed}-{time.time_ns():x}"
    picture, settings = folder / f"{stem}.png", folder / f"{stem}.json"
    event.erased.save(picture)
    settings.write_text(event.settings.to_json())
    return str(picture), str(settings)


def _prompt_of(objects: list[str], style: str) -> str:
    known = [name for name in objects or [] if name in OBJECTS][:2]
    return canvas_prompt(known, style if style in STYLES else None)


def _first_prompt(world: World) -> str:
    return _prompt_of(["Dogs", "Cats"], "Sketch") if world.is_canvas else ""

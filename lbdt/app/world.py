"""What a page shows: a pipeline, its erasers, what may be asked of them, and who is looking."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbdt.app.erasing import EmergingStep, ErasedPicture
from lbdt.app.settings import PictureSettings, load_editor

if TYPE_CHECKING:
    import torch

    from lbdt.activations.prompts import Prompt
    from lbdt.editors import ConceptEraser

MOST_VISITS = 64
"""Visitors whose last pictures are kept; of more the one for whom nothing is made for longest is forgotten."""


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for."""

    steps: int = 100
    prompt: int = 500
    """Characters."""
    concepts: int = 10
    strengths: int = 6
    padding: int = 8
    """Patches."""
    waiting: int = 16
    """Pictures, comparisons and examples that are made or wait for the pipeline; for more one has to come again."""
    upload: int = 1 << 16
    """Bytes of a settings file."""


@dataclass
class Making:
    """A picture that is made, or was."""

    cancel: threading.Event = field(default_factory=threading.Event)
    steps: list[EmergingStep] = field(default_factory=list)
    """Those with the eraser."""
    done: ErasedPicture | None = None


@dataclass
class Visit:
    """One visitor's last picture, and whether the one that is being made is still wanted."""

    folder: Path
    """Files to download, of this visitor only."""
    making: Making = field(default_factory=Making)
    cancel_comparison: threading.Event = field(default_factory=threading.Event)
    asking: int = 0
    """What is made for this visitor, or waits."""

    def begin(self) -> Making:
        """Ends what this visitor had asked for before; what begins."""
        self.making.cancel.set()
        self.making = Making()
        return self.making

    def begin_comparison(self) -> threading.Event:
        """The same of a comparison or of computed examples."""
        self.cancel_comparison.set()
        self.cancel_comparison = threading.Event()
        return self.cancel_comparison


class World:
    """A pipeline with its erasers, and the visitors of a page."""

    def __init__(
        self,
        device: torch.device,
        model: str | None = None,
        eraser: str | None = None,
        kind: str = "saeuron",
        limits: Limits | None = None,
    ) -> None:
        """`model`, `eraser`: folders or repositories; None: EmojiCanvas, with `kind` as the one that is shown first.

        Raises:
            ValueError, OSError: none there.
        """
        from lbdt.canvas.defaults import pipeline_of

        self.model, self.eraser, self.limits = model, eraser, limits or Limits()
        self.kinds = _kinds(kind) if eraser is None else (kind,)
        self._editors: dict[tuple[str, str], Any] = {}
        self._visits: OrderedDict[str, Visit] = OrderedDict()
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._asking = threading.BoundedSemaphore(self.limits.waiting)
        self.editor(self.kinds[0])
        self.pipe = pipeline_of(model, device)
        self._root = Path(tempfile.mkdtemp(prefix="lbdt-app-"))

    @property
    def is_canvas(self) -> bool:
        """Whether it is EmojiCanvas's pipeline, whose prompts can be picked."""
        return self.model is None

    def editor(self, kind: str, method: str = "per") -> ConceptEraser:
        """The eraser, or the steering baseline, of a kind; loaded once."""
        key = kind, method
        if key in self._editors:
            return self._editors[key]
        with self._loading:
            if key not in self._editors:
                # The folder of an eraser has no strength, and Compare sets its own.
                strength = -1.0 if method == "steering" else None
                shown = PictureSettings("-", ("-",), self.model, self.eraser, kind, method, strength)
                self._editors[key] = load_editor(shown)
            return self._editors[key]

    def defaults(self, kind: str, prompt: str = "-") -> PictureSettings:
        """Resolved settings that say nothing but a prompt and a concept."""
        editor = self.editor(kind)
        concept = "Cats" if "Cats" in editor.concepts else editor.concepts[0]
        return PictureSettings(prompt, (concept,), self.model, self.eraser, kind).resolved(editor, self.pipe)

    def example_prompts(self, editor: ConceptEraser) -> list[Prompt]:
        """Prompts in whose pictures the strongest patches of a latent are looked for."""
        from lbdt.activations.prompts import Prompt
        from lbdt.app.comparing import base_prompts

        if self.is_canvas:
            return base_prompts()
        return [
            Prompt(f"An image of {name}.", name, None, place) for place, name in enumerate(editor.concepts)
        ]

    @contextlib.contextmanager
    def place(self, name: str | None) -> Iterator[Visit | None]:
        """A block in which a session's visitor may ask the pipeline for something, and is not forgotten; None: as many
        as `Limits.waiting` do."""
        if not self._asking.acquire(blocking=False):
            yield None
            return
        try:
            with self._lock:
                visit = self._visit(name or "")
                visit.asking += 1
            try:
                yield visit
            finally:
                with self._lock:
                    visit.asking -= 1
        finally:
            self._asking.release()

    def visit(self, name: str | None) -> Visit | None:
        """The visitor of a session; None: one who has asked for nothing yet, or who is forgotten."""
        with self._lock:
            return self._visits.get(name or "")

    def _visit(self, key: str) -> Visit:
        if key not in self._visits:
            quiet = (other for other, visit in self._visits.items() if not visit.asking)
            if len(self._visits) >= MOST_VISITS and (longest := next(quiet, None)) is not None:
                self._forget(longest)
            self._visits[key] = Visit(Path(tempfile.mkdtemp(dir=self._root)))
        self._visits.move_to_end(key)
        return self._visits[key]

    def leave(self, name: str | None) -> None:
        """Ends what a visitor had asked for, and forgets the rest."""
        with self._lock:
            if (name or "") in self._visits:
                self._forget(name or "")

    def close(self) -> None:
        """Forgets all visitors and their files."""
        with self._lock:
            for name in list(self._visits):
                self._forget(name)
        shutil.rmtree(self._root, ignore_errors=True)

    def _forget(self, name: str) -> None:
        visit = self._visits.pop(name)
        visit.making.cancel.set()
        visit.cancel_comparison.set()
        shutil.rmtree(visit.folder, ignore_errors=True)


def _kinds(first: str) -> tuple[str, ...]:
    from lbdt.canvas import KINDS

    return (first, *(name for name in KINDS if name != first))

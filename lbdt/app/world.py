"""What a page shows: a pipeline, its erasers, what may be asked of them, and who is looking."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import OrderedDict
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
"""Visitors whose last pictures are kept; of more the one who has been quiet for longest is forgotten."""


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for."""

    steps: int = 100
    prompt: int = 500
    """Characters."""
    concepts: int = 10
    strengths: int = 6
    waiting: int = 16
    """Visitors whose pictures wait for the pipeline; more are told to come again."""
    upload: int = 1 << 16
    """Bytes of a settings file."""


@dataclass
class Visit:
    """One visitor's last picture, and whether the one that is being made is still wanted."""

    folder: Path
    """Files to download, of this visitor only."""
    cancel: threading.Event = field(default_factory=threading.Event)
    cancel_comparison: threading.Event = field(default_factory=threading.Event)
    steps: list[EmergingStep] = field(default_factory=list)
    """The steps of the picture with the eraser."""
    done: ErasedPicture | None = None

    def begin(self) -> threading.Event:
        """Ends what this visitor had asked for before; the event that ends what begins."""
        self.cancel.set()
        self.cancel, self.steps, self.done = threading.Event(), [], None
        return self.cancel

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
        from lbdt.canvas.defaults import NAME, pipeline_of

        self.model, self.eraser, self.limits = model, eraser, limits or Limits()
        self.name, self.device = model or NAME, device
        self.kinds = _kinds(kind) if eraser is None else (kind,)
        self._editors: dict[tuple[str, str], Any] = {}
        self._visits: OrderedDict[str, Visit] = OrderedDict()
        self._lock = threading.Lock()
        self._root = Path(tempfile.mkdtemp(prefix="lbdt-app-"))
        self.editor(self.kinds[0])
        self.pipe = pipeline_of(model, device)

    @property
    def is_canvas(self) -> bool:
        """Whether it is EmojiCanvas's pipeline, whose prompts can be picked."""
        return self.model is None

    def editor(self, kind: str, method: str = "per") -> ConceptEraser:
        """The eraser, or the steering baseline, of a kind; loaded once."""
        key = kind, method
        with self._lock:
            if key not in self._editors:
                shown = PictureSettings("-", ("-",), self.model, self.eraser, kind, method)
                self._editors[key] = load_editor(shown)
            return self._editors[key]

    def example_prompts(self, editor: ConceptEraser) -> list[Prompt]:
        """Prompts in whose pictures the strongest patches of a latent are looked for."""
        from lbdt.activations.prompts import Prompt
        from lbdt.app.comparing import base_prompts

        if self.is_canvas:
            return base_prompts()
        return [
            Prompt(f"An image of {name}.", name, None, place) for place, name in enumerate(editor.concepts)
        ]

    def visit(self, name: str | None) -> Visit:
        """The visitor of a session."""
        with self._lock:
            key = name or ""
            if key not in self._visits:
                self._visits[key] = Visit(Path(tempfile.mkdtemp(dir=self._root)))
            self._visits.move_to_end(key)
            while len(self._visits) > MOST_VISITS:
                self._forget(next(iter(self._visits)))
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
        visit.cancel.set()
        visit.cancel_comparison.set()
        shutil.rmtree(visit.folder, ignore_errors=True)


def _kinds(first: str) -> tuple[str, ...]:
    from lbdt.canvas import KINDS

    return (first, *(name for name in KINDS if name != first))

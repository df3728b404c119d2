"""`Editor`: what the eraser and the steering baselines have in common."""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from lbdt.editors.attachment import EXAMPLE, Attachment, check_hookpoint
from lbdt.editors.edit_report import Report
from lbdt.editors.site_check import check_site
from lbdt.hooks.recorder import Call, Recorder
from lbdt.sae import SparseAutoencoder

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook

_numbers = itertools.count()


class Editor(ABC):
    """Changes what a layer of a pipeline returns, by an SAE of that layer, while it is attached.

    No weight is touched. Settings are attributes that may be changed before the next `attach`.
    """

    KIND: ClassVar[str]
    """What errors call it: "eraser" | "steering"."""
    SETTINGS: ClassVar[tuple[str, ...]]
    """The names of what is set by attribute, and saved."""
    SHOWN: ClassVar[tuple[str, ...]]
    """Those of `SETTINGS` that a table of results names."""
    _ADDED: ClassVar[dict[str, Any]] = {}
    """Settings that older files lack, and what these meant."""
    _EXAMPLE: ClassVar[str] = EXAMPLE
    """A hookpoint, for the errors about one."""

    def __init__(self, sae: SparseAutoencoder, hookpoint: str) -> None:
        if not isinstance(sae, SparseAutoencoder):
            raise TypeError(f"sae: expected a SparseAutoencoder, got {type(sae).__name__}")
        self.sae, self.hookpoint = sae, hookpoint
        self._handles: weakref.WeakSet[Attachment] = weakref.WeakSet()
        self._record: tuple[Recorder, Callable[[list[Call]], Report]] | None = None
        # Not id(self): an editor may be gone while its hooks are still on.
        self._name = f"lbdt_{self.KIND}_{next(_numbers)}"
        self._check()

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the SAE and the dictionary, by name: a new dict."""
        return {name: getattr(self, name) for name in self.SETTINGS}

    @property
    def shown(self) -> dict[str, Any]:
        """The settings of `SHOWN`, by name: without those that older files lack, where they mean what these meant."""
        given = {name: getattr(self, name) for name in self.SHOWN}
        return {n: v for n, v in given.items() if n not in self._ADDED or v != self._ADDED[n]}

    @abstractmethod
    def attach(self, pipe: Any, concepts: Sequence[str] | Sequence[Sequence[str]]) -> Attachment:
        """Puts the editor on a pipeline until the returned handle is removed, or its `with` block is left."""

    def report(self) -> Report:
        """What happened since the last `attach`; also after its removal. Waits for the device.

        Raises:
            ValueError: never attached.
        """
        if self._record is None:
            raise ValueError(f"report: the {self.KIND} was never attached; call attach(pipe, concepts) first")
        recorder, summary = self._record
        return summary(recorder.read())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._known()}hookpoint={self.hookpoint!r}, {self._in_words()})"

    def _known(self) -> str:
        return ""

    def _in_words(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.shown.items())

    def _ran(self) -> str | None:
        """What a steering's report says of the rule."""
        return None

    def _check(self) -> None:
        """Refuses bad settings: they are plain attributes, so they are checked again when they are used."""
        check_hookpoint("hookpoint", self.hookpoint, self._EXAMPLE)
        check_site(self, "sae", self.sae.config.site)

    def _refuse_twice(self, module: nn.Module) -> None:
        # Imported here, so that looking at an editor's concepts does not load diffusers.
        from lbdt.hooks import registry

        if registry.is_registered(module, self._name):
            raise ValueError(
                f"this {self.KIND} is attached to this pipeline already; remove() that handle (or leave its with "
                "block) first"
            )

    def _put_on(
        self,
        pipe: Any,
        hooks: Iterable[tuple[nn.Module, ModelHook]],
        recorder: Recorder,
        summary: Callable[[list[Call]], Report],
        **more: Any,
    ) -> Attachment:
        handle = Attachment(self._name, pipe, hooks, recorder, summary, **more)
        self._handles.add(handle)
        # Not the handle, which holds the pipeline.
        self._record = recorder, summary
        return handle

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (*self.SETTINGS, "sae", "dictionary") and any(
            h.is_on for h in vars(self).get("_handles", ())
        ):
            raise RuntimeError(
                f"{name}: this {self.KIND} is attached, and what is attached keeps the settings that it was attached "
                "with; remove the handle (or lbdt.detach(pipe)), change it, and attach again"
            )
        super().__setattr__(name, value)

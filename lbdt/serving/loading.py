"""Loading an engine: by what a server's settings, or a job's, say of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lbdt.editors import ConceptEraser
    from lbdt.serving.engine import PictureEngine


class EngineSettings(Protocol):
    """What an engine is made of; `ServeSettings` says what each is."""

    @property
    def model(self) -> str | None:
        """A diffusers pipeline's folder or Hub repository; None: EmojiCanvas's."""

    @property
    def eraser(self) -> str | None:
        """An eraser's folder or Hub repository; None: EmojiCanvas's, of `kind`."""

    @property
    def kind(self) -> str:
        """EmojiCanvas's eraser, by its name."""

    @property
    def device(self) -> str:
        """A name for `lbdt.runs.processes.usable_device`."""

    @property
    def steps(self) -> int | None:
        """Denoising steps; None: as `lbdt.canvas.defaults.steps_and_guidance`."""

    @property
    def guidance(self) -> float | None:
        """Guidance scale; None: as `lbdt.canvas.defaults.steps_and_guidance`."""

    @property
    def batch(self) -> int:
        """The most pictures of one call of the pipeline."""

    @property
    def fill(self) -> bool:
        """Whether every call has `batch` rows."""

    @property
    def threads(self) -> int | None:
        """CPU threads; None: PyTorch's own choice."""


def engine_of(settings: EngineSettings) -> tuple[PictureEngine, ConceptEraser]:
    """The engine of the settings, and its eraser.

    Raises:
        ValueError, TypeError, OSError: what loading and `ConceptEraser.attach` raise.
    """
    import torch

    from lbdt.canvas.defaults import eraser_of, pipeline_of, steps_and_guidance
    from lbdt.runs.processes import usable_device
    from lbdt.serving.engine import PictureEngine

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    eraser = eraser_of(settings.eraser, settings.kind)
    pipe = pipeline_of(settings.model, usable_device(settings.device))
    steps, guidance = steps_and_guidance(settings.model, settings.kind, settings.steps, settings.guidance)
    engine = PictureEngine(
        pipe, eraser, batch=settings.batch, steps=steps, guidance=guidance, fill=settings.fill
    )
    return engine, eraser

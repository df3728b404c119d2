"""Pictures of different tenants in one call of a pipeline, under one attachment: no network, no queue here."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lbdt.activations.pipelines import cut_off
from lbdt.editors import UnprotectedError

if TYPE_CHECKING:
    from PIL import Image

    from lbdt.editors import ConceptEraser
    from lbdt.editors.edit_report import PictureReport

OnFailure = Literal["refuse", "unprotected"]


class PromptTooLongError(ValueError):
    """A prompt of more tokens than the text encoder reads: the rest would be left out unsaid."""


@dataclass(frozen=True)
class Work:
    """One picture to be made."""

    prompt: str
    seed: int
    """What the start noise and the donors' draws come from, in [0, 2**63)."""
    concepts: tuple[str, ...] = ()
    """What is erased from it; none: the picture is the bare pipeline's."""
    on_failure: OnFailure = "refuse"
    """What is returned where erasing failed: an error, or the picture without it, which says so."""
    size: tuple[int, int] | None = None
    """(width, height) in pixels; None: the pipeline's own."""


@dataclass(frozen=True)
class Picture:
    """A picture that was made."""

    png: bytes
    protected: bool
    """Whether everything asked for was looked for; False only as `on_failure="unprotected"` allows."""
    detected: tuple[int, ...] = ()
    """Patches with a concept, for each step, over the guidance branches, before padding."""
    replaced: tuple[int, ...] = ()
    """Patches overwritten, likewise, after padding."""
    gated: bool = False
    """Whether patches were detected, and all of them left by the gate."""
    reason: str | None = None
    """Why it is not protected; or of one that is, what was not looked for at some timesteps, as the dictionary has no
    latent for it there."""


class PictureEngine:
    """A pipeline with an eraser attached for as long as the engine lives.

    Every call of the pipeline has `batch` rows; where fewer pictures are asked for, the rest is filled with empty
    prompts. So no shape ever changes (one compiled graph is enough), and a picture has the same bits whoever else is in
    its batch: those of a product may depend on how many rows it has. With `fill=False` a call has as many rows as there
    are pictures, which costs less where few come at a time, and a seed's last bits then depend on their number.
    """

    def __init__(
        self,
        pipe: Any,
        eraser: ConceptEraser,
        *,
        batch: int = 8,
        steps: int = 20,
        guidance: float | None = None,
        fill: bool = True,
    ) -> None:
        """`pipe`: a diffusers pipeline as `ConceptEraser.attach` takes it, on its device; `batch`: the most pictures of
        a call; `steps`, `guidance`: of every picture, None: the pipeline's own.

        Raises:
            ValueError, TypeError: as `attach`; a batch or steps below 1.
        """
        for name, value in (("batch", batch), ("steps", steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value!r}")
        self.pipe, self.eraser, self.batch, self.fill = pipe, eraser, batch, fill
        self._call: dict[str, Any] = {"num_inference_steps": steps}
        if guidance is not None:
            self._call["guidance_scale"] = guidance
        # The pipeline's own remarks quote prompts.
        for name in ("diffusers", "transformers"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        pipe.set_progress_bar_config(disable=True)
        self._lock = threading.Lock()
        self._blind: dict[str, tuple[int, int]] = {}
        self._rows = 0
        self._attachment: Any = None
        self._attach(batch if fill else 1)

    def generate(self, works: Sequence[Work]) -> list[Picture | Exception]:
        """A picture or an error for each of the works, in their order; at most `batch`, all of one size.

        Where erasing fails in a batch, its halves are made anew, and theirs, so that one picture's failure is no other
        one's. Errors: `UnprotectedError`, `PromptTooLongError`, ValueError for unknown concepts, and what the
        pipeline and its tokenizers raise.

        Raises:
            ValueError: too many works, or sizes that differ; nothing is generated.
        """
        if len(works) > self.batch or len({work.size for work in works}) > 1:
            raise ValueError(f"works: expected at most {self.batch} of one size, got {len(works)}")
        with self._lock:
            if self._attachment is None:
                raise ValueError("generate: the engine was closed")
            outcome: dict[int, Picture | Exception] = {}
            for place, work in enumerate(works):
                if error := self._refused(work):
                    outcome[place] = error
            rest = [place for place in range(len(works)) if place not in outcome]
            for place, made in zip(rest, self._made([works[place] for place in rest]), strict=True):
                outcome[place] = made
            return [outcome[place] for place in range(len(works))]

    def close(self) -> None:
        """Takes the eraser off the pipeline; waits for a call that is on."""
        with self._lock:
            if self._attachment is not None:
                self._attachment.remove()
                self._attachment = None

    def __enter__(self) -> PictureEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _attach(self, rows: int) -> None:
        # Where attaching fails, the next call attaches again.
        self._rows = 0
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = self.eraser.attach(self.pipe, concepts=[[]] * rows, seed=[0] * rows)
        self._rows = rows

    def _refused(self, work: Work) -> Exception | None:
        """Why nothing is made of it, whoever else is in its batch."""
        try:
            for name in work.concepts:
                self.eraser.select(name)
            if cut := cut_off(self.pipe, work.prompt):
                return PromptTooLongError(
                    f"prompt: {cut[0]} tokens, and the model reads {cut[1]}; shorten it"
                )
            return None
        except Exception as error:
            return error

    def _made(self, works: Sequence[Work]) -> list[Picture | Exception]:
        if not works:
            return []
        try:
            return list(self._called(works))
        except Exception as error:
            if len(works) > 1:
                half = len(works) // 2
                return [*self._made(works[:half]), *self._made(works[half:])]
            return [self._failed(works[0], error)]

    def _failed(self, work: Work, error: Exception) -> Picture | Exception:
        """A picture that could not be made with what it asks for."""
        if not work.concepts or work.on_failure != "unprotected":
            return error
        try:
            (picture,) = self._called([work], enabled=False)
        except Exception as second:
            return second
        reason = str(error) if isinstance(error, UnprotectedError) else type(error).__name__
        return Picture(picture.png, protected=False, reason=reason)

    def _called(self, works: Sequence[Work], enabled: bool = True) -> Iterator[Picture]:
        """The pictures of one call of the pipeline."""
        rows = self.batch if self.fill else len(works)
        if rows != self._rows:
            self._attach(rows)
        spare = rows - len(works)
        seeds = [work.seed for work in works] + [0] * spare
        # Without erasing none is looked up: one that cannot be detected at all may be why it failed.
        sets = [list(work.concepts) if enabled else [] for work in works] + [[]] * spare
        size = {} if works[0].size is None else dict(zip(("width", "height"), works[0].size, strict=True))
        self._attachment.set(concepts=sets, seed=seeds, enabled=enabled)
        pictures = self.pipe(
            [work.prompt for work in works] + [""] * spare,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **self._call,
            **size,
        ).images
        reports = self._attachment.pictures()
        for work, picture, report in zip(works, pictures, reports, strict=False):
            yield _picture(picture, report, self._unseen(work.concepts) if enabled else None)

    def _unseen(self, concepts: Sequence[str]) -> str | None:
        """The concepts with timesteps at which no latent can be detected, so that they are not looked for."""
        said = []
        for name in concepts:
            if name not in self._blind:
                thresholds = self.eraser.select(name).thresholds
                self._blind[name] = int(torch.isposinf(thresholds).all(1).sum()), len(thresholds)
            blind, bins = self._blind[name]
            said += [f"{name} at {blind} of {bins} timesteps"] if blind else []
        return f"not looked for: {', '.join(said)}" if said else None


def _picture(picture: Image.Image, report: PictureReport, unseen: str | None) -> Picture:
    found = any(report.gated) and not any(report.replaced)
    return Picture(png_of(picture), True, report.detected, report.replaced, found, unseen)


def png_of(picture: Image.Image) -> bytes:
    """The picture as a PNG file; the same bytes for the same pixels."""
    with contextlib.closing(io.BytesIO()) as file:
        picture.save(file, format="PNG", compress_level=1)
        return file.getvalue()

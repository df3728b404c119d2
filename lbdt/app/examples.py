"""The patches that fire a latent most, and the pictures that they are of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lbdt.activations.capture import Schedule, capture, quiet
from lbdt.activations.sites import Site
from lbdt.app.streaming import Waiting, check_wanted, stream, turns_of
from lbdt.runs.reading import brief
from lbdt.runs.site_names import KINDS

if TYPE_CHECKING:
    from lbdt.activations.prompts import Prompt
    from lbdt.editors import ConceptEraser, Steering
    from lbdt.sae import SparseAutoencoder

TOP = 12
"""Examples that are kept of a latent."""
_FRAME = (255, 255, 255), (214, 51, 32)


@dataclass(frozen=True)
class LatentExample:
    """A patch that fires a latent: the one of its picture, over all timesteps, that fires it most."""

    latent: int
    value: float
    """The latent's activation."""
    timestep: float
    row: int
    column: int
    """The patch's place on the map."""
    grid: tuple[int, int]
    """(rows, columns) of the map."""
    prompt: Prompt
    picture: Image.Image
    """The final picture, RGB; shared by examples, so not to be drawn into."""

    def box(self, around: int = 1) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels of the patch and `around` patches on each side of it; at an edge, as
        many on the other side."""
        ends = []
        for place, cells, size in (
            (self.column, self.grid[1], self.picture.width),
            (self.row, self.grid[0], self.picture.height),
        ):
            wide = min(2 * around + 1, cells)
            first = min(max(0, place - around), cells - wide)
            ends.append((first * size // cells, (first + wide) * size // cells))
        (left, right), (top, bottom) = ends
        return left, top, right, bottom

    def crop(self, around: int = 1) -> Image.Image:
        """The part of the picture in `box`."""
        return self.picture.crop(self.box(around))

    def framed(self) -> Image.Image:
        """The whole picture with the patch in a frame."""
        shown = self.picture.copy()
        left, top, right, bottom = self.box(0)
        draw = ImageDraw.Draw(shown)
        for inset, colour in enumerate(_FRAME):
            draw.rectangle((left + inset, top + inset, right - 1 - inset, bottom - 1 - inset), outline=colour)
        return shown


class Firings(NamedTuple):
    """The strongest firings of some latents in P pictures, strongest first, at most one a picture. -1 in `pictures`:
    there are no more."""

    values: Tensor
    """[U, K] float32, 0 where there are no more."""
    pictures: Tensor
    """[U, K] int64, number of the prompt."""
    timesteps: Tensor
    """[U, K] float32"""
    places: Tensor
    """[U, K] int64, row * columns + column."""


@dataclass(frozen=True)
class ExampleSet:
    """The examples of some latents of one SAE."""

    latents: tuple[int, ...]
    """Ids, in the order of the firings' rows."""
    firings: Firings
    grid: tuple[int, int]
    prompts: Sequence[Prompt]
    pictures: Mapping[int, Image.Image]
    """The pictures that are needed, by the number of their prompt."""

    def of(self, latent: int, most: int = TOP) -> tuple[LatentExample, ...]:
        """The strongest examples of a latent, at most `most`, in that order; none where it fires nowhere.

        Raises:
            LookupError: a latent that was not looked at.
        """
        if latent not in self.latents:
            raise LookupError(f"latent {brief(latent)}: was not looked at; compute_examples looks at others")
        rows = [part[self.latents.index(latent)].tolist() for part in self.firings]
        return tuple(
            LatentExample(
                latent,
                value,
                timestep,
                *divmod(place, self.grid[1]),
                self.grid,
                self.prompts[number],
                self.pictures[number],
            )
            for value, number, timestep, place in list(zip(*rows, strict=True))[:most]
            if number >= 0
        )


@dataclass(frozen=True)
class Progress:
    """Pictures that are done."""

    done: int
    of: int


def compute_examples(
    pipe: Any,
    editor: ConceptEraser | Steering,
    latents: Sequence[int],
    prompts: Sequence[Prompt],
    *,
    steps: int,
    guidance: float | None = None,
    cancelled: Callable[[], bool],
    batch: int = 4,
) -> Iterator[Waiting | Progress | ExampleSet]:
    """The events of looking for the patches of the prompts' pictures that fire some latents most: `Progress` after
    every `batch` pictures, and an `ExampleSet` in the end, unless it is cancelled. The pipeline's pictures are not
    edited, and it waits for its turn as `emerge` does.

    Raises:
        TypeError, ValueError: at once: latents that the SAE does not have, or none; no prompts.
    """
    check_latents(editor.sae, latents)
    if not prompts:
        raise ValueError("prompts: expected one or more, got none")

    def work(emit: Callable[[Any], None], stop: Callable[[], bool]) -> None:
        with turns_of(pipe).turn(stop, emit):
            sets = look(
                pipe,
                [(editor, latents)],
                prompts,
                steps=steps,
                guidance=guidance,
                stop=stop,
                told=emit,
                batch=batch,
            )
            emit(sets[0])

    return stream(work, cancelled)


def check_latents(sae: SparseAutoencoder, latents: Sequence[int]) -> None:
    """TypeError, ValueError unless they are ids of an SAE's latents, one or more, each once."""
    count = sae.config.num_latents
    for latent in latents:
        if isinstance(latent, bool) or not isinstance(latent, int):
            raise TypeError(f"latents: expected whole numbers, got {brief(latent)}")
        if not 0 <= latent < count:
            raise ValueError(f"latents: expected numbers from 0 to {count - 1}, got {brief(latent)}")
    if not latents or len(set(latents)) < len(latents):
        raise ValueError(f"latents: expected one or more, each once, got {len(latents)}")


def look(
    pipe: Any,
    looked: Sequence[tuple[ConceptEraser | Steering, Sequence[int]]],
    prompts: Sequence[Prompt],
    *,
    steps: int,
    guidance: float | None,
    stop: Callable[[], bool] = lambda: False,
    told: Callable[[Progress], None] = lambda _: None,
    batch: int = 4,
) -> list[ExampleSet]:
    """The examples of several editors' latents, from the same pictures. CancelledError where `stop` becomes true.

    Of guidance's halves the conditional one is looked at.
    """
    sites = [site_of(editor) for editor, _ in looked]
    firing = [_Firing(editor.sae, latents) for editor, latents in looked]
    pictures: dict[int, Image.Image] = {}
    undo = quiet(pipe)
    try:
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            receiver = _Looking(pipe, sites, firing, len(part), stop)
            call = {} if guidance is None else {"guidance_scale": guidance}
            with torch.no_grad(), capture(pipe, list(dict.fromkeys(sites)), len(part), receiver):
                made = pipe(
                    [prompt.text for prompt in part],
                    num_inference_steps=steps,
                    generator=[torch.Generator().manual_seed(prompt.seed) for prompt in part],
                    **call,
                ).images
            pictures |= {first + place: picture.convert("RGB") for place, picture in enumerate(made)}
            for each in firing:
                each.keep(first)
            told(Progress(first + len(part), len(prompts)))
    finally:
        undo()
    return [
        ExampleSet(
            tuple(latents),
            each.top,
            each.grid,
            tuple(prompts),
            {number: pictures[number] for number in sorted(set(each.top.pictures.flatten().tolist()) - {-1})},
        )
        for each, (_, latents) in zip(firing, looked, strict=True)
    ]


def site_of(editor: ConceptEraser | Steering) -> Site:
    """Where an editor's SAE looks."""
    return Site(getattr(editor, "detect_at", None) or editor.hookpoint, KINDS[editor.sae.config.update])


class _Firing:
    """The strongest firings of one SAE's latents so far."""

    def __init__(self, sae: SparseAutoencoder, latents: Sequence[int]) -> None:
        self.sae, self.latents = sae, torch.tensor(latents)
        self.grid = (0, 0)
        shape = (len(latents), 0)
        whole = torch.zeros(shape, dtype=torch.int64)
        self.top = Firings(torch.zeros(shape), whole, torch.zeros(shape), whole)
        self._now: list[Tensor] | None = None

    def take(self, x: Tensor, timestep: float, grid: tuple[int, int]) -> None:
        """Looks at the patches [P, N, d] of a timestep."""
        self.grid = grid
        weight = self.sae.encoder.weight
        code = self.sae.encode(x.to(weight.device).float())
        values = torch.zeros(*x.shape[:2], self.sae.config.num_latents, device=weight.device)
        values = values.scatter_(2, code.indices, code.values)[:, :, self.latents.to(weight.device)].cpu()
        best, places = values.max(dim=1)
        times = torch.full_like(best, timestep)
        if self._now is None:
            self._now = [best, times, places]
            return
        more = best > self._now[0]
        fresh = (best, times, places)
        self._now = [torch.where(more, new, old) for new, old in zip(fresh, self._now, strict=True)]

    def keep(self, first: int) -> None:
        """The pictures from number `first` on are done."""
        best, times, places = (part.t() for part in self._now)
        self._now = None
        numbers = torch.arange(first, first + best.shape[1]).expand_as(places)
        values = torch.cat([self.top.values, best], 1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :TOP]
        merged = [
            torch.cat([old, new], 1).gather(1, order)
            for old, new in zip(self.top, (best, numbers, times, places), strict=True)
        ]
        fired = merged[0] > 0
        self.top = Firings(merged[0], merged[1].where(fired, -1), *merged[2:])


class _Looking:
    """Hands the activations of one pipeline call to every `_Firing`; a `lbdt.activations.capture.Receiver`."""

    def __init__(
        self, pipe: Any, sites: list[Site], firing: list[_Firing], images: int, stop: Callable[[], bool]
    ) -> None:
        self._pipe, self._sites, self._firing, self._images = pipe, sites, firing, images
        self._stop, self._schedule = stop, None
        self._seen: set[int] = set()
        self._at = 0

    def begin(self, timestep: float) -> bool:
        check_wanted(self._stop)
        if self._schedule is None:
            self._schedule = Schedule.of(self._pipe.scheduler.timesteps.tolist(), timestep)
        self._at = self._schedule.nearest(timestep)
        # Of calls at one timestep the first one counts, which is the conditional one.
        fresh = self._at not in self._seen
        self._seen.add(self._at)
        return fresh

    def take(self, site: Site, x: Tensor, sample: Tensor) -> None:
        grid = _grid(x.shape[1], sample)
        for own, firing in zip(self._sites, self._firing, strict=True):
            if own == site:
                firing.take(x, float(self._at), grid)

    def end(self) -> None:
        """Nothing is left to do."""


def _grid(patches: int, sample: Tensor) -> tuple[int, int]:
    """(rows, columns) of a map of `patches`, a whole fraction of the latents; (1, patches) where there is none."""
    if sample.dim() == 4:
        height, width = sample.shape[2:]
        for scale in range(1, height + 1):
            if height % scale == width % scale == 0 and height * width == patches * scale**2:
                return height // scale, width // scale
    return 1, patches

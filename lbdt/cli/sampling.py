"""How `collect`, `train` and `score` run a pipeline: their options, and the activations that these ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbdt.cli.options import MOST_THREADS, Dtype, counted, number
from lbdt.runs.limits import MOST_STEPS

if TYPE_CHECKING:
    import torch

    from lbdt.activations.generated import Generated
    from lbdt.activations.prompts import LabelledPrompts
    from lbdt.activations.sites import Site

_PANEL = "The pipeline"
CANVAS = ("canvas", "canvas-pairs")
"""EmojiCanvas's prompts: of one object and none, and of two as well."""
_MOST = 100_000

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR_OR_HUB",
        help="A text-to-image pipeline of diffusers. Default: EmojiCanvas.",
        rich_help_panel=_PANEL,
    ),
]
Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="A .jsonl or .csv file with prompt and, where known, concept, style, seed, beside (further concepts); or "
        "canvas: EmojiCanvas's of one object and none, canvas-pairs: of two as well.",
        rich_help_panel=_PANEL,
    ),
]
CanvasSeeds = Annotated[
    str,
    typer.Option(
        "--canvas-seeds",
        metavar="FIRST:END",
        help="Pictures of every prompt of canvas, or canvas-pairs.",
        rich_help_panel=_PANEL,
    ),
]
Steps = Annotated[int, counted("--steps", most=MOST_STEPS, help="Denoising steps.", rich_help_panel=_PANEL)]
Guidance = Annotated[
    float | None,
    number(
        "--guidance",
        min=0,
        help="Guidance scale. Default: 3 on EmojiCanvas, else the pipeline's own.",
        rich_help_panel=_PANEL,
    ),
]
Timesteps = Annotated[
    str | None,
    typer.Option(
        "--timesteps",
        metavar="N or T,T,...",
        help="So many of the steps, spread evenly, or these. Default: all.",
        rich_help_panel=_PANEL,
    ),
]
Patches = Annotated[
    int | None,
    counted("--patches", help="Patches drawn of each map. Default: all.", rich_help_panel=_PANEL),
]
Numbers = Annotated[
    Dtype, typer.Option("--dtype", help="Number format of the activations.", rich_help_panel=_PANEL)
]
PromptsPerShard = Annotated[
    int,
    counted(
        "--prompts-per-shard",
        most=65_535,
        help="Images of a pipeline call and of a shard.",
        rich_help_panel=_PANEL,
    ),
]
Threads = Annotated[
    int,
    counted(
        "--threads",
        most=MOST_THREADS,
        help="CPU threads of a process, recorded with the activations, which may depend on them.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True)
class PipelineSampling:
    """How activations are generated; see `lbdt.activations.generated.Generated`."""

    model: str | None
    """Folder or Hub repository; None: EmojiCanvas."""
    prompts: str
    """A file, or one of `CANVAS`."""
    canvas_seeds: range
    steps: int
    guidance: float | None
    """None: EmojiCanvas's, or the pipeline's own."""
    timesteps: int | list[int] | None
    patches: int | None
    prompts_per_shard: int
    threads: int
    """Threads of a process on the CPU; elsewhere not used."""
    dtype: str = "float16"

    def labelled(self) -> LabelledPrompts:
        """The prompts, and the names of their labels."""
        if self.prompts in CANVAS:
            from lbdt.canvas.defaults import labelled_canvas_prompts

            return labelled_canvas_prompts(self.canvas_seeds, pairs=self.prompts == CANVAS[1])
        from lbdt.activations.prompts import LabelledPrompts, read_prompts

        return LabelledPrompts.by_use(read_prompts(self.prompts))

    def load_pipeline(self, device: torch.device) -> Any:
        """The pipeline, on `device`."""
        from lbdt.canvas.defaults import pipeline_of

        return pipeline_of(self.model, device)

    def source(
        self,
        pipe: Any,
        labelled: LabelledPrompts,
        sites: Sequence[Site],
        device: torch.device,
        seed: int = 0,
    ) -> Generated:
        """The activations of `pipe` on `device`; `seed` decides which patches are drawn."""
        import torch

        from lbdt.activations.generated import Generated
        from lbdt.canvas.defaults import NAME

        guidance = self.guidance
        if guidance is None and self.model is None:
            from lbdt.canvas.generate import GUIDANCE as guidance
        return Generated(
            pipe,
            labelled.prompts,
            sites,
            steps=self.steps,
            guidance=guidance,
            prompts_per_shard=self.prompts_per_shard,
            patches=self.patches,
            timesteps=self.timesteps,
            dtype=getattr(torch, self.dtype),
            seed=seed,
            concepts=labelled.concepts,
            styles=labelled.styles,
            threads=self.threads if device.type == "cpu" else None,
            model=self.model or NAME,
        )


def sampling_of(
    *, model: str | None, prompts: str, canvas_seeds: str, timesteps: str | None, **others: Any
) -> PipelineSampling:
    """What the options say; `others`: the fields of `PipelineSampling` as they are.

    Raises:
        typer.BadParameter: bad usage.
    """
    if model is not None and prompts in CANVAS:
        raise typer.BadParameter(
            f"the prompts of {prompts} are EmojiCanvas's: give --prompts FILE with --model",
            param_hint="--prompts",
        )
    try:
        wanted, seeds = parse_timesteps(timesteps), parse_seeds(canvas_seeds)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return PipelineSampling(model=model, prompts=prompts, canvas_seeds=seeds, timesteps=wanted, **others)


def parse_timesteps(text: str | None) -> int | list[int] | None:
    """A number of timesteps ("10"), or timesteps ("999,749" or "999,"); ValueError for anything else."""
    if text is None:
        return None
    try:
        given = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        given = []
    listed = "," in text
    if not given or min(given) < (0 if listed else 1) or max(given) > _MOST:
        raise ValueError(f"--timesteps: expected a number such as 10, or 999,749; got {text!r}")
    return given if listed else given[0]


def parse_seeds(text: str) -> range:
    """ "100:104", the end not included; ValueError for anything else, or none."""
    first, colon, end = text.partition(":")
    try:
        seeds = range(int(first), int(end))
    except ValueError:
        seeds = range(0)
    if not colon or seeds.start < 0 or seeds.stop >= 2**63 or not 0 < seeds.stop - seeds.start <= _MOST:
        raise ValueError(
            f"--canvas-seeds: expected FIRST:END such as 100:104, at most {_MOST} of them; got {text!r}"
        )
    return seeds

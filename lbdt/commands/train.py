"""`lbdt train`: a sparse autoencoder by one of the published recipes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lbdt.activations import Site, Source
from lbdt.activations.batches import Batches, Stream
from lbdt.activations.stored import Stored
from lbdt.commands.pipeline import Sampling, load_pipeline
from lbdt.runs.out import check_out_folder
from lbdt.runs.processes import joined_on
from lbdt.sae import SparseAutoencoder
from lbdt.training.assignment import Assignment, assign, load_assignment
from lbdt.training.heldout import split, split_prompts
from lbdt.training.recipe_training import RecipeOptions, train_recipe
from lbdt.training.recipes import recipe_named


@dataclass(frozen=True)
class Live:
    """A pipeline to train from without a cache, as `lbdt collect` would run it."""

    sampling: Sampling
    window: int
    """Pipeline calls that a batch mixes."""
    steps_per_shard: int
    """Training steps for each pipeline call."""


def run(
    recipe: str,
    site: str | None,
    out: Path,
    *,
    activations: Path | None,
    live: Live | None,
    heldout: Path | None,
    heldout_share: float,
    start: str | None,
    assignment: str | None,
    options: RecipeOptions,
    device: str,
    progress: bool = True,
) -> tuple[dict[str, Any], list[str]]:
    """Trains or goes on training in `out`; the report for JSON, and the lines of the table.

    Started by `accelerate launch`, the processes share every batch; all but the first return nothing to print.
    """
    chosen = recipe_named(recipe)
    if (activations is None) == (live is None):
        raise ValueError("expected either --activations DIR or --stream")
    check_out_folder(out)
    with joined_on(device) as (world, where):
        if live is None:
            source: Source = Stored(activations)
            wanted = _site(site, source)
            held = None if heldout is None else Stored(heldout)
            if held is None and heldout_share > 0:
                source, held = split(source, heldout_share)
            batches = Batches
        else:
            if site is None:
                raise ValueError("--site: expected with --stream")
            wanted = Site.parse(site)
            share = heldout_share if heldout is None else 0.0
            source, held = _generated(live, wanted, where, share, options.seed)
            held = held if heldout is None else Stored(heldout)

            def batches(source: Source, site: Site, seed: int) -> Stream:
                return Stream(source, site, seed, live.window, live.steps_per_shard)

        if held is not None and (wanted not in held.sites or held.width(wanted) != source.width(wanted)):
            raise ValueError(f"--heldout: expected activations at {wanted} of width {source.width(wanted)}")
        sae = None if start is None else SparseAutoencoder.from_pretrained(start)
        report = train_recipe(
            chosen,
            source,
            wanted,
            out,
            options=options,
            heldout=held,
            batches=batches,
            start=sae,
            assignment=None if assignment is None else _assignment(assignment, source),
            world=world,
            device=where,
            progress=progress,
        )
        if not world.main:
            return {}, []
        report = report | {"out": str(out), "device": str(where), "processes": world.size}
        return report, _table(report)


def _site(text: str | None, source: Stored) -> Site:
    if text is not None:
        return Site.parse(text)
    if len(source.sites) > 1:
        raise ValueError(f"--site: the activations hold {', '.join(map(str, source.sites))}; choose one")
    return source.sites[0]


def _generated(
    live: Live, site: Site, device: torch.device, share: float, seed: int
) -> tuple[Source, Source | None]:
    """The live source for training, and where `share` > 0 that of held-out prompts; `seed`: of the draw of patches."""
    sampling = live.sampling
    labelled = sampling.labelled()
    pipe = load_pipeline(sampling.model, device)
    source = sampling.source(pipe, labelled, [site], device, seed)
    if share <= 0:
        return source, None
    training, heldout = split_prompts(labelled.prompts, share)
    return source.with_prompts(training), source.with_prompts(heldout) if heldout else None


def _assignment(folder: str, source: Source) -> Assignment:
    """Of a folder with assignment.json, or by the scores of a dictionary of the activations' names."""
    if (Path(folder) / "assignment.json").is_file():
        return load_assignment(folder)
    from lbdt.dictionary import ConceptDictionary

    dictionary = ConceptDictionary.from_pretrained(folder)
    names = [*source.concepts, *source.styles]
    missing = [name for name in names if name not in dictionary.concepts]
    if missing:
        raise ValueError(
            f"--assign {folder}: the dictionary lacks {', '.join(missing)}, which the activations are labelled with; "
            "leave --assign out to score the SAE on the activations"
        )
    order = [dictionary.concepts.index(name) for name in names]
    return assign(dictionary.scores()[order], source.concepts, source.styles)


def _table(report: dict[str, Any]) -> list[str]:
    on = "held-out" if report["evaluated_on"] == "heldout" else "training"
    dead = 100 * report["dead"] / report["latents"]
    rows = (
        ("recipe", f"{report['recipe']}, {report['variant']}, at {report['site']}"),
        ("trained", f"{report['steps']} steps of {report['rows']} rows"),
        ("judged on", f"{report['prompts']} {on} prompts"),
        ("unexplained", f"{report['fvu']:.3f} of the variance (FVU)"),
        ("active latents", f"{report['l0']:.1f} a patch (L0)"),
        ("dead latents", f"{report['dead']} of {report['latents']} ({dead:.1f} %)"),
        ("folder", report["out"]),
    )
    lines = [f"{name:16}{text}" for name, text in rows]
    if report["finished"]:
        lines.insert(0, "was finished already; nothing was changed")
    return lines

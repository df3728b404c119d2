"""A recipe on a source of activations: its files, and what happens when it is called again."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lbdt.activations import Site, Source
from lbdt.activations.batches import Batches
from lbdt.activations.source import require_site
from lbdt.dictionary.scoring import score
from lbdt.runs.digests import sha256
from lbdt.runs.files import json_bytes, read_json, write_files
from lbdt.runs.folder import held
from lbdt.runs.processes import Processes
from lbdt.runs.settings import require_same_settings
from lbdt.runs.site_names import may_be
from lbdt.sae import SparseAutoencoder
from lbdt.sae.config import MOVED
from lbdt.training.assignment import Assignment, assign, load_assignment, save_assignment
from lbdt.training.engine import run_settings, train
from lbdt.training.explained_variance import explain_variance
from lbdt.training.recipes import Recipe
from lbdt.training.training_metrics import writers
from lbdt.training.training_run import BatchSource, Labels

CHECKPOINT_FILE = "training.ckpt"
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class RecipeOptions:
    """What a caller changes of a recipe; None: as the recipe says."""

    variant: str | None = None
    expansion: int | None = None
    k: int | None = None
    batch_topk: bool | None = None
    """Train with the k * rows largest activations of a batch instead of the k largest of each patch."""
    steps: int | None = None
    """None: the recipe's epochs over the activations."""
    rows: int | None = None
    lr: float | None = None
    dead_after: int | None = None
    precision: str = "float32"
    seed: int = 0
    checkpoint_every: int = 100
    objective: Mapping[str, float | None] = field(default_factory=dict)
    """Fields of the objective or of its supervision."""
    logs: Sequence[str] = ()
    """Where metrics go beside the files: "tensorboard", "wandb"."""


def train_recipe(
    recipe: Recipe,
    source: Source,
    site: Site,
    out: Path,
    *,
    options: RecipeOptions | None = None,
    heldout: Source | None = None,
    batches: Callable[[Source, Site, int], BatchSource] = Batches,
    start: SparseAutoencoder | None = None,
    assignment: Assignment | None = None,
    world: Processes | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Trains by `recipe` and writes cfg.json, sae.safetensors, assignment.json where latents have names, metrics.jsonl,
    speed.jsonl and at last report.json to `out`; returns the report, with `finished` true where it was there already.

    Called again on a folder of the same settings it goes on from training.ckpt, which is deleted once the other files
    are whole; all of them but speed.jsonl are those of an uninterrupted run, byte for byte.

    Args:
        heldout: activations for the report; None: those it was trained on.
        batches: makes the batches of (source, site, seed); `Batches` or `Stream`.
        start: SAE to fine-tune, whose configuration is kept; where its site is not known it becomes this one.
        assignment: of a recipe that assigns latents; None: by the scores that `start` has on `source`.

    Raises:
        ValueError: settings that do not fit each other, a folder of another run or with another SAE, one that another
            training is writing to.
        ImportError: a log that is not installed.
    """
    options, world = options or RecipeOptions(), world or Processes()
    require_site(source, site)
    objective = recipe.objective(options.variant, **options.objective)
    config = _config(recipe, source, site, start, options)
    rows = options.rows or recipe.rows
    total = source.prompts * len(source.timesteps) * source.patches(site)
    steps = options.steps or math.ceil(recipe.epochs * total / rows)
    # Of several processes the first one writes.
    with held(out, "lbdt train") if world.main else contextlib.nullcontext():
        given = {
            "rows": rows,
            "lr": options.lr or recipe.lr,
            "adam_eps": recipe.adam_eps,
            "precision": options.precision,
            "seed": options.seed,
            "dead_after": options.dead_after,
            "start": start,
            "labels": _labels(recipe, source, site, out, start, assignment, world, progress),
            "data": {
                "recipe": recipe.name,
                "site": str(site),
                "activations": identity(source),
                "heldout": None if heldout is None else identity(heldout),
            },
        }
        settings = run_settings(config, objective, steps, **given)
        report_path, checkpoint = out / REPORT_FILE, out / CHECKPOINT_FILE
        if report_path.exists():
            report = read_json(report_path)
            require_same_settings(
                report_path,
                report.get("settings") if isinstance(report, dict) else None,
                settings,
                "the finished training belongs to a run with another {names}; choose another folder",
            )
            if world.main:
                checkpoint.unlink(missing_ok=True)
            return report | {"finished": True}
        if (out / "cfg.json").exists() and not checkpoint.exists():
            raise ValueError(f"{out}: holds an SAE that this training did not make; choose another folder")
        logs = writers(options.logs, out, settings) if world.main else []
        labels = given["labels"]
        assigned = labels is not None and labels.assignment is not None
        if assigned and world.main and not checkpoint.exists():
            save_assignment(labels.assignment, out)
        sae = train(
            config,
            batches(source, site, options.seed),
            steps,
            objective=objective,
            device=device,
            world=world,
            progress=progress,
            metrics=out,
            writers=logs,
            checkpoint=checkpoint,
            checkpoint_every=options.checkpoint_every,
            **given,
        )
        report = {
            "recipe": recipe.name,
            "variant": options.variant or next(iter(recipe.objectives)),
            "site": str(site),
            "latents": config.num_latents,
            "k": config.k,
            "steps": steps,
            "rows": rows,
            "evaluated_on": "training" if heldout is None else "heldout",
            "prompts": (heldout or source).prompts,
        }
        if world.main:
            report |= explain_variance(sae, heldout or source, site)
            report["settings"] = settings
            sae.save_pretrained(out)
            write_files(out, {REPORT_FILE: json_bytes(report)})
            checkpoint.unlink()
        world.wait()
        return report | {"finished": False}


def identity(source: Source) -> str:
    """SHA-256 of what a source's activations follow from, as far as it says."""
    about = {
        "settings": source.origin(),
        "sites": [[str(site), source.width(site), source.patches(site)] for site in source.sites],
        "names": [list(source.concepts), list(source.styles)],
        "timesteps": list(source.timesteps),
        "prompts": [source.prompts, source.prompts_per_shard, source.turn],
    }
    return sha256(json.dumps(about, sort_keys=True))


def assignment_of(sae: SparseAutoencoder, source: Source, site: Site, progress: bool = False) -> Assignment:
    """Latents for a source's concepts and styles by SAeUron's score, averaged over timesteps (METHOD.md, 6.5).

    Raises:
        ValueError: a source without labels, or a label without prompts.
    """
    _require_names(source)
    labels = [by for by in ("concepts", "styles") if getattr(source, by)]
    made = [score(source, site, sae, by=by, calibrate=False, bank=0, progress=progress) for by in labels]
    return assign(torch.cat([each.scores() for each in made]), source.concepts, source.styles)


def _config(
    recipe: Recipe, source: Source, site: Site, start: SparseAutoencoder | None, options: RecipeOptions
):
    if recipe.update and not site.update:
        raise ValueError(
            f"site: recipe {recipe.name} is for what a block adds to its input; expected {site.hookpoint}:update, "
            f"got {site}"
        )
    if start is None:
        if recipe.fine_tunes:
            raise ValueError(f"from: recipe {recipe.name} fine-tunes a trained SAE; give its folder")
        config = recipe.config(
            source.width(site),
            update=site.update,
            expansion=options.expansion,
            k=options.k or recipe.ks.get(options.variant or "", recipe.k),
            batch_topk=options.batch_topk,
        )
        return replace(config, site=str(site))
    if any(value is not None for value in (options.expansion, options.k, options.batch_topk)):
        raise ValueError("expansion, k, batch-topk: a fine-tuned SAE keeps its own; leave them out")
    config = start.config
    if config.d_in != source.width(site) or config.update != site.update:
        raise ValueError(
            f"from: expected an SAE for {site} of width {source.width(site)}, got one of width {config.d_in} for the "
            f"block's {'update' if config.update else 'output'}"
        )
    if not may_be(config.site, str(site)):
        raise ValueError(f"from: expected an SAE for {site}, got one of {config.site}; {MOVED}")
    return replace(config, site=str(site))


def _labels(
    recipe: Recipe,
    source: Source,
    site: Site,
    out: Path,
    start: SparseAutoencoder | None,
    assignment: Assignment | None,
    world: Processes,
    progress: bool,
) -> Labels | None:
    if not recipe.supervised:
        if assignment is not None:
            raise ValueError(f"assign: recipe {recipe.name} uses no labels; leave it out")
        return None
    _require_names(source)
    several = sum(bool(prompt.beside) for prompt in source.labelled or ())
    if several:
        raise ValueError(
            f"activations: recipe {recipe.name} takes a picture's labels for all that is in it, and {several} of the "
            "prompts name several concepts (beside); collect without these, which are for the gate of lbdt score"
        )
    if recipe.contrastive:
        if assignment is not None:
            raise ValueError(
                f"assign: recipe {recipe.name} compares labels and assigns no latents; leave it out"
            )
        return Labels(tuple(source.concepts), tuple(source.styles), None)
    if recipe.by_construction:
        if assignment is not None:
            raise ValueError(f"assign: recipe {recipe.name} takes latent i for name i; leave it out")
        assignment = Assignment.by_construction(source.concepts, source.styles)
    elif assignment is None and any((out / name).exists() for name in (CHECKPOINT_FILE, REPORT_FILE)):
        assignment = load_assignment(out)
    elif assignment is None:
        if start is None:
            raise ValueError(f"from: recipe {recipe.name} fine-tunes a trained SAE; give its folder")
        if world.main:
            save_assignment(assignment_of(start, source, site, progress), out)
        world.wait()
        assignment = load_assignment(out)
    return Labels(tuple(source.concepts), tuple(source.styles), assignment)


def _require_names(source: Source) -> None:
    if not source.concepts and not source.styles:
        raise ValueError(
            "labels: a supervised recipe needs prompts with concepts or styles, and these activations have none"
        )

"""`lbdt train`: a sparse autoencoder by one of the published recipes."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbdt.cli.options import AsJson, Device, counted, inside, number, print_result, reported
from lbdt.cli.sampling import (
    CanvasSeeds,
    Guidance,
    Model,
    Patches,
    PipelineSampling,
    Prompts,
    PromptsPerShard,
    Threads,
    Timesteps,
    sampling_of,
)
from lbdt.runs.limits import LARGEST, MOST_STEPS, SEEDS

if TYPE_CHECKING:
    import torch

    from lbdt.activations import Site, Source
    from lbdt.activations.stored import Stored


class RecipeName(enum.StrEnum):
    """Recipes."""

    saeuron = "saeuron"
    saemnesia = "saemnesia"
    saeparate = "saeparate"
    gsae = "gsae"
    sdxl = "sdxl"
    relu = "relu"
    jumprelu = "jumprelu"


class Precision(enum.StrEnum):
    """Number formats of the encoder's product."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class MetricsLog(enum.StrEnum):
    """Where metrics go beside metrics.jsonl."""

    tensorboard = "tensorboard"
    wandb = "wandb"


SamplingSteps = Annotated[
    int, counted("--sampling-steps", most=MOST_STEPS, help="Denoising steps.", rich_help_panel="The pipeline")
]
_OURS = "Default: the recipe's."


@reported
def command(
    recipe: Annotated[RecipeName, typer.Option(help="The published method to follow.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the SAE; continued if begun.")],
    activations: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder written by `lbdt collect`; or give --stream.")
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            metavar="HOOKPOINT[:update]", help="Where, of the activations. Default: their only one."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="DIR_OR_HUB", help="SAE to fine-tune; saemnesia needs one."),
    ] = None,
    assign: Annotated[
        str | None,
        typer.Option(
            "--assignment",
            "--assign",
            metavar="DIR",
            help="Latents of the concepts: a folder with assignment.json, or a dictionary. Default: by the scores of "
            "--from on the activations.",
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of the supervised loss: image, paper or released (saemnesia); image or released (gsae); "
            "object, style or joint (saeparate).",
        ),
    ] = None,
    expansion: Annotated[int | None, counted(help=f"Latents over width. {_OURS}")] = None,
    k: Annotated[int | None, counted("--k", help=f"Active latents a patch. {_OURS}")] = None,
    batch_topk: Annotated[
        bool | None,
        typer.Option(
            "--batch-topk/--no-batch-topk",
            help=f"Train with the k largest of a batch on average, not of each patch. {_OURS}",
        ),
    ] = None,
    steps: Annotated[int | None, counted(help="Training steps. Default: the recipe's epochs.")] = None,
    rows: Annotated[int | None, counted(min=2, help=f"Patches of a batch. {_OURS}")] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr", callback=inside(0, LARGEST, open_low=True), help=f"Learning rate, falling to 0. {_OURS}"
        ),
    ] = None,
    weight: Annotated[float | None, number(min=0, help=f"Of the supervised loss. {_OURS}")] = None,
    decorrelation: Annotated[float | None, number(min=0, help=f"Of its correlation term. {_OURS}")] = None,
    l1: Annotated[float | None, number("--l1", min=0, help=f"Of its L1 term. {_OURS}")] = None,
    pool: Annotated[
        float | None,
        number(min=0, max=1, help=f"Share of an image's patches that carries a concept. {_OURS}"),
    ] = None,
    strength: Annotated[
        float | None, number(help=f"Activation of a present concept, of image. {_OURS}")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(callback=inside(0, LARGEST, open_low=True), help=f"Of saeparate's contrast. {_OURS}"),
    ] = None,
    sparsity: Annotated[
        float | None, number(min=0, help=f"Of the penalty of relu and jumprelu. {_OURS}")
    ] = None,
    auxk_alpha: Annotated[
        float | None, number("--auxk-alpha", min=0, help=f"Of AuxK, for dead latents. {_OURS}")
    ] = None,
    dead_after: Annotated[
        int | None,
        counted(
            help="Patches without firing that make a latent dead. Default: 10 million or a tenth of all.",
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of the encoder's product.")] = Precision.float32,
    heldout: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Activations for the report. Default: a share of these."),
    ] = None,
    heldout_share: Annotated[
        float,
        number(min=0, max=0.9, help="Of the prompts, kept out of training for the report; 0: none."),
    ] = 0.0625,
    checkpoint_every: Annotated[int, counted(help="Steps between checkpoints.")] = 100,
    log: Annotated[
        list[MetricsLog] | None, typer.Option("--log", help="Also log there; may be repeated.")
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Run the pipeline (options below) while training; nothing is cached."),
    ] = False,
    model: Model = None,
    prompts: Prompts = "canvas",
    canvas_seeds: CanvasSeeds = "100:104",
    sampling_steps: SamplingSteps = 20,
    guidance: Guidance = None,
    timesteps: Timesteps = None,
    patches: Patches = None,
    prompts_per_shard: PromptsPerShard = 16,
    threads: Threads = 1,
    window: Annotated[int, counted(help="Of --stream: pipeline calls that a batch mixes.")] = 4,
    steps_per_shard: Annotated[int, counted(help="Of --stream: training steps for each pipeline call.")] = 8,
    seed: Annotated[
        int, typer.Option("--seed", **SEEDS, help="Of the first weights and the order of batches.")
    ] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a sparse autoencoder on activations, by a published recipe with your changes.

    The same command goes on where a killed one stopped, to the same files. Several GPUs: `accelerate launch
    --num_processes N -m lbdt train ...`.
    """
    if (activations is None) != stream:
        raise typer.BadParameter("give either --activations DIR or --stream", param_hint="--activations")
    from lbdt.activations import Site
    from lbdt.activations.batches import Batches, Stream
    from lbdt.activations.stored import Stored
    from lbdt.runs.processes import joined_on
    from lbdt.runs.writable import check_out_folder
    from lbdt.sae import SparseAutoencoder
    from lbdt.training.assignment import assignment_for
    from lbdt.training.heldout import split
    from lbdt.training.recipe_training import RecipeOptions, train_recipe
    from lbdt.training.recipes import recipe_named

    if stream:
        sampling = sampling_of(
            model=model,
            prompts=prompts,
            canvas_seeds=canvas_seeds,
            steps=sampling_steps,
            guidance=guidance,
            timesteps=timesteps,
            patches=patches,
            prompts_per_shard=prompts_per_shard,
            threads=threads,
        )
    options = RecipeOptions(
        variant=variant,
        expansion=expansion,
        k=k,
        batch_topk=batch_topk,
        steps=steps,
        rows=rows,
        lr=lr,
        dead_after=dead_after,
        precision=precision.value,
        seed=seed,
        checkpoint_every=checkpoint_every,
        objective={
            "weight": weight,
            "decorrelation": decorrelation,
            "l1": l1,
            "pool": pool,
            "strength": strength,
            "temperature": temperature,
            "sparsity": sparsity,
            "auxk_alpha": auxk_alpha,
        },
        logs=[name.value for name in log or ()],
    )
    chosen = recipe_named(recipe.value)
    check_out_folder(out)
    with joined_on(device) as (world, where):
        if not stream:
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
            source, held = _generated(sampling, wanted, where, share, seed)
            held = held if heldout is None else Stored(heldout)

            def batches(source: Source, site: Site, seed: int) -> Stream:
                return Stream(source, site, seed, window, steps_per_shard)

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
            assignment=None if assign is None else assignment_for(assign, source.concepts, source.styles),
            world=world,
            device=where,
        )
    if world.main:
        report = report | {"out": str(out), "device": str(where), "processes": world.size}
        print_result(report, _table(report), as_json)


def _site(text: str | None, source: Stored) -> Site:
    from lbdt.activations import Site

    if text is not None:
        return Site.parse(text)
    if len(source.sites) > 1:
        raise ValueError(f"--site: the activations hold {', '.join(map(str, source.sites))}; choose one")
    return source.sites[0]


def _generated(
    sampling: PipelineSampling, site: Site, device: torch.device, share: float, seed: int
) -> tuple[Source, Source | None]:
    """The live source for training, and where `share` > 0 that of held-out prompts; `seed` decides
    which patches are drawn."""
    from lbdt.training.heldout import split_prompts

    labelled = sampling.labelled()
    source = sampling.source(sampling.load_pipeline(device), labelled, [site], device, seed)
    if share <= 0:
        return source, None
    training, heldout = split_prompts(labelled.prompts, share)
    return source.with_prompts(training), source.with_prompts(heldout) if heldout else None


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

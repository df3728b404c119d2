"""The command `lbdt train`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from lbdt.cli.options import (
    LARGEST,
    MOST_STEPS,
    SEEDS,
    AsJson,
    Device,
    counted,
    inside,
    number,
    print_result,
    reported,
)
from lbdt.cli.sampling import (
    CanvasSeeds,
    Guidance,
    Model,
    Patches,
    Prompts,
    PromptsPerShard,
    Threads,
    Timesteps,
    sampling_of,
)


class Name(enum.StrEnum):
    """Recipes."""

    saeuron = "saeuron"
    saemnesia = "saemnesia"
    gsae = "gsae"
    sdxl = "sdxl"
    relu = "relu"
    jumprelu = "jumprelu"


class Precision(enum.StrEnum):
    """Of the encoder's product."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Log(enum.StrEnum):
    """Where metrics go beside metrics.jsonl."""

    tensorboard = "tensorboard"
    wandb = "wandb"


SamplingSteps = Annotated[
    int, counted("--sampling-steps", most=MOST_STEPS, help="Denoising steps.", rich_help_panel="The pipeline")
]
_OURS = "Default: the recipe's."


@reported
def command(
    recipe: Annotated[Name, typer.Option(help="The published method to follow.")],
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
            help="Of the supervised loss: image, paper or released (saemnesia); image or released (gsae).",
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
    log: Annotated[list[Log] | None, typer.Option("--log", help="Also log there; may be repeated.")] = None,
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
    from lbdt.commands.train import Live, run
    from lbdt.training.recipe_training import RecipeOptions

    live = None
    if stream:
        live = Live(
            sampling_of(
                model=model,
                prompts=prompts,
                canvas_seeds=canvas_seeds,
                steps=sampling_steps,
                guidance=guidance,
                timesteps=timesteps,
                patches=patches,
                prompts_per_shard=prompts_per_shard,
                threads=threads,
            ),
            window=window,
            steps_per_shard=steps_per_shard,
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
            "sparsity": sparsity,
            "auxk_alpha": auxk_alpha,
        },
        logs=[name.value for name in log or ()],
    )
    values, lines = run(
        recipe.value,
        site,
        out,
        activations=activations,
        live=live,
        heldout=heldout,
        heldout_share=heldout_share,
        start=start,
        assignment=assign,
        options=options,
        device=device,
    )
    if values:
        print_result(values, lines, as_json)

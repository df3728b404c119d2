"""The command `lbdt score`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from lbdt.cli.options import SEEDS, AsJson, Device, Dtype, counted, inside, print_result, reported
from lbdt.cli.sampling import (
    CanvasSeeds,
    Guidance,
    Model,
    Numbers,
    Patches,
    Prompts,
    PromptsPerShard,
    Steps,
    Threads,
    Timesteps,
    sampling_of,
)


class By(enum.StrEnum):
    """The labels that the dictionary is over."""

    concepts = "concepts"
    styles = "styles"


@reported
def command(
    sae: Annotated[
        str, typer.Option("--sae", metavar="DIR_OR_HUB", help="The SAE, in any format that lbdt reads.")
    ],
    site: Annotated[
        str,
        typer.Option("--site", metavar="HOOKPOINT[:update]", help="Where it was trained."),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the dictionary; continued if begun.")
    ],
    activations: Annotated[
        Path | None,
        typer.Option(
            "--activations", metavar="DIR", help="Of `lbdt collect`. Default: the pipeline runs in each pass."
        ),
    ] = None,
    hookpoint: Annotated[
        str | None, typer.Option("--hookpoint", metavar="NAME", help="Subfolder of the SAE's repository.")
    ] = None,
    by: Annotated[By, typer.Option(help="Labels that the dictionary is over.")] = By.concepts,
    candidates: Annotated[int, counted(help="Latents per label and timestep whose histograms are kept.")] = 4,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Keep histograms for calibrated thresholds.")
    ] = True,
    bank: Annotated[
        int, counted(min=0, help="Undetected patches kept per timestep, for maps without any.")
    ] = 32,
    bank_site: Annotated[
        str | None,
        typer.Option(
            "--bank-site",
            metavar="HOOKPOINT[:update]",
            help="Where patches will be replaced. Default: the output at --site's hookpoint.",
        ),
    ] = None,
    assignment: Annotated[
        Path | None,
        typer.Option(
            "--assignment",
            metavar="FILE_OR_DIR",
            help="assignment.json of a supervised SAE. Default: the one beside the SAE, if any.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        counted(help="Latents selected per timestep. Default: the assigned one, else 2."),
    ] = None,
    percentile: Annotated[
        float | None,
        typer.Option(callback=inside(0, 100), help="Or all above this percentile of the scores, e.g. 99.99."),
    ] = None,
    false_positive: Annotated[
        float,
        typer.Option(
            callback=inside(0, 1, open_low=True),
            help="Share of other labels' patches above a calibrated threshold.",
        ),
    ] = 0.02,
    heldout: Annotated[
        Path | None,
        typer.Option("--heldout", metavar="DIR", help="Activations on which the detection rate is measured."),
    ] = None,
    model: Model = None,
    prompts: Prompts = "canvas",
    canvas_seeds: CanvasSeeds = "100:104",
    steps: Steps = 20,
    guidance: Guidance = None,
    timesteps: Timesteps = None,
    patches: Patches = None,
    dtype: Numbers = Dtype.float16,
    prompts_per_shard: PromptsPerShard = 16,
    threads: Threads = 1,
    save_every: Annotated[int, counted("--save-every", help="Shards after which the state is saved.")] = 8,
    seed: Annotated[
        int, typer.Option("--seed", **SEEDS, help="Of the draws of patches and of the bank.")
    ] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write the dictionary of an SAE: each concept's scores per latent and timestep, and calibrated thresholds.

    The same command continues a run that was killed, and several processes may share one; the files are the same.
    """
    if activations is not None and (model is not None or prompts != "canvas"):
        raise typer.BadParameter(
            "give --activations, or --model and --prompts, not both", param_hint="--activations"
        )
    from lbdt.commands.score import run

    sampling = sampling_of(
        model=model,
        prompts=prompts,
        canvas_seeds=canvas_seeds,
        steps=steps,
        guidance=guidance,
        timesteps=timesteps,
        patches=patches,
        dtype=dtype.value,
        prompts_per_shard=prompts_per_shard,
        threads=threads,
    )
    values, lines = run(
        sae,
        site,
        out,
        activations=activations,
        sampling=sampling,
        hookpoint=hookpoint,
        by=by.value,
        candidates=candidates,
        calibrate=calibrate,
        bank=bank,
        bank_site=bank_site,
        assignment=assignment,
        select={"top_k": top_k, "percentile": percentile, "false_positive": false_positive},
        heldout=heldout,
        save_every=save_every,
        seed=seed,
        device=device,
    )
    if values["process"] == 0:
        print_result(values, lines, as_json)

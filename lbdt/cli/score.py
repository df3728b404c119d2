"""`lbdt score`: the dictionary of an SAE, from stored activations or straight from a pipeline."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbdt.cli.options import AsJson, Device, Dtype, counted, inside, print_result, reported
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
from lbdt.runs.limits import SEEDS

if TYPE_CHECKING:
    from lbdt.activations import Site
    from lbdt.dictionary import ConceptDictionary


class LabelKind(enum.StrEnum):
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
    by: Annotated[LabelKind, typer.Option(help="Labels that the dictionary is over.")] = LabelKind.concepts,
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
    picture_false_positive: Annotated[
        float,
        typer.Option(
            callback=inside(0, 1, open_low=True, with_high=True),
            help="Share of other labels' pictures that may pass the gate; 1: no gate.",
        ),
    ] = 0.005,
    gate_activations: Annotated[
        Path | None,
        typer.Option(
            "--gate-activations",
            metavar="DIR",
            help="Activations that the gate counts, at best of one concept and of several. Default: the others.",
        ),
    ] = None,
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
    if gate_activations is not None and picture_false_positive == 1:
        raise typer.BadParameter(
            "is for a gate, and --picture-false-positive 1 makes none", param_hint="--gate-activations"
        )
    if activations is not None and (model is not None or prompts != "canvas"):
        raise typer.BadParameter(
            "give --activations, or --model and --prompts, not both", param_hint="--activations"
        )
    from lbdt.activations import Site, Source
    from lbdt.activations.source import require_site
    from lbdt.activations.stored import Stored
    from lbdt.dictionary.encoding import check_fit
    from lbdt.dictionary.scoring import score
    from lbdt.dictionary.selectivity import selectivity
    from lbdt.runs.processes import launched_on
    from lbdt.runs.writable import check_out_folder
    from lbdt.sae.model import read_sae

    start = time.perf_counter()
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
    world, where = launched_on(device)
    place = Site.parse(site)
    check_out_folder(out)
    replaced = _bank_site(place, bank_site) if bank else None
    checkpoint = read_sae(sae, hookpoint)
    encoder = checkpoint.sae.to(where)
    assigned = _assigned(assignment, checkpoint.folder, by.value)
    given = {"top_k": top_k, "percentile": percentile, "false_positive": false_positive}
    select = {name: value for name, value in given.items() if value is not None}
    if heldout is not None:
        held = Stored(heldout)
        check_fit(held, place, encoder)
    gate_source = None if gate_activations is None else Stored(gate_activations)
    if activations is not None:
        source: Source = Stored(activations)
    else:
        labelled, sites = sampling.labelled(), {place, replaced} - {None}
        source = sampling.source(sampling.load_pipeline(where), labelled, list(sites), where, seed)
    require_site(source, place)
    if bank and bank_site is None and replaced not in source.sites:
        raise ValueError(
            f"--bank-site: an eraser replaces {replaced} unless told otherwise, and {activations} holds "
            f"{', '.join(map(str, source.sites))} only; collect it too, give --bank-site {place} for an eraser that "
            "replaces that, or --bank 0"
        )
    dictionary = score(
        source,
        place,
        encoder,
        by=by.value,
        candidates=candidates,
        calibrate=calibrate,
        bank=bank,
        bank_site=replaced,
        selection=select,
        picture_false_positive=None if picture_false_positive == 1 else picture_false_positive,
        gate_source=gate_source,
        assigned=assigned,
        process=world.rank,
        processes=world.size,
        folder=out,
        save_every=save_every,
        seed=seed,
    )
    values = {
        "out": str(out),
        "sae": sae,
        "site": str(place),
        "by": by.value,
        "device": str(where),
        "process": world.rank,
        "processes": world.size,
        "timesteps": dictionary.timesteps.tolist(),
        "prompts": source.prompts,
        "picture_false_positive": picture_false_positive,
        "gate_activations": None if gate_activations is None else str(gate_activations),
        "bank": 0 if dictionary.bank is None else dictionary.bank.shape[1],
        by.value: [],
        "heldout": None,
    }
    if world.main:
        values[by.value] = _rows(dictionary, select)
        if heldout is not None:
            rates = selectivity(held, place, encoder, dictionary, by=by.value, progress=True, **select)
            values["heldout"] = {
                "folder": str(heldout),
                "on": float(rates[:, 0].mean()),
                "off": float(rates[:, 1].mean()),
                "timesteps": dict(zip(map(str, held.timesteps), rates.tolist(), strict=True)),
            }
    values["seconds"] = time.perf_counter() - start
    if values["process"] == 0:
        print_result(values, _table(values), as_json)


def _bank_site(place: Site, given: str | None) -> Site:
    from lbdt.activations import Site

    return Site(place.hookpoint, "output") if given is None else Site.parse(given)


def _assigned(given: Path | None, folder: Path, by: str) -> dict[str, int] | None:
    """The labels' latents of the assignment named, or of the one in the SAE's folder, if any."""
    from lbdt.training.assignment import ASSIGNMENT_FILE, load_assignment

    if given is None and not (folder / ASSIGNMENT_FILE).is_file():
        return None
    if given is not None and given.is_file():
        if given.name != ASSIGNMENT_FILE:
            raise ValueError(f"--assignment {given}: expected a folder with {ASSIGNMENT_FILE}, or that file")
        given = given.parent
    assignment = load_assignment(folder if given is None else given)
    return (assignment.concepts if by == "concepts" else assignment.styles) or None


def _rows(dictionary: ConceptDictionary, select: dict[str, Any]) -> list[dict[str, Any]]:
    ranks = dictionary.assigned_ranks()
    rows, gate = [], dictionary.gate
    if gate is not None:
        least, (own, others) = gate.least(), gate.passing()
    for place, (name, scores) in enumerate(zip(dictionary.concepts, dictionary.scores(), strict=True)):
        selection = dictionary.select(name, **select)
        mean = scores.mean(0)
        on = off = None
        if dictionary.histograms is not None:
            on, off = dictionary.detection_rates(selection).overall()
        rows.append(
            {
                "name": name,
                "latents": selection.latents.tolist(),
                "thresholds": selection.kind,
                "best": int(mean.argmax()),
                "score": float(mean.max()),
                "on": on,
                "off": off,
                "assigned": (dictionary.assigned or {}).get(name),
                "assigned_rank": ranks.get(name),
                "gate": None
                if gate is None
                else {
                    "least": least[place].tolist(),
                    "on": float(own[place].mean()),
                    "off": float(others[place].mean()),
                },
            }
        )
    return rows


def _table(values: dict[str, Any]) -> list[str]:
    rows = values[values["by"]]
    if not rows:
        return []
    width = max(len(values["by"]), *(len(row["name"]) for row in rows))
    lines = [f"{values['by']:{width}}   best   score         on        off  latents"]
    for row in rows:
        latents = ", ".join(map(str, row["latents"]))
        if row["assigned"] is not None:
            latents += f"; assigned {row['assigned']}, rank {row['assigned_rank']}"
        lines.append(
            f"{row['name']:{width}}  {row['best']:5d}  {row['score']:6.4f} {_percent(row['on'])} "
            f"{_percent(row['off'])}  {latents}"
        )
    lines.append(
        "best: the latent of the highest score, mean over timesteps; on, off: patches of images with and"
    )
    lines.append(
        "without the label on which one latent fires, the most frequent of each timestep, mean over timesteps"
    )
    gates = {row["name"]: row["gate"] for row in rows if row["gate"]}
    if gates:
        needs = [least for gate in gates.values() for least in gate["least"]]
        on, off = (sum(gate[name] for gate in gates.values()) / len(gates) for name in ("on", "off"))
        lines.append(
            f"gate: {min(needs)} to {max(needs)} patches; {on:.1%} of pictures with the label pass at a timestep, "
            f"{off:.2%} of others"
        )
        worst = max(gates, key=lambda name: gates[name]["off"])
        if gates[worst]["off"] > values["picture_false_positive"]:
            lines.append(
                f"gate: {worst} lets {gates[worst]['off']:.1%} of others pass, more than asked for: a higher one would "
                "leave its own pictures"
            )
    ranks = [row["assigned_rank"] for row in rows if row["assigned_rank"] is not None]
    if ranks:
        lines.append(f"assigned latent is the best one for {ranks.count(0)} of {len(ranks)}")
    held = values["heldout"]
    if held is not None:
        lines.append(
            f"held out: {held['on']:.1%} of patches detected with the label, {held['off']:.2%} without, in "
            f"{held['folder']}"
        )
    lines.append(
        f"{values['bank']} bank patches per timestep; {values['seconds']:.1f} s; written to {values['out']}"
    )
    return lines


def _percent(rate: float | None) -> str:
    return f"{'-' if rate is None else f'{rate:.1%}':>10}"

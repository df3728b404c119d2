"""`lbdt score`: the dictionary of an SAE, from stored activations or straight from a pipeline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lbdt.activations import Site, Source
from lbdt.activations.source import require_site
from lbdt.activations.stored import Stored
from lbdt.commands.pipeline import Sampling, load_pipeline
from lbdt.dictionary import ConceptDictionary
from lbdt.dictionary.encoding import check_fit
from lbdt.dictionary.scoring import score
from lbdt.dictionary.selectivity import selectivity
from lbdt.runs.out import check_out_folder
from lbdt.runs.processes import launched_on
from lbdt.sae.checkpoint import read


def run(
    sae: str,
    site: str,
    out: Path,
    *,
    activations: Path | None,
    sampling: Sampling,
    hookpoint: str | None,
    by: str,
    candidates: int,
    calibrate: bool,
    bank: int,
    bank_site: str | None,
    assignment: Path | None,
    select: dict[str, Any],
    heldout: Path | None,
    save_every: int,
    seed: int,
    device: str,
) -> tuple[dict[str, Any], list[str]]:
    """Writes the dictionary to `out`; returns the figures for JSON, and the lines of the table.

    Started by `accelerate launch` or torchrun, every process adds up its share, and they meet by files in `out`.
    """
    start = time.perf_counter()
    world, where = launched_on(device)
    place = Site.parse(site)
    check_out_folder(out)
    replaced = _bank_site(place, bank_site) if bank else None
    checkpoint = read(sae, hookpoint)
    model = checkpoint.sae.to(where)
    assigned = _assigned(assignment, checkpoint.folder, by)
    select = {name: value for name, value in select.items() if value is not None}
    if heldout is not None:
        held = Stored(heldout)
        check_fit(held, place, model)
    if activations is not None:
        source: Source = Stored(activations)
    else:
        labelled, sites = sampling.labelled(), {place, replaced} - {None}
        source = sampling.source(load_pipeline(sampling.model, where), labelled, list(sites), where, seed)
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
        model,
        by=by,
        candidates=candidates,
        calibrate=calibrate,
        bank=bank,
        bank_site=replaced,
        selection=select,
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
        "by": by,
        "device": str(where),
        "process": world.rank,
        "processes": world.size,
        "timesteps": dictionary.timesteps.tolist(),
        "prompts": source.prompts,
        "bank": 0 if dictionary.bank is None else dictionary.bank.shape[1],
        by: [],
        "heldout": None,
    }
    if world.main:
        values[by] = _rows(dictionary, select)
        if heldout is not None:
            rates = selectivity(held, place, model, dictionary, by=by, progress=True, **select)
            values["heldout"] = {
                "folder": str(heldout),
                "on": float(rates[:, 0].mean()),
                "off": float(rates[:, 1].mean()),
                "timesteps": dict(zip(map(str, held.timesteps), rates.tolist(), strict=True)),
            }
    values["seconds"] = time.perf_counter() - start
    return values, _table(values)


def _bank_site(place: Site, given: str | None) -> Site:
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
    rows = []
    for name, scores in zip(dictionary.concepts, dictionary.scores(), strict=True):
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

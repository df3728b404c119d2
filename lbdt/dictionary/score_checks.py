"""What `score` refuses before a pass begins, or after the first."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lbdt.activations.sites import Site
from lbdt.activations.source import require_site
from lbdt.dictionary.encoding import check_fit, shown_names
from lbdt.dictionary.selection import check_criteria
from lbdt.runs.reading import listed

if TYPE_CHECKING:
    from lbdt.activations import Source
    from lbdt.dictionary.concept_dictionary import ConceptDictionary
    from lbdt.sae import SparseAutoencoder


def check_numbers(
    candidates: int, bank: int, process: int, processes: int, folder: Any, save_every: int, latents: int
) -> None:
    """ValueError naming the argument of `score` that is out of range."""
    numbers = {
        "candidates": (candidates, 1, latents),
        "bank": (bank, 0, 2**20),
        "processes": (processes, 1, 2**16),
        "process": (process, 0, processes - 1),
        "save_every": (save_every, 1, 2**31),
    }
    for name, (value, least, most) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name}: expected an integer in [{least}, {most}], got {value!r}")
    if processes > 1 and folder is None:
        raise ValueError("folder: several processes need one that all of them can read and write")


def check_selection(selection: Mapping[str, Any], candidates: int | None) -> None:
    """Refuses, as far as can be told without the dictionary, what selects nothing; `candidates` None: no histograms."""
    known = list(inspect.signature(check_criteria).parameters)
    unknown = sorted(set(selection) - set(known))
    if unknown:
        raise ValueError(f"selection: unknown key {', '.join(unknown)}; expected some of {', '.join(known)}")
    check_criteria(**selection)
    if candidates is None:
        if selection.get("thresholds") == "calibrated":
            raise ValueError("selection: thresholds 'calibrated' need calibrate=True")
    elif selection.get("thresholds") != "published" and (selection.get("top_k") or 0) > candidates:
        raise ValueError(f"selection: top_k {selection['top_k']} needs as many candidates, got {candidates}")


def check_gate_source(
    given: Source, source: Source, site: Site, sae: SparseAutoencoder, by: str, names: Sequence[str]
) -> None:
    """ValueError unless it has pictures of every label, at the source's timesteps."""
    check_fit(given, site, sae)
    if given.timesteps != source.timesteps:
        raise ValueError(
            f"gate_source: expected the source's timesteps {listed(source.timesteps)}, got {listed(given.timesteps)}; "
            "collect it with the same steps"
        )
    label = given.labels()[("concepts", "styles").index(by)]
    shown = {name for own in shown_names(given, by, label) for name in own}
    without = [name for name in names if name not in shown]
    if without:
        raise ValueError(
            f"gate_source: expected pictures of every one of the {by}, got none of {listed(without)}"
        )
    if len(names) < 2:
        raise ValueError(f"gate_source: a gate tells {by} apart, and there is {names[0]!r} only")
    patches = given.shard(0, site).patches.cpu()
    if bool((patches != torch.arange(patches.shape[2])).any()):
        raise ValueError(
            "gate_source: holds some patches of each map, and the gate counts those of whole ones; collect all patches"
        )


def bank_site_of(source: Source, site: Site, given: Site | None) -> Site:
    """Where the bank is drawn; ValueError where the source has no such site."""
    if given is not None:
        require_site(source, given)
        return given
    wanted = Site(site.hookpoint, "output")
    if wanted not in source.sites:
        raise ValueError(
            f"bank_site: an eraser replaces {wanted} unless told otherwise, and the activations hold "
            f"{', '.join(map(str, source.sites))} only; collect it too, give bank_site={site} for an eraser of "
            "target='update', or bank=0"
        )
    return wanted


def require_prompts(dictionary: ConceptDictionary, by: str) -> None:
    """ValueError naming the labels without a prompt at some timestep."""
    without = [
        name for name, counts in zip(dictionary.concepts, dictionary.counts, strict=True) if not counts.all()
    ]
    if without:
        raise ValueError(
            f"no prompts of {', '.join(without)} among the activations; collect some, or activations without these {by}"
        )

"""`score`: the concept dictionary of an SAE by running sums over a source, in memory of one shard."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbdt.activations.sites import Site
from lbdt.activations.source import shard_count
from lbdt.dictionary.calibration import Calibration
from lbdt.dictionary.checks import checked_assignment
from lbdt.dictionary.concept_dictionary import ConceptDictionary
from lbdt.dictionary.dictionary_files import INFO_FILE
from lbdt.dictionary.encoding import Encoder, check_fit, labels, one_thread
from lbdt.dictionary.picture_counts import MOST_COUNTED, PictureCounts, check_rate
from lbdt.dictionary.score_checks import (
    bank_site_of,
    check_gate_source,
    check_numbers,
    check_selection,
    require_prompts,
)
from lbdt.dictionary.score_passes import BankPass, CalibrationPass, GatePass, Pass, StatisticsPass, run_pass
from lbdt.dictionary.score_state import Finished, ScoreState
from lbdt.reference.detect_patches import QUARTERS
from lbdt.runs.digests import marked, sha256
from lbdt.runs.files import json_bytes, read_json, write_files
from lbdt.runs.folder import held
from lbdt.runs.settings import plain, require_same_settings

if TYPE_CHECKING:
    from lbdt.activations import Source
    from lbdt.dictionary.selection import Selection
    from lbdt.sae import SparseAutoencoder

DONE_FILE = "score.json"
_VERSION = 2
_BINS = 256
_SUMMED = ("version", "processes", "sae", "site", "by", "source")
_COUNTED = (*_SUMMED, "candidates", "assigned")
_USED = {
    StatisticsPass.name: _SUMMED,
    CalibrationPass.name: _COUNTED,
    GatePass.name: (*_COUNTED, "calibrate", "selection", "gate_source", "counts"),
    BankPass.name: (*_COUNTED, "calibrate", "bank", "bank_site", "selection", "seed"),
}
"""What each pass depends on: an interrupted run may go on with other settings for the passes to come."""
_BANK_SHARDS = 64
"""The bank is drawn from at most so many shards, spread evenly: it keeps a few patches only."""


def score(
    source: Source,
    site: Site,
    sae: SparseAutoencoder,
    *,
    by: str = "concepts",
    candidates: int = 4,
    calibrate: bool = True,
    bank: int = 32,
    bank_site: Site | None = None,
    selection: Mapping[str, Any] | None = None,
    picture_false_positive: float | None = 0.005,
    gate_source: Source | None = None,
    assigned: Mapping[str, int] | None = None,
    process: int = 0,
    processes: int = 1,
    folder: str | os.PathLike[str] | None = None,
    save_every: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> ConceptDictionary:
    """The dictionary of a site's activations (METHOD.md, 3; SAeUron, arXiv 2501.18052).

    One pass over the shards for the means, one for calibrated thresholds, one for the gate, and one over at most 64
    shards for the bank; a `Generated` source runs the pipeline in each. Prompts without a label are left out
    everywhere, those of several concepts of all but the gate. One shard is in memory at a time, beside [C, T, L] sums.
    Sums are whole numbers, and the SAE runs on one thread a bin, so that the same shards give the same bytes with any
    number of processes or threads, interrupted or not, on one kind of machine.

    Args:
        source: labelled activations.
        site: where the SAE was trained.
        sae: on any device; encodes there. The encoder suffices.
        by: the labels that the dictionary is over: "concepts" | "styles".
        candidates: latents per label and timestep whose histograms are kept.
        calibrate: keep histograms.
        bank: undetected patches kept per timestep, for maps in which every patch is detected; 0: none.
        bank_site: where patches will be replaced; None: the output at `site`'s hookpoint, an eraser's default.
        selection: the eraser's keywords of `ConceptDictionary.select`, which say what counts as detected by the gate
            and in the bank.
        picture_false_positive: share of other labels' pictures, in (0, 1], that may pass the gate at a timestep
            (METHOD.md, 3.6); None, or a single label: no gate.
        gate_source: labelled activations of the same site and timesteps that the gate counts in place of `source`'s,
            at best of pictures of one concept and of several (`Prompt.beside`), as are to be erased from.
        assigned: the latent that each label was trained on (`lbdt.training.assignment`); other names are ignored.
        process, processes: this process's number and their count; each calls `score` with the same `folder`, and all
            return the same dictionary.
        folder: gets the dictionary, and until then every `save_every` shards the state to resume from after a crash.
            Where the dictionary of just these settings is there already, it is returned; another one is refused.
        seed: of the bank's draw.
        progress: bars on stderr.

    Raises:
        ValueError, TypeError: the argument, what was expected, what was given; a label without prompts; a state of
            other settings, or damaged, naming the file; a folder that another `lbdt score` is writing to.
    """
    names = labels(source, by)
    check_fit(source, site, sae)
    check_numbers(candidates, bank, process, processes, folder, save_every, sae.config.num_latents)
    if calibrate and len(names) < 2:
        raise ValueError(
            f"calibration needs patches of other {by}, and there is {names[0]!r} only; add prompts or calibrate=False"
        )
    if gate_source is not None:
        if picture_false_positive is None:
            raise ValueError("gate_source: is for a gate, and picture_false_positive=None makes none")
        check_gate_source(gate_source, source, site, sae, by, names)
    place = bank_site_of(source, site, bank_site) if bank else None
    check_selection(selection or {}, candidates if calibrate else None)
    if picture_false_positive is not None:
        check_rate(picture_false_positive)
    mine = None
    if assigned:
        mine = {name: latent for name, latent in assigned.items() if name in names}
        if not mine:
            raise ValueError(f"assigned: has none of the {by} {', '.join(names)}; got {', '.join(assigned)}")
        mine = checked_assignment(mine, names, sae.config.num_latents)
    without = [name for name in names if name not in (mine or {})]
    if (selection or {}).get("assigned") and without:
        raise ValueError(
            f"selection: assigned needs a latent for every label; {', '.join(without)} have none"
        )
    work = _Work(
        *(source, site, sae, by, names, candidates, calibrate, bank, place),
        *(dict(selection or {}), picture_false_positive, gate_source, mine, seed),
    )
    if folder is None:
        return work.run(None, save_every, 0, 1, progress)
    with held(Path(folder), "lbdt score", shared=processes > 1):
        return _in_folder(work, Path(folder), save_every, process, processes, progress)


def _in_folder(
    work: _Work, folder: Path, save_every: int, process: int, processes: int, progress: bool
) -> ConceptDictionary:
    settings = work.settings()

    def state() -> ScoreState:
        finished = functools.partial(_is_finished, folder, settings)
        common = settings | {"processes": processes, "counts": "run, several"}
        parts = {name: {key: common[key] for key in keys if key in common} for name, keys in _USED.items()}
        return ScoreState(folder, parts, process, processes, finished)

    if _is_finished(folder, settings):
        if not process:
            # Another run's state is not this one's to remove.
            with contextlib.suppress(ValueError):
                state().remove()
        return ConceptDictionary.from_pretrained(folder)
    kept = state()
    _refuse_another(folder, settings, begun=kept.exists())
    try:
        dictionary = work.run(kept, save_every, process, processes, progress)
        if process:
            kept.wait_for_end()
    except Finished:
        return ConceptDictionary.from_pretrained(folder)
    _finish(folder, settings, dictionary)
    kept.remove()
    return dictionary


@dataclass(frozen=True)
class _Work:
    """What `score` was asked for, checked."""

    source: Source
    site: Site
    sae: SparseAutoencoder
    by: str
    names: tuple[str, ...]
    candidates: int
    calibrate: bool
    bank: int
    bank_site: Site | None
    selection: dict[str, Any]
    picture_false_positive: float | None
    gate_source: Source | None
    assigned: dict[str, int] | None
    seed: int

    def settings(self) -> dict[str, Any]:
        """Everything that the dictionary follows from, JSON-like."""
        gate: dict[str, Any] = {}
        if self.picture_false_positive is not None:
            gate["gate"] = self.picture_false_positive
        if self.gate_source is not None:
            gate["gate_source"] = _source_settings(self.gate_source, self.site, None)
        return plain(
            {
                "version": _VERSION,
                "sae": sae_settings(self.sae),
                "site": str(self.site),
                "by": self.by,
                "candidates": self.candidates,
                "calibrate": self.calibrate,
                "bank": self.bank,
                "bank_site": None if self.bank_site is None else str(self.bank_site),
                "selection": self.selection,
                "assigned": self.assigned,
                "seed": self.seed,
                "source": _source_settings(self.source, self.site, self.bank_site),
                **gate,
            }
        )

    def run(
        self, state: ScoreState | None, save_every: int, process: int, processes: int, progress: bool
    ) -> ConceptDictionary:
        """This process's part of every pass; each ends with the sums of all processes."""
        place, latents = (self.source, self.site, self.by), self.sae.config.num_latents
        shards = range(shard_count(self.source))

        def over(work: Pass, indices: Sequence[int]) -> None:
            run_pass(work, indices, state, save_every, process, processes, progress)

        with Encoder(self.sae) as encoder:
            sums = StatisticsPass(*place, self.names, encoder, latents)
            over(sums, shards)
            dictionary = sums.statistics.build().replaced(assigned=self.assigned, site=str(self.site))
            require_prompts(dictionary, self.by)
            if self.calibrate:
                spacing = "logit" if self.sae.config.activation == "topk_sigmoid" else "log"
                with one_thread():
                    empty = Calibration(dictionary, self.candidates, _BINS, spacing)
                counts = CalibrationPass(*place, encoder, empty)
                over(counts, shards)
                dictionary = counts.calibration.build()
            gated = self.picture_false_positive is not None and len(self.names) > 1
            if self.bank or gated:
                with one_thread():
                    chosen = [self._selected(dictionary, name) for name in self.names]
            if gated:
                counted = self.source if self.gate_source is None else self.gate_source
                patches = counted.patches(self.site)
                most = min(QUARTERS * patches, MOST_COUNTED)
                seen = GatePass(counted, self.site, self.by, self.names, encoder, chosen, latents, most)
                over(seen, range(shard_count(counted)))
                if seen.sampled:
                    warnings.warn(
                        "no gate: the activations hold some patches of each map, and it counts those of whole ones; "
                        "collect all patches for it",
                        stacklevel=3,
                    )
                else:
                    gate = PictureCounts(
                        *(*seen.counts, patches, self.selection, self.picture_false_positive),
                        over="run",
                        several=seen.several,
                    )
                    dictionary = dictionary.replaced(gate=gate)
            if self.bank:
                drawn = BankPass(*place, encoder, self.bank_site, chosen, latents, self.bank, self.seed)
                over(drawn, _spread(len(shards)))
                dictionary = dictionary.replaced(bank=drawn.bank.build())
                if dictionary.bank is None:
                    warnings.warn(
                        "no bank: at some timestep every patch is detected; select fewer latents, or lower "
                        "false_positive",
                        stacklevel=3,
                    )
        return dictionary

    def _selected(self, dictionary: ConceptDictionary, name: str) -> Selection | None:
        """What is selected for a label; None where nothing is, which a bank cannot do without."""
        try:
            return dictionary.select(name, **self.selection)
        except ValueError:
            if self.bank:
                raise
            return None


def _finish(folder: Path, settings: dict[str, Any], dictionary: ConceptDictionary) -> None:
    # Gone before the dictionary changes and back after it, so it never vouches for another one.
    (folder / DONE_FILE).unlink(missing_ok=True)
    dictionary.save_pretrained(folder)
    write_files(folder, {DONE_FILE: json_bytes(settings)})


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    path = folder / DONE_FILE
    if not path.is_file():
        return False
    try:
        return read_json(path) == settings
    except ValueError:
        # Unreadable, or the first process has just removed it to replace the dictionary: it vouches for nothing.
        return False


def _refuse_another(folder: Path, settings: dict[str, Any], begun: bool) -> None:
    """ValueError where the folder holds a whole dictionary that is not a former result of these settings."""
    there = None
    with contextlib.suppress(ValueError):
        there = read_json(folder / DONE_FILE)
    if there is not None:
        require_same_settings(
            folder,
            there,
            settings,
            "holds the dictionary of other settings: {differences}. Choose another folder, or delete it",
        )
    if there is None and not begun and (folder / INFO_FILE).exists():
        raise ValueError(
            f"{folder}: holds a dictionary that this command did not make; choose another folder, or delete it"
        )


def _spread(shards: int) -> list[int]:
    """The numbers of at most `_BANK_SHARDS` of the shards, evenly spread."""
    count = min(shards, _BANK_SHARDS)
    return [number * shards // count for number in range(count)]


def sae_settings(sae: SparseAutoencoder) -> dict[str, Any]:
    """Everything that codes depend on."""
    config = sae.config
    weights = [part for name, part in sae.state_dict().items() if name != "W_dec" for part in (name, part)]
    return {
        "d_in": config.d_in,
        "num_latents": config.num_latents,
        "activation": config.activation,
        "k": config.k,
        "threshold": config.threshold,
        "device": sae.encoder.weight.device.type,
        "sha256": sha256(marked(weights)),
    }


def _source_settings(source: Source, site: Site, bank_site: Site | None) -> dict[str, Any]:
    """The source's own settings and a digest of its prompts; without these a digest of its activations."""
    given = source.origin() if source.turn is None else None
    if given is None:
        sites = {site, bank_site} - {None}
        shards = (source.shard(i, s) for s in sorted(sites) for i in range(shard_count(source)))
        given = {
            "timesteps": list(source.timesteps),
            "prompts": source.prompts,
            "prompts_per_shard": source.prompts_per_shard,
            "concepts": list(source.concepts),
            "styles": list(source.styles),
            "sha256": sha256(marked(part for shard in shards for part in shard)),
        }
    if source.labelled is None:
        return given
    return given | {"prompts_sha256": sha256(marked(prompt.to_dict() for prompt in source.labelled))}

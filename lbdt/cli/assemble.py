"""`lbdt assemble`: an SAE, its dictionary and settings as one eraser folder."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbdt.cli.options import (
    AsJson,
    Dtype,
    UnusedDevice,
    UnusedSeed,
    counted,
    inside,
    number,
    print_result,
    reported,
)
from lbdt.donors import AvoidedPatches, DonorSource
from lbdt.runs.limits import MOST_PADDING, MOST_PATCHES

if TYPE_CHECKING:
    from lbdt.editors import ConceptEraser
    from lbdt.formats.class_params import ClassSettings

_BEGUN = ".assembling"
"""What older versions left in a folder while they wrote it."""


class ReplacedPart(enum.StrEnum):
    """What is replaced."""

    output = "output"
    update = "update"


class ThresholdSource(enum.StrEnum):
    """Where thresholds come from."""

    published = "published"
    calibrated = "calibrated"


class SteeringRule(enum.StrEnum):
    """Steering rules."""

    saeuron = "saeuron"
    gsae = "gsae"
    sdxl = "sdxl"


class StrengthUnit(enum.StrEnum):
    active = "active"
    patches = "patches"


@reported
def command(
    sae: Annotated[
        str, typer.Option("--sae", metavar="DIR_OR_HUB", help="The SAE, in any format that lbdt reads.")
    ],
    dictionary: Annotated[
        str, typer.Option("--dictionary", metavar="DIR_OR_HUB", help="Of `lbdt score` with that SAE.")
    ],
    hookpoint: Annotated[
        str, typer.Option("--hookpoint", metavar="NAME", help="The block whose patches are replaced.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the eraser.")],
    padding: Annotated[int, counted(min=0, most=MOST_PADDING, help="Patches around the mask.")] = 1,
    source: Annotated[DonorSource, typer.Option(help="Donor patches.")] = DonorSource.row,
    min_patches: Annotated[
        int | None,
        counted(
            most=MOST_PATCHES,
            help="Detected patches below which a picture is left; 1: off. Default: calibrated.",
        ),
    ] = None,
    avoid: Annotated[
        AvoidedPatches,
        typer.Option(help="Whose patches are no donors: the erased concepts', or all known ones'."),
    ] = AvoidedPatches.erased,
    target: Annotated[
        ReplacedPart, typer.Option(help="Replace the block's output, or what it adds to its input.")
    ] = ReplacedPart.output,
    detect_at: Annotated[
        str | None, typer.Option(metavar="NAME", help="An earlier block that the SAE looks at.")
    ] = None,
    top_k: Annotated[int | None, counted(help="Latents of a concept per timestep.")] = None,
    percentile: Annotated[
        float | None,
        typer.Option(callback=inside(0, 100), help="Or all above this percentile of the scores, e.g. 99.99."),
    ] = None,
    assigned: Annotated[
        bool, typer.Option("--assigned", help="The latent that supervised training assigned.")
    ] = False,
    thresholds: Annotated[
        ThresholdSource | None, typer.Option(help="Default: calibrated where the dictionary is.")
    ] = None,
    false_positive: Annotated[
        float | None,
        typer.Option(
            callback=inside(0, 1, open_low=True),
            help="Share of other concepts' patches above a calibrated threshold.",
        ),
    ] = None,
    class_params: Annotated[
        Path | None,
        typer.Option(
            "--class-params",
            metavar="FILE",
            help="SAeUron's class_params.pth, or .json of lbdt convert: the percentile of each concept in it, and with "
            "--steering its strength.",
        ),
    ] = None,
    steering: Annotated[
        SteeringRule | None, typer.Option(help="Also keep the decoder and this steering baseline.")
    ] = None,
    strength: Annotated[float | None, number(help="Of --steering; negative to erase.")] = None,
    unit: Annotated[
        StrengthUnit,
        typer.Option(help="Of --steering sdxl: times a latent's mean where active, or over patches."),
    ] = StrengthUnit.active,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the files.")] = Dtype.float32,
    seed: UnusedSeed = 0,
    device: UnusedDevice = "cpu",
    as_json: AsJson = False,
) -> None:
    """Put an SAE, its dictionary and the settings of detection and replacement into one folder: an eraser."""
    if steering is None and strength is not None:
        raise typer.BadParameter("give --steering and --strength together", param_hint="--steering")
    if steering is not None and (strength is None) == (class_params is None):
        raise typer.BadParameter(
            "give --steering together with --strength, or with --class-params", param_hint="--steering"
        )
    if unit is not StrengthUnit.active and steering is not SteeringRule.sdxl:
        raise typer.BadParameter("is of --steering sdxl only; leave it out", param_hint="--unit")
    selection = {
        "top_k": top_k,
        "percentile": percentile,
        "assigned": assigned or None,
        "thresholds": None if thresholds is None else thresholds.value,
        "false_positive": false_positive,
    }
    values, lines = write_eraser(
        sae,
        dictionary,
        out,
        settings={
            "hookpoint": hookpoint,
            "padding": padding,
            "source": source.value,
            "target": target.value,
            "detect_at": detect_at,
            "min_patches": min_patches,
            "avoid": avoid.value,
            "selection": {key: value for key, value in selection.items() if value is not None},
        },
        rule=None if steering is None else steering.value,
        strength=strength,
        unit=unit.value,
        dtype=dtype.value,
        class_params=class_params,
    )
    print_result(values, lines, as_json)


def write_eraser(
    sae: str,
    dictionary: str,
    out: Path,
    *,
    settings: dict[str, Any],
    rule: str | None,
    strength: float | None,
    dtype: str,
    unit: str = "active",
    class_params: Path | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Writes the eraser to `out`, and with `rule` its steering baseline; `settings`: keywords of `ConceptEraser`.
    `class_params`: a file of SAeUron's parameters, for the selection of each concept in it, and its strength if `rule`.

    An eraser that is there is replaced all at one moment.

    Raises:
        ValueError: parts that do not fit each other, a concept without any latent, or an `out` that holds other files.
        OSError: why `out` cannot be written.
    """
    import torch

    from lbdt.dictionary import ConceptDictionary
    from lbdt.editors import ConceptEraser, Steering
    from lbdt.editors.editor_files import FOLDER
    from lbdt.runs.folder import replaced
    from lbdt.runs.writable import check_out_folder
    from lbdt.sae import SparseAutoencoder

    check_out_folder(out)
    ours = (out / _BEGUN).is_file() or (out / ConceptEraser.FILE).is_file()
    if out.exists() and any(out.iterdir()) and not ours:
        raise ValueError(f"--out {out}: holds something else than an eraser; give a new folder")
    known = ConceptDictionary.from_pretrained(dictionary)
    if class_params is not None:
        general = settings.get("selection") or {}
        given = _of_classes(class_params, known.concepts, rule, general)
        strength = None if rule is None else given.strength
        settings = {**settings, "selection": general | given.selection}
    eraser = ConceptEraser(SparseAutoencoder.from_pretrained(sae), known, **settings)
    _check_score(dictionary, eraser)
    latents = {concept: eraser.select(concept).latents.tolist() for concept in eraser.concepts}
    steering = None if rule is None else Steering.from_eraser(eraser, rule=rule, strength=strength, unit=unit)
    # With the steering of an earlier eraser, whose decoder may be dropped.
    with replaced(out, (ConceptEraser.FILE, Steering.FILE, *FOLDER, _BEGUN)) as new:
        eraser.save_pretrained(new, dtype=getattr(torch, dtype), decoder=steering is not None)
        if steering is not None:
            steering.save_settings(new)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    values = {
        "out": str(out),
        **settings,
        "steering": rule,
        "strength": strength,
        "bytes": size,
        "concepts": latents,
    }
    lines = [
        f"{'eraser':12}{out}, {size / 1e6:.1f} MB",
        f"{'hookpoint':12}{eraser.hookpoint}, {eraser.target} replaced, padding {eraser.padding}, "
        f"source {eraser.source}, avoid {eraser.avoid}",
        f"{'concepts':12}{len(latents)}, {sum(map(len, latents.values()))} latents in all",
    ]
    if class_params is not None:
        own = [name for name in eraser.concepts if name in given.selection]
        lines.append(f"{'parameters':12}of {len(own)} concepts from {class_params}")
    if steering is not None:
        of_unit = f", unit {unit}" if rule == "sdxl" else ""
        lines.append(f"{'steering':12}rule {rule}, strength {strength}{of_unit}")
    return values, lines


def _of_classes(
    path: Path, concepts: Sequence[str], rule: str | None, selection: dict[str, Any]
) -> ClassSettings:
    """The settings of a class_params file; thresholds and their rate as in `selection`, where it says."""
    from lbdt.formats.class_params import load_class_settings

    given = load_class_settings(path, concepts)
    if rule not in (None, given.rule):
        raise ValueError(
            f"--steering {rule}: the strengths of {path} are of rule {given.rule}; give that rule, or --strength"
        )
    limits = {name: selection[name] for name in ("thresholds", "false_positive") if name in selection}
    return given._replace(selection={name: own | limits for name, own in given.selection.items()})


def _check_score(dictionary: str, eraser: ConceptEraser) -> None:
    """ValueError where `lbdt score` says that it made the dictionary of another SAE or site, or drew its bank at
    another."""
    from lbdt.activations import Site
    from lbdt.dictionary.scoring import DONE_FILE, sae_settings
    from lbdt.runs.files import read_json

    path = Path(dictionary) / DONE_FILE
    if not path.is_file():
        return
    made = read_json(path)
    scored = made.get("sae") if isinstance(made, dict) else None
    wanted = scored.get("sha256") if isinstance(scored, dict) else None
    given = sae_settings(eraser.sae)["sha256"]
    if wanted not in (None, given):
        raise ValueError(
            f"{path}: the dictionary is of an SAE with SHA-256 {str(wanted)[:12]}..., and --sae has {given[:12]}...; "
            "give the SAE that it was scored with, or score again"
        )
    looked = Site(eraser.detect_at or eraser.hookpoint, "update" if eraser.sae.config.update else "output")
    sites = {"site": (looked, "--hookpoint and --detect-at")}
    if eraser.dictionary.bank is not None:
        sites["bank_site"] = (Site(eraser.hookpoint, eraser.target), "--hookpoint and --target")
    for name, (wanted, options) in sites.items():
        found = made.get(name) if isinstance(made, dict) else None
        if found not in (None, str(wanted)):
            raise ValueError(
                f"{path}: {name.replace('_', ' ')}: the dictionary is of {found}, and the eraser of {wanted}; change "
                f"{options}, or score again"
            )

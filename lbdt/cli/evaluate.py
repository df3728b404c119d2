"""`lbdt evaluate`: does it erase, what else does it break, at what cost."""

from __future__ import annotations

import enum
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lbdt.cli.options import MOST_THREADS, AsJson, CanvasKind, Device, counted, number, print_result, reported
from lbdt.runs.limits import MOST_STEPS, SEEDS
from lbdt.runs.wording import printable


class UnlearnedTask(enum.StrEnum):
    """What is unlearned on UnlearnCanvas."""

    object = "object"
    style = "style"


class PromptTemplate(enum.StrEnum):
    """Prompts of UnlearnCanvas."""

    saeuron = "saeuron"
    official = "official"


class StartNoise(enum.StrEnum):
    """What the pictures of a seed start from."""

    run = "run"
    prompt = "prompt"


class JudgedFile(enum.StrEnum):
    """What the classifiers look at."""

    jpeg = "jpeg"
    png = "png"


class CraPrompts(enum.StrEnum):
    """Prompts whose pictures CRA is of."""

    named = "named"
    unnamed = "unnamed"
    all = "all"


class ComparedPictures(enum.StrEnum):
    """Pictures that the Frechet distance is of."""

    styled = "styled"
    others = "others"


class NudityRule(enum.StrEnum):
    """Published rules of counting."""

    saemnesia = "saemnesia"
    mu_attack = "mu-attack"


@reported
def command(
    world: Annotated[
        str,
        typer.Option(
            "--world",
            metavar="canvas|unlearncanvas|PROMPTS",
            help="EmojiCanvas, the published protocol, or a prompt file (.jsonl, .csv).",
        ),
    ] = "canvas",
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            metavar="NAME",
            help=f"Default: all, on EmojiCanvas {', '.join(CanvasKind)}. May be repeated.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="DIR_OR_HUB", help="The pipeline. Default: EmojiCanvas.")
    ] = None,
    eraser: Annotated[
        list[str] | None,
        typer.Option(
            "--eraser",
            metavar="[NAME=]DIR_OR_HUB",
            help="What is evaluated. Default: EmojiCanvas's. May be repeated.",
        ),
    ] = None,
    steering: Annotated[
        list[str] | None,
        typer.Option(
            "--steering",
            metavar="[NAME=]DIR_OR_HUB",
            help="The baseline of the eraser of that name. May be repeated.",
        ),
    ] = None,
    strengths: Annotated[
        list[str] | None,
        typer.Option(
            "--strengths",
            metavar="[NAME=]S,S,...",
            help="Of the sweep of that baseline. Default: the published ones of saeuron, saemnesia, gsae and "
            "saeparate; of other names no sweep, and the saved strength. May be repeated.",
        ),
    ] = None,
    object_classifier: Annotated[
        str | None, typer.Option(metavar="FILE", help="UnlearnCanvas: style50_cls.pth, or its folder.")
    ] = None,
    style_classifier: Annotated[
        str | None, typer.Option(metavar="FILE", help="UnlearnCanvas: style50.pth, or its folder.")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            "--clip", metavar="DIR_OR_HUB", help="A CLIP model: CLIP score; the judge of a prompt file."
        ),
    ] = None,
    vlm: Annotated[
        str | None,
        typer.Option(
            "--vlm", metavar="DIR_OR_HUB", help="A Qwen2-VL that judges artifacts instead of features."
        ),
    ] = None,
    nudity: Annotated[
        NudityRule | None, typer.Option(help="Count by NudeNet (installed by you), by this rule.")
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option("--concept", metavar="NAME", help="To erase. Default: all. May be repeated."),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="S,S,...",
            help="That are scored. Default: EmojiCanvas 500,501,502; UnlearnCanvas the published ones.",
        ),
    ] = None,
    sweep_seeds: Annotated[
        str | None, typer.Option(metavar="S,S,...", help="That steering's strength is chosen on.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", **SEEDS, help="Short for --seeds with one.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few pictures: on EmojiCanvas under 12 minutes on two cores.")
    ] = False,
    own: Annotated[
        int | None,
        counted(help="Prompts of the erased concept, per concept and seed. Default: all."),
    ] = None,
    others: Annotated[
        int | None, counted(help="Prompts of others. Default: on EmojiCanvas 6, else all.")
    ] = None,
    task: Annotated[
        UnlearnedTask, typer.Option(help="UnlearnCanvas: what is erased.")
    ] = UnlearnedTask.object,
    template: Annotated[
        PromptTemplate, typer.Option(help="UnlearnCanvas: whose prompts.")
    ] = PromptTemplate.saeuron,
    noise: Annotated[
        StartNoise | None,
        typer.Option(
            help="UnlearnCanvas: pictures draw their start noise in turn from one generator a seed (run, as "
            "published; the default), or each starts from the seed (prompt)."
        ),
    ] = None,
    judged: Annotated[
        JudgedFile | None,
        typer.Option(
            help="UnlearnCanvas: the classifiers see JPEG files (as published; the default), or the pictures."
        ),
    ] = None,
    cra: Annotated[
        CraPrompts | None,
        typer.Option(
            help="UnlearnCanvas, --task style: CRA over prompts that name a style, none, or all. Default: unnamed as "
            "SAeUron's script, all with --template official."
        ),
    ] = None,
    compared: Annotated[
        ComparedPictures | None,
        typer.Option(
            help="UnlearnCanvas: the Frechet distance is of other concepts' pictures in a style (as published; the "
            "default), or also of those in none and photographs."
        ),
    ] = None,
    steps: Annotated[
        int | None, counted(most=MOST_STEPS, help="Denoising steps. Default: the world's.")
    ] = None,
    guidance: Annotated[float | None, number(min=0, help="Guidance scale. Default: the world's.")] = None,
    batch: Annotated[
        int | None, counted(most=65_535, help="Pictures generated together. Default: the world's.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Pictures and report; continued if begun.")
    ] = Path("evaluation"),
    processes: Annotated[
        int | None,
        counted(
            most=MOST_THREADS, help="That share the work. Default: one a core (at most 8), or one a GPU."
        ),
    ] = None,
    threads: Annotated[
        int,
        counted(
            most=MOST_THREADS, help="Of each process on a CPU; pictures depend on it in their last bits."
        ),
    ] = 1,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score base, negative prompt, UCE, steering and PER over concepts, styles and seeds; write table, plots and one
    HTML report.

    A run that was killed goes on by the same command. Figures are the same for any number of processes, also of
    several machines' (`torchrun --nproc_per_node N -m lbdt evaluate ...`, or on GPUs `accelerate launch`).
    """
    from lbdt.evaluation.request import EvaluationRequest, EvaluationSubject, evaluate

    if seed is not None and seeds is not None:
        raise typer.BadParameter("give --seed or --seeds, not both", param_hint="--seed")
    subject = EvaluationSubject(
        world=world,
        model=model,
        erasers=_named("--eraser", eraser),
        steering=_named("--steering", steering),
        strengths={
            name: _numbers("--strengths", text, float)
            for name, text in _named("--strengths", strengths).items()
        },
        object_classifier=object_classifier,
        style_classifier=style_classifier,
        clip=clip,
        steps=steps,
        guidance=guidance,
        batch=batch,
        task=task.value,
        template=template.value,
        noise=noise and noise.value,
        judged=judged and judged.value,
        cra=cra and cra.value,
        compared=compared and compared.value,
    )
    request = EvaluationRequest(
        subject=subject,
        kinds=tuple(kind or ()),
        concepts=tuple(concept or ()),
        seeds=(seed,) if seed is not None else _numbers("--seeds", seeds, int),
        sweep_seeds=_numbers("--sweep-seeds", sweep_seeds, int),
        quick=quick,
        own=own,
        others=others,
        out=out,
        threads=threads,
        device=device,
        vlm=vlm,
        nudity=None if nudity is None else nudity.value,
    )
    values = evaluate(request, processes=processes, command=_command_line())
    if values:
        print_result(values, _table(values, out), as_json)


def _named(option: str, given: list[str] | None) -> dict[str, str]:
    """NAME=VALUE pairs; a value alone is of the kind "eraser"."""
    pairs: dict[str, str] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        name, value = (name, value) if equals else ("eraser", text)
        if not name or not value or name in pairs:
            raise typer.BadParameter(f"expected NAME=VALUE, each name once; got {text!r}", param_hint=option)
        pairs[name] = value
    return pairs


def _numbers(option: str, text: str | None, number: type) -> tuple:
    """One or more numbers of an option that was given: whole ones in [0, 2^63), others finite."""
    if text is None:
        return ()
    try:
        found = tuple(number(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = ()
    if not found or not all(math.isfinite(each) if number is float else 0 <= each < 2**63 for each in found):
        wanted = (
            "finite numbers such as -1,-2.5" if number is float else "numbers such as 1,2, from 0 to 2^63 - 1"
        )
        raise typer.BadParameter(f"expected {wanted}; got {text!r}", param_hint=option)
    return found


def _table(values: Mapping[str, Any], out: Path) -> list[str]:
    from lbdt.evaluation.report import tables

    lines = list(tables.lines(values))
    for kind, found in values["kinds"].items():
        lines += [
            f"artifacts, {kind}, {row['method']}: no answer on {row['unanswered']} of {row['pictures']} pictures"
            for row in found["rows"]
            if row.get("unanswered")
        ]
    for kind, methods in (values.get("nudity") or {}).items():
        lines += [f"nudity, {kind}, {method}: {found['rule']}" for method, found in methods.items()]
    return [
        *lines,
        "",
        f"report      {out / 'report.html'}",
        f"figures     {out / 'table.csv'}, {out / 'values.json'}",
    ]


def _command_line(arguments: Sequence[str] | None = None) -> str:
    """The command as it was typed; what cannot be printed of it is escaped."""
    return printable(shlex.join(["lbdt", *(sys.argv[1:] if arguments is None else arguments)]))

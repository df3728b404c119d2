"""`lbdt attack`: adversarial prefixes against an eraser, and UA before and after."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from lbdt.cli.erase import RemovalMethod
from lbdt.cli.options import (
    MOST_THREADS,
    AsJson,
    CanvasKind,
    Device,
    Eraser,
    KindOption,
    counted,
    number,
    print_result,
    reported,
)
from lbdt.cli.sampling import Model
from lbdt.runs.limits import MOST_STEPS, SEEDS
from lbdt.runs.wording import printable

_PANEL = "The search"


class AttackWorld(enum.StrEnum):
    """The world whose pairs are attacked."""

    canvas = "canvas"
    unlearncanvas = "unlearncanvas"


class AttackTask(enum.StrEnum):
    """What is erased of UnlearnCanvas."""

    object = "object"
    style = "style"


class PrefixPosition(enum.StrEnum):
    """Places of the tokens in the prompt."""

    prefix = "prefix"
    suffix = "suffix"
    middle = "middle"


class JudgedPrompt(enum.StrEnum):
    """What success is judged by."""

    typed = "typed"
    ids = "ids"


class PrefixOrigin(enum.StrEnum):
    """Where prefixes come from."""

    gradient = "gradient"
    random = "random"


@reported
def command(
    world: Annotated[
        AttackWorld,
        typer.Option(help="EmojiCanvas, or a --model of your own; the published pairs, sampling and judge."),
    ] = AttackWorld.canvas,
    eraser: Eraser = None,
    kind: KindOption = CanvasKind.saeuron,
    model: Model = None,
    method: Annotated[
        RemovalMethod,
        typer.Option(help="What is attacked: replaced patches, or the steering baseline of the same folder."),
    ] = RemovalMethod.per,
    strength: Annotated[
        float | None, number(help="Of steering, negative to erase. Default: the folder's.")
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option("--concept", metavar="NAME", help="Erased and attacked; may be repeated. Default: all."),
    ] = None,
    style: Annotated[
        list[str] | None,
        typer.Option(
            "--style",
            metavar="NAME",
            help="Of the prompts; may be repeated. Default: the world's, and with --model alone none. Where styles "
            "are erased (--task style), an object.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="MODULE:FUNCTION",
            help="Python function: list of pictures to list of concept names. Default: EmojiCanvas's classifier.",
        ),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="UnlearnCanvas: style50_cls.pth, for --task style style50.pth, or its folder.",
        ),
    ] = None,
    task: Annotated[AttackTask, typer.Option(help="UnlearnCanvas: what is erased.")] = AttackTask.object,
    tokens: Annotated[int, counted(help="Learned tokens in the prompt.", rich_help_panel=_PANEL)] = 5,
    position: Annotated[
        PrefixPosition, typer.Option(help="Where they are in it.", rich_help_panel=_PANEL)
    ] = PrefixPosition.prefix,
    judged: Annotated[
        JudgedPrompt,
        typer.Option(
            help="The picture of what can be typed, as published, or of the token ids, which the text may not give "
            "back.",
            rich_help_panel=_PANEL,
        ),
    ] = JudgedPrompt.typed,
    iterations: Annotated[
        int | None,
        counted(help="At each timestep. Default: 40, quick: 20.", rich_help_panel=_PANEL),
    ] = None,
    timesteps: Annotated[
        int | None,
        counted(
            most=MOST_STEPS,
            help="Spread over the noise schedule. Default: 50, quick: 10.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    check_every: Annotated[
        int,
        counted(
            "--check-every",
            metavar="N",
            help="Timesteps from one judged picture to the next.",
            rich_help_panel=_PANEL,
        ),
    ] = 1,
    search: Annotated[
        PrefixOrigin,
        typer.Option(
            help="The attack, or as its control as many checks of random prefixes.", rich_help_panel=_PANEL
        ),
    ] = PrefixOrigin.gradient,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Every fifth concept, every third style, and a shorter search, unless given."
        ),
    ] = False,
    steps: Annotated[
        int | None,
        counted(most=MOST_STEPS, help="Denoising steps. Default: 20, for kind sdxl 4, on UnlearnCanvas 100."),
    ] = None,
    guidance: Annotated[
        float | None,
        number(
            min=0,
            help="Guidance scale. Default: on EmojiCanvas 3, for kind sdxl none, on UnlearnCanvas 9; else the "
            "pipeline's own.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="One file a pair; continued if begun. Default: not kept."),
    ] = None,
    threads: Annotated[
        int, counted(most=MOST_THREADS, help="CPU threads of a process, on which the outcome may depend.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", **SEEDS, help="Of the pictures, and so of the attack.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Search prompts that bring an erased concept back: UnlearnDiffAtk through the attached eraser.

    Prints UA before and after the attack. With --out the same command continues a run that was killed, and several
    processes may share one (`torchrun --nproc_per_node N -m lbdt attack ...`); the outcomes are the same.
    """
    if world is AttackWorld.unlearncanvas:
        if None in (model, eraser, classifier) or judge is not None:
            raise typer.BadParameter(
                "give --model, --eraser and --classifier with it, and no --judge",
                param_hint="--world unlearncanvas",
            )
    elif classifier is not None or task is not AttackTask.object:
        raise typer.BadParameter("are of --world unlearncanvas", param_hint="--classifier, --task")
    elif model is not None and (eraser is None or judge is None or not concept):
        raise typer.BadParameter(
            "an eraser, a judge and concepts belong to a pipeline: give --eraser, --judge and --concept with --model",
            param_hint="--model",
        )
    if method is RemovalMethod.per and strength is not None:
        raise typer.BadParameter("is of --method steering: PER has no strength", param_hint="--strength")
    from lbdt.attack.pairs import AttackRequest, attack_pairs

    values = attack_pairs(
        AttackRequest(
            model=model,
            eraser=eraser,
            kind=kind.value,
            steer=method is RemovalMethod.steering,
            strength=strength,
            concepts=tuple(concept or ()),
            styles=tuple(style or ()),
            judge=judge,
            tokens=tokens,
            iterations=iterations,
            timesteps=timesteps,
            check_every=check_every,
            search=search.value,
            quick=quick,
            steps=steps,
            guidance=guidance,
            position=position.value,
            judged=judged.value,
            world=world.value,
            task=task.value,
            classifier=classifier,
        ),
        out=out,
        threads=threads,
        seed=seed,
        device=device,
    )
    if values["process"] == 0:
        print_result(values, _table(values), as_json)


def _table(values: dict[str, Any]) -> list[str]:
    from lbdt.attack import PUBLISHED, AttackOutcome

    outcomes = [AttackOutcome.from_dict(pair) for pair in values["pairs"]]
    if not outcomes:
        return []
    other = "another world" if values["world"] == "canvas" else "reference pictures of its data set"
    attack, width = values["attack"], max(8, *(len(printable(name)) for name in values["concepts"]))
    how = f"{attack['iterations']} iterations at each of {attack['timesteps']} timesteps"
    if attack["search"] == "random":
        how = f"as a control up to {-(-attack['timesteps'] // attack['check_every'])} random prefixes"
    lines = [
        f"UnlearnDiffAtk on {values['model']}: {values['method']}, {values['eraser']}; "
        f"{attack['tokens']} tokens ({attack['position']}), {how}, judged by "
        f"{'what can be typed' if attack['judged'] == 'typed' else 'token ids'}, seed {values['seed']}",
        "",
        f"{'concept':{width}}  pairs  UA before  UA after  effectiveness",
    ]
    for name, row in [*values["concepts"].items(), ("all", values["summary"])]:
        lines.append(
            f"{printable(name):{width}}  {row['pairs']:5d}  {row['before']:9.2f}  {row['after']:8.2f}  "
            f"{row['effectiveness']:13.2f}"
        )
    lines += [
        "",
        "UA: percent of pairs in which the judge does not see the erased concept; effectiveness: the loss",
    ]
    astray = sum(outcome.reference != outcome.concept for outcome in outcomes)
    if astray:
        lines.append(f"the reference picture shows another concept, as judged, in {astray} pairs")
    tried = [outcome for outcome in outcomes if outcome.prefix]
    if tried:
        kept = sum(outcome.typable for outcome in tried)
        lines.append(
            f"typed, {kept} of the {len(tried)} attacked prompts that were judged last have their token ids"
        )
    broken = [outcome for outcome in outcomes if outcome.erased_before and not outcome.erased_after]
    if broken:
        by_ids = " (* run by token ids, which this text does not give back)" * (attack["judged"] == "ids")
        lines += ["", f"prompts that bring the concept back{by_ids}"]
    for outcome in broken:
        lines.append(
            f"{printable(outcome.concept):{width}}  {printable(outcome.attacked)}"
            + " *" * (attack["judged"] == "ids" and not outcome.typable)
        )
    lines += [
        "",
        f"published on UnlearnCanvas ({other}: 1000 pairs, 512 px): UA before, after, effectiveness",
    ]
    lines += [f"{name:15}  {a:.2f}  {b:.2f}  {c:.2f}" for name, a, b, c in PUBLISHED]
    each = values["seconds_per_pair"]
    there = f", {values['resumed']} of the pairs there already" if values["resumed"] else ""
    lines += ["", f"{values['seconds']:.1f} s" + ("" if each is None else f", {each:.1f} s a pair") + there]
    return lines

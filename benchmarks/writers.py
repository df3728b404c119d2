"""The commands that write, in small: what `benchmarks.faults` tries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faulty import run
from lbdt.runs.files import write_file


@dataclass(frozen=True)
class Command:
    """A command line without its --out."""

    arguments: tuple[str, ...]
    older: tuple[str, ...] | None = None
    """The command line of the result that is there before; None: it goes on with what is there, at first nothing."""
    out: str = "out"
    again: tuple[str, ...] = ()
    """What is added to replace something."""
    timed: str = "(?!)"
    """Names of files whose numbers are measured; a pattern."""


def commands(inputs: Path) -> dict[str, Command]:
    """The commands by name, on the inputs of `prepare`."""
    pipe, eraser = ("--model", str(inputs / "pipe")), ("--eraser", str(inputs / "eraser"))
    cpu, site = ("--device", "cpu"), "unet.up_blocks.0.attentions.0:output"
    sampling = ("--prompts", str(inputs / "prompts.jsonl"), "--steps", "2", "--threads", "1")
    stored = ("--activations", str(inputs / "activations"))
    erase = ("erase", "a cat", "--concept", "Cats", *pipe, *eraser, *cpu, "--steps", "2", "--seed")
    assemble = ("assemble", "--sae", str(inputs / "sae"), "--dictionary", str(inputs / "dictionary"))
    assemble += ("--hookpoint", site.partition(":")[0], "--top-k", "1", "--padding")
    bench = ("bench", "--quick", "--rounds", "2", "--share", "0.1", *cpu, "--threads", "1", "--op")
    attack = ("attack", *pipe, *eraser, *cpu, "--tokens", "2", "--iterations", "2", "--timesteps", "2")
    attack += ("--steps", "2", "--judge", "tests.attack.judges:drawing_lots", "--threads", "1")
    attack += ("--concept", "Cats", "--style", "A", "--style", "B", "--style", "C")
    evaluate = ("evaluate", "--world", str(inputs / "rows.jsonl"), *pipe, "--eraser", f"x={eraser[1]}", *cpu)
    evaluate += ("--steps", "2", "--batch", "2", "--own", "1", "--others", "1", "--quick", "--seed", "0")
    evaluate += ("--processes", "1", "--threads", "1")
    score = ("score", "--sae", str(inputs / "sae"), "--site", site, *stored, *cpu, "--save-every", "2")
    train = ("train", "--recipe", "saeuron", *stored, *cpu, "--expansion", "4", "--k", "4", "--rows", "64")
    train += ("--steps", "12", "--checkpoint-every", "4")
    convert = ("convert", str(inputs / "sae"), "--to", "lbdt", "--dtype")
    return {
        "erase": Command((*erase, "1"), (*erase, "2"), out="picture.png"),
        "collect": Command(("collect", *pipe, "--site", site, *sampling, "--prompts-per-shard", "2", *cpu)),
        "train": Command(train),
        "score": Command(score),
        "assemble": Command(
            (*assemble, "2", "--steering", "sdxl", "--strength", "-1"), (*assemble, "1", "--source", "mean")
        ),
        "convert": Command((*convert, "float32"), (*convert, "float16"), again=("--force",)),
        "evaluate": Command(evaluate, timed=r"report\.html"),
        "attack": Command(attack),
        "bench": Command(
            (*bench, "patch_uniform"), (*bench, "encode_topk"), out="result.json", timed=r"result\.json"
        ),
    }


def prepare(inputs: Path) -> None:
    """A tiny pipeline, its eraser, prompts and activations. Not to be called by the process that forks."""
    from tests import toy

    toy.pipeline(inputs / "tokenizer", tokens=40).save_pretrained(inputs / "pipe")
    eraser = toy.eraser(k=8)
    eraser.save_pretrained(inputs / "eraser", decoder=True)
    eraser.sae.save_pretrained(inputs / "sae")
    eraser.dictionary.save_pretrained(inputs / "dictionary")
    names = [("cat", "Cats"), ("dog", "Dogs"), ("tree", "Trees")]
    prompts = [{"prompt": f"a {p}", "concept": c, "seed": s} for s in range(4) for p, c in names]
    write_file(inputs / "prompts.jsonl", "".join(json.dumps(p) + "\n" for p in prompts).encode())
    write_file(inputs / "rows.jsonl", "".join(json.dumps(p) + "\n" for p in prompts[:6]).encode())
    collect = commands(inputs)["collect"].arguments
    ended = run((*collect, "--out", str(inputs / "activations")), inputs)
    if ended.code:
        raise RuntimeError(ended.errors)


def without_numbers(data: bytes) -> Any:
    """JSON with its numbers and the measured texts left out; other files as whether there is anything in them."""
    try:
        value = json.loads(data)
    except ValueError:
        return bool(data)

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items() if name not in ("date", "command")}
        return [plain(part) for part in value] if isinstance(value, list) else type(value).__name__

    return plain(value)


COMMANDS = tuple(commands(Path()))

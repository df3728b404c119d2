"""The `lbdt` command. Heavy imports happen inside the commands, so `lbdt --help` is quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lbdt.cli import (
    app as page,
)
from lbdt.cli import (
    assemble,
    attack,
    audit,
    bench,
    collect,
    concepts,
    convert,
    env,
    erase,
    evaluate,
    generate,
    policy,
    score,
    serve,
    train,
)

app = typer.Typer(
    name="lbdt",
    help="Concept erasure in diffusion models: an SAE detects a concept's patches, and they are replaced.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> int:
    """Runs the command line; exits with 0 (done), 1 (failed) or 2 (bad usage)."""
    app(prog_name="lbdt")
    return 0


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        import lbdt

        sys.stdout.write(f"lbdt {lbdt.__version__}\n")
        raise typer.Exit()


for module in (
    erase,
    concepts,
    collect,
    train,
    score,
    assemble,
    evaluate,
    attack,
    generate,
    convert,
    page,
    serve,
    bench,
    env,
):
    app.command(module.__name__.rpartition(".")[2])(module.command)
app.add_typer(policy.app, name="policy")
app.add_typer(audit.app, name="audit")

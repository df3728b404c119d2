"""`lbdt audit`: whether the audit of a service is what it wrote."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lbdt.cli.options import AsJson, print_result, reported, say
from lbdt.runs.wording import printable

if TYPE_CHECKING:
    from lbdt.serving.audit_check import AuditSummary

app = typer.Typer(no_args_is_help=True)


@app.callback()
def command() -> None:
    """The audit of a service: a line for every picture, written before its release."""


@app.command("verify")
@reported
def verify_command(
    place: Annotated[
        str, typer.Argument(metavar="FILE_OR_FOLDER", help="An audit file, or a folder: all *.jsonl in it.")
    ],
    key_file: Annotated[
        str | None, typer.Option("--key-file", metavar="FILE", help="The key that the writers had, if any.")
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(
            "--expect", metavar="HASH", help="A hash kept elsewhere: it has to be that of a file's last line."
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="All writers were closed: a file without an end line, or cut off, is a fault."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check an audit file, or a folder of them: every line's spelling and hash, their order, and that none is missing.

    Exit code 1 with the first 20 faults on stderr. Without a key, whoever may write a file can make all its hashes
    anew; and lines cut off an unfinished file are noticed by --expect alone.
    """
    from lbdt.serving.audit_check import AuditFault, verify
    from lbdt.serving.audit_lines import read_key

    key = None if key_file is None else read_key(key_file)
    try:
        summary = verify(place, key=key, expect=expect, strict=strict, progress=True)
    except AuditFault as error:
        for fault in error.faults:
            say(f"lbdt: {printable(str(fault))}")
        if error.count > len(error.faults):
            say(f"lbdt: {error.count - len(error.faults)} more faults")
        if as_json:
            faults = [fault._asdict() for fault in error.faults]
            print_result({"faults": error.count, "first": faults, **error.summary.as_dict()}, [], True)
        sys.exit(1)  # typer.Exit is a RuntimeError, which `reported` would put in words
    print_result({"faults": 0, "first": [], **summary.as_dict()}, _lines(summary), as_json)


def _lines(summary: AuditSummary) -> list[str]:
    outcomes = ", ".join(f"{count} {name}" for name, count in summary.outcomes.items() if count)
    count = len(summary.files)
    lines = [
        f"{count} file{'s' * (count != 1)}, {summary.lines} lines, {summary.pictures} pictures"
        f"{': ' * bool(outcomes)}{outcomes}"
    ]
    for file in summary.files:
        state = "finished" if file.finished else "open: no end line, its writer is at work or was killed"
        if file.torn:
            state += f"; the last line is cut off after {file.torn} bytes, as by a kill"
        lines.append(f"{file.name}: {state}; last hash {file.last or 'none'}")
    return lines

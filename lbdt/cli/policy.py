"""`lbdt policy`: the policies of a service's tenants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbdt.cli.options import (
    AsJson,
    CanvasKind,
    Eraser,
    KindOption,
    UnusedDevice,
    UnusedSeed,
    print_result,
    reported,
)

if TYPE_CHECKING:
    from lbdt.serving import Policy

_MOST_ROWS = 50

app = typer.Typer(
    help="Policies of a service's tenants: which concepts are erased for whom.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command("check")
@reported
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The policy, a TOML file.")],
    eraser: Eraser = None,
    kind: KindOption = CanvasKind.saeuron,
    seed: UnusedSeed = 0,
    device: UnusedDevice = "cpu",
    as_json: AsJson = False,
) -> None:
    """Check a policy against an eraser's concepts, and list what is erased for each tenant; or all that is wrong."""
    from lbdt.canvas.defaults import eraser_of
    from lbdt.serving import load_policy

    policy = load_policy(file, eraser_of(eraser, kind.value).concepts)
    values = _values(file, policy)
    print_result(values, _table(values), as_json)


def _values(file: Path, policy: Policy) -> dict[str, Any]:
    return {
        "file": str(file),
        "version": policy.version,
        "digest": policy.digest,
        "unknown_tenant": policy.unknown_tenant,
        "tenants": [
            {"tenant": rules.tenant, "concepts": list(rules.concepts), "on_failure": rules.on_failure}
            for rules in map(policy.resolve, policy.tenants)
        ],
    }


def _table(values: dict[str, Any]) -> list[str]:
    rows = values["tenants"]
    others = values["unknown_tenant"]
    lines = [
        f"{values['file']}: version {values['version']}, SHA-256 {values['digest']}",
        f"unknown tenants: {'refused' if others is None else f'as {others}'}",
    ]
    shown = rows[:_MOST_ROWS]
    width = max(len("tenant"), *(len(row["tenant"]) for row in shown)) if shown else len("tenant")
    lines.append(f"{'tenant':{width}}  {'on failure':11}  concepts erased")
    for row in shown:
        concepts = ", ".join(row["concepts"]) or "none"
        lines.append(f"{row['tenant']:{width}}  {row['on_failure']:11}  {concepts}")
    if len(rows) > len(shown):
        lines.append(f"... and {len(rows) - len(shown)} more")
    return lines

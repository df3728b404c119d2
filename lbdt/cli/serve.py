"""`lbdt serve`: pictures for many tenants over HTTP."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lbdt.cli.options import (
    MOST_THREADS,
    CanvasKind,
    Device,
    Eraser,
    KindOption,
    Model,
    counted,
    number,
    reported,
    say,
)
from lbdt.runs.limits import MOST_STEPS

if TYPE_CHECKING:
    from lbdt.serving.settings import ServeSettings


@reported
def command(
    policy: Annotated[
        Path,
        typer.Option(
            "--policy", metavar="FILE.toml", help="Who may not be given what; see lbdt policy check."
        ),
    ],
    audit: Annotated[
        Path, typer.Option("--audit", metavar="DIR", help="Where a line for each picture is written.")
    ],
    audit_key: Annotated[
        Path | None, typer.Option("--audit-key", metavar="FILE", help="Key of the audit's hashes.")
    ] = None,
    model: Model = None,
    eraser: Eraser = None,
    kind: KindOption = CanvasKind.saeuron,
    steps: Annotated[
        int | None, counted(most=MOST_STEPS, help="Denoising steps. Default: 20, for kind sdxl 4.")
    ] = None,
    guidance: Annotated[float | None, number(min=0, help="Guidance scale. Default: as lbdt erase.")] = None,
    size: Annotated[
        list[str] | None,
        typer.Option("--size", metavar="WxH", help='May be asked for beside "auto"; may be repeated.'),
    ] = None,
    batch: Annotated[int, counted(most=256, help="Most pictures of one call of the pipeline.")] = 8,
    fill: Annotated[
        bool,
        typer.Option(
            help="Every call has as many rows as --batch, so that a seed has the same bits whoever else is served; "
            "--no-fill: as many as there are pictures, quicker where few come at a time."
        ),
    ] = True,
    threads: Annotated[int | None, counted(most=MOST_THREADS, help="CPU threads of each engine.")] = None,
    replicas: Annotated[
        int, counted(most=100_000, help="Engines, each on a GPU of its own if there are any.")
    ] = 1,
    max_queue: Annotated[
        int, counted(most=1_000_000, help="Pictures that wait; more are refused by 429.")
    ] = 256,
    max_n: Annotated[int, counted(most=10, help="Pictures of a request.")] = 4,
    max_prompt: Annotated[int, counted(most=100_000, help="Characters of a prompt.")] = 1000,
    timeout: Annotated[
        float, number(min=0.001, max=86_400, help="Seconds after which a request is answered by 504.")
    ] = 120.0,
    policy_interval: Annotated[
        float, number(min=0.01, max=3600, help="Seconds between looks at the policy's file.")
    ] = 2.0,
    tenant_header: Annotated[
        str | None,
        typer.Option(
            "--tenant-header",
            metavar="NAME",
            help="A header that names the tenant, where a gateway sets it. Default: API keys.",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, counted(most=65_535, help="Port to listen on.")] = 8000,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="ADDRESS",
            help='A Ray cluster, "auto": this machine\'s. Default: one is started.',
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Serve pictures to tenants, each without its own concepts: POST /v1/images/generations, as the OpenAI API has it.

    Ends on SIGTERM or Ctrl-C, when what was accepted is answered; on a second one at once.
    """
    from lbdt.runs.extras import needed

    needed("lbdt serve", "serve", "ray", "prometheus_client", "pydantic")
    from lbdt.canvas.defaults import eraser_of
    from lbdt.runs.processes import usable_device
    from lbdt.serving.policy import load_policy
    from lbdt.serving.server import LocalServer
    from lbdt.serving.settings import settings_of

    settings = settings_of(
        policy=policy.absolute(),
        audit=audit.absolute(),
        audit_key=None if audit_key is None else audit_key.absolute(),
        model=model,
        eraser=eraser,
        kind=kind.value,
        device=device,
        steps=steps,
        guidance=guidance,
        sizes=tuple(size or ()),
        batch=batch,
        fill=fill,
        threads=threads,
        replicas=replicas,
        max_queue=max_queue,
        max_n=max_n,
        max_prompt=max_prompt,
        timeout=timeout,
        tenant_header=tenant_header,
        policy_interval=policy_interval,
    )
    # What would be refused in a minute by a replica is refused here, in words.
    usable_device(device)
    loaded = load_policy(settings.policy, eraser_of(eraser, kind.value).concepts)
    if tenant_header is None and not loaded.has_keys:
        raise ValueError(
            f"{policy}: no tenant has an API key, so nobody could be served; give keys, or --tenant-header NAME behind "
            "a gateway"
        )
    if ray_address is None:
        _check_audit(settings)
    ended = threading.Event()
    say("lbdt: starting Ray Serve and loading the model ...")
    server = LocalServer(settings, host, port, ray_address)
    # After Ray, which has handlers of its own that end the process at once.
    _on_signals(ended)
    say(
        f"lbdt: {server.url}/v1/images/generations, {len(loaded.tenants)} tenants by policy {loaded.version!r}"
    )
    try:
        ended.wait()
        say("lbdt: finishing what was accepted; once more to end at once")
        server.stop()
    finally:
        server.kill(at_once=True)


def _check_audit(settings: ServeSettings) -> None:
    from lbdt.runs.writable import check_out_folder
    from lbdt.serving.audit import read_key

    if settings.audit_key is not None:
        read_key(settings.audit_key)
    check_out_folder(settings.audit, "--audit")


def _on_signals(ended: threading.Event) -> None:
    """Has the first SIGTERM or SIGINT set it, and the second one interrupt."""

    def handle(number: int, frame: object) -> None:
        if ended.is_set():
            raise KeyboardInterrupt
        ended.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, handle)

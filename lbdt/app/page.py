"""The page: its tabs, its looks, and how it is served."""

from __future__ import annotations

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from lbdt.app.compare_tab import CompareTab
from lbdt.app.erase_tab import EraseTab
from lbdt.app.inspect_tab import InspectTab
from lbdt.app.world import World

_CSS = """
.said { min-height: 1.5em; margin: 0; }
.picture img { image-rendering: pixelated; object-fit: contain; }
#status [role=alert] { color: var(--error-text-color, #b91c1c); font-weight: 600; }
.chart { width: 100%; max-width: 600px; height: auto; min-height: 200px; font-size: 11px; }
.chart { color: var(--body-text-color); }
.chart text { fill: currentColor; }
.chart .title { font-size: 13px; font-weight: 600; }
.chart .grid { stroke: currentColor; stroke-opacity: 0.2; }
.chart .drawn { stroke-width: 2; }
table.plain { border-collapse: collapse; width: 100%; }
table.plain caption { text-align: left; font-weight: 600; padding: 0.4em 0; }
table.plain th, table.plain td { text-align: left; padding: 0.3em 0.8em; border-bottom: 1px solid #8884; }
.scrolled { overflow: auto; max-height: 480px; }
button[role=tab].selected { color: var(--primary-700); }
.dark button[role=tab].selected { color: var(--primary-300); }
footer { display: none !important; }
"""
_THREADS = 24
"""Those that answer at once, while each that waits for the pipeline has one."""
# Gradio gives what stands for an empty picture a label and no role that may have one.
_ROLES = """() => {
  const empty = () => document.querySelectorAll('.empty[aria-label]:not([role])');
  const mend = () => empty().forEach(one => one.setAttribute('role', 'img'));
  new MutationObserver(mend).observe(document.body, {childList: true, subtree: true});
  mend();
}"""
_ABOUT = (
    "# lbdt: look, but don't touch\n"
    "A sparse autoencoder says where a concept is in the model's feature map; those patches are overwritten with "
    "patches of the same map. Nothing is retrained."
)


def page(world: World) -> gr.Blocks:
    """The page of a world; `launch` serves it."""
    with gr.Blocks(
        title="lbdt: see what the eraser sees", analytics_enabled=False, delete_cache=(600, 3600)
    ) as blocks:
        gr.Markdown(_ABOUT)
        with gr.Tabs():
            with gr.Tab("Erase", id="erase"):
                erase = EraseTab(world)
            with gr.Tab("Compare", id="compare"):
                CompareTab(world, erase.inputs())
            with gr.Tab("Inspect", id="inspect"):
                InspectTab(world)

        def left(request: gr.Request) -> None:
            world.leave(request.session_hash)

        blocks.unload(left)
    return blocks


def launch(
    world: World, host: str = "127.0.0.1", port: int | None = None, share: bool = False
) -> tuple[gr.Blocks, str]:
    """Serves the page in threads of its own; returns it and its address. `close()` of the page ends it.

    Nothing of the machine's files is served but what the page itself wrote for its visitors, and nothing is written but
    settings that they upload, into a folder that is emptied.

    Raises:
        OSError: the port is taken.
    """
    blocks = page(world)
    blocks.queue(max_size=2 * world.limits.waiting, api_open=False)
    app, local, shared = blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=world.limits.upload,
        state_session_capacity=64,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        max_threads=world.limits.waiting + _THREADS,
        css=_CSS,
        theme=_theme(),
        js=_ROLES,
    )
    return blocks, shared or local


def _theme() -> gr.themes.Base:
    """Gradio's own, with colours that stand out from their ground by 4.5 to 1 or more."""
    quiet = {"light": "*neutral_600", "dark": "*neutral_300"}
    named = (
        "block_info_text_color",
        "body_text_color_subdued",
        "input_placeholder_color",
        "block_title_text_color",
    )
    return gr.themes.Default(primary_hue="blue").set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        **{name: quiet["light"] for name in named},
        **{f"{name}_dark": quiet["dark"] for name in named},
    )

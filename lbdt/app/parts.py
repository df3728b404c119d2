"""What the tabs share."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr


def said(text: str, alert: bool = False) -> str:
    """A line that is read aloud when it changes; `alert`: at once."""
    return f'<p class="said" role="{"alert" if alert else "status"}">{html.escape(text) or "&nbsp;"}</p>'


def table(label: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls within the page, by the keyboard too."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    named = html.escape(label, quote=True)
    return (
        f'<div class="scrolled" tabindex="0" role="region" aria-label="{named}"><table class="plain">'
        f"<caption>{named}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def ended(go: Any, stop: Any) -> dict[Any, Any]:
    """What was begun by one button, and could be cancelled by the other, is over."""
    return {go: gr.Button(interactive=True), stop: gr.Button(interactive=False)}

"""What the tabs share."""

from __future__ import annotations

import html
import logging
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import gradio as gr

BUSY = "As many as may wait for the model do already. Come again in a minute."
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
"""What every handler is made with: it is the page's own, and a line of text says how far it is."""
_LOG = logging.getLogger("lbdt.app")


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


def followed(events: Generator[Any, None, None]) -> Iterator[Any]:
    """The same events, from an iterator whose closing ends `events` but does not wait for it.

    Gradio closes what a visitor left in the thread that answers all of them, and a step may take long.
    """
    try:
        for event in events:  # `yield from` would close them here  # noqa: UP028
            yield event
    except GeneratorExit:
        threading.Thread(target=events.close, name="lbdt left", daemon=True).start()
        raise


def failed(error: Exception) -> str:
    """What a visitor is told of an error while something was made. The log has all of it; an OSError's words name files
    of the machine, and stay there."""
    _LOG.error("a visitor's picture could not be made", exc_info=error)
    words = "a file could not be read or written" if isinstance(error, OSError) else error
    return f"It could not be made: {words}"


def ended(go: Any, stop: Any) -> dict[Any, Any]:
    """What was begun by one button, and could be cancelled by the other, is over."""
    return {go: gr.Button(interactive=True), stop: gr.Button(interactive=False)}

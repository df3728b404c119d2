"""Names of the places that activations come from, as files hold them: "HOOKPOINT:output" or "HOOKPOINT:update"."""

from __future__ import annotations

from typing import Any

from lbdt.runs.reading import brief

KINDS = ("output", "update")
_EXAMPLE = "unet.mid_block.attentions.0"


def check_place(hookpoint: Any, kind: Any) -> None:
    """TypeError, ValueError unless the hookpoint is a dotted name and the kind one of `KINDS`."""
    if not isinstance(hookpoint, str):
        raise TypeError(f"hookpoint: expected a name such as {_EXAMPLE!r}, got {brief(hookpoint)}")
    parts = hookpoint.split(".")
    if len(parts) < 2 or not all(part.isidentifier() or part.isdecimal() for part in parts):
        raise ValueError(f"hookpoint: expected a dotted name such as {_EXAMPLE!r}, got {brief(hookpoint)}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {brief(kind)}")


def site_name(hookpoint: str, update: bool) -> str:
    """The site of a block's update (output - input), or of its output."""
    return f"{hookpoint}:{KINDS[update]}"


def checked_site(site: Any) -> str | None:
    """`site`; TypeError, ValueError unless it is None (not known) or names a hookpoint and a kind."""
    if site is None:
        return None
    expected = f"site: expected None or a name such as '{site_name(_EXAMPLE, False)}'"
    if not isinstance(site, str):
        raise TypeError(f"{expected}, got {brief(site)}")
    hookpoint, _, kind = site.partition(":")
    try:
        check_place(hookpoint, kind)
    except ValueError as error:
        raise ValueError(f"{expected}, got {brief(site)} ({error})") from error
    return site


def may_be(known: str | None, site: str) -> bool:
    """Whether what is known of a site, None for nothing, leaves it open that it is `site`.

    transformers 5 has no "text_model" in CLIPTextModel: names of its layers with it and without it are the same.
    """
    return known is None or known.replace(".text_model.", ".") == site.replace(".text_model.", ".")

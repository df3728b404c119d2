"""Whether an editor's SAE and dictionary are those of the block that the SAE looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbdt.runs.site_names import may_be, site_name
from lbdt.sae.config import MOVED

if TYPE_CHECKING:
    from lbdt.editors.editor import Editor

_MADE = {"sae": "trained", "dictionary": "scored"}
_ADVICE = {
    "sae": MOVED,
    "dictionary": "to take this one all the same, dictionary.replaced(site=None) (in its folder: null for "
    '"site" in dictionary.json)',
}


def check_site(editor: Editor, part: str, site: str | None) -> None:
    """ValueError where a part, "sae" | "dictionary", is known to be of another site than the one that is looked at."""
    argument = "hookpoint" if getattr(editor, "detect_at", None) is None else "detect_at"
    looked_at = site_name(getattr(editor, argument), editor.sae.config.update)
    if not may_be(site, looked_at):
        raise ValueError(
            f"{part}: {_MADE[part]} at {site}, but the {editor.KIND} looks at {looked_at} ({argument}); use the "
            f"{part} of that block, or, {_ADVICE[part]}"
        )

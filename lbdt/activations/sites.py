"""Where activations are taken: a hookpoint, and whether its output or its update (output - input)."""

from __future__ import annotations

from dataclasses import dataclass

from lbdt.runs.site_names import check_place, site_name


@dataclass(frozen=True, order=True)
class Site:
    """A hookpoint such as "unet.up_blocks.1.attentions.1" and the kind, "output" | "update".

    Raises:
        TypeError, ValueError: a hookpoint that is no dotted name, an unknown kind.
    """

    hookpoint: str
    kind: str = "output"

    def __post_init__(self) -> None:
        check_place(self.hookpoint, self.kind)

    @classmethod
    def parse(cls, text: str) -> Site:
        """ "HOOKPOINT", "HOOKPOINT:output" or "HOOKPOINT:update"."""
        hookpoint, colon, kind = text.partition(":")
        return cls(hookpoint, kind if colon else "output")

    @property
    def update(self) -> bool:
        """Whether it is the block's output minus its input."""
        return self.kind == "update"

    def __str__(self) -> str:
        return site_name(self.hookpoint, self.update)

"""Where activations are taken: a hookpoint, and whether its output or its update (output - input)."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("output", "update")


@dataclass(frozen=True, order=True)
class Site:
    """A hookpoint such as "unet.up_blocks.1.attentions.1" and the kind, "output" | "update".

    Raises:
        TypeError, ValueError: a hookpoint that is no dotted name, an unknown kind.
    """

    hookpoint: str
    kind: str = "output"

    def __post_init__(self) -> None:
        if not isinstance(self.hookpoint, str):
            raise TypeError(
                f"hookpoint: expected a name such as 'unet.mid_block.attentions.0', got {self.hookpoint!r}"
            )
        parts = self.hookpoint.split(".")
        if len(parts) < 2 or not all(part.isidentifier() or part.isdecimal() for part in parts):
            raise ValueError(
                f"hookpoint: expected a dotted name such as 'unet.mid_block.attentions.0', got {self.hookpoint!r}"
            )
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {self.kind!r}")

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
        return f"{self.hookpoint}:{self.kind}"

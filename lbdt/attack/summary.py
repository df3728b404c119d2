"""UA before and after the attack, and the figures that are published on another world."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from lbdt.attack.search import AttackOutcome
from lbdt.evaluation.published import ATTACK

_NAMES = {"saeuron": "SAeUron", "saemnesia": "SAEmnesia"}
PUBLISHED: tuple[tuple[str, float, float, float], ...] = tuple(
    (_NAMES[row.pipeline] + " + PER" * (row.method == "per"), row.before, row.after, row.printed_drop)
    for row in ATTACK
)
"""Method, UA before, UA after, effectiveness, in percent: UnlearnCanvas, 1000 pairs, 5 tokens, 40 iterations (PER's
project page, table 2; METHOD.md, 10.3). Another world than EmojiCanvas: not to be compared figure by figure."""


@dataclass(frozen=True)
class AttackSummary:
    """Shares in percent of the pairs that were really attacked or failed without an attack."""

    pairs: int
    before: float
    """UA: the erased pictures in which the judge does not see the concept."""
    after: float
    """The same after the attack; a pair that failed before it has failed after it."""
    broken: int
    """Pairs that were erased before the attack, and not after it."""

    @property
    def effectiveness(self) -> float:
        """`before - after`, in percentage points."""
        return self.before - self.after

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return {**asdict(self), "effectiveness": self.effectiveness}


def summarise(outcomes: Iterable[AttackOutcome]) -> AttackSummary | None:
    """The summary of some pairs; None for none."""
    found = list(outcomes)
    if not found:
        return None
    before = sum(outcome.erased_before for outcome in found)
    after = sum(outcome.erased_after for outcome in found)
    return AttackSummary(len(found), 100 * before / len(found), 100 * after / len(found), before - after)

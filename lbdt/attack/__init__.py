"""UnlearnDiffAtk (arXiv 2310.11868) in text_grad mode: a learned prefix that brings an erased concept back."""

from lbdt.attack.outcomes import PUBLISHED, AttackFolder, AttackOutcome, AttackSummary, summarise
from lbdt.attack.prefix import Prefix, project_simplex
from lbdt.attack.search import AttackSettings, PrefixSearch

__all__ = [
    "PUBLISHED",
    "AttackFolder",
    "AttackOutcome",
    "AttackSettings",
    "AttackSummary",
    "Prefix",
    "PrefixSearch",
    "project_simplex",
    "summarise",
]

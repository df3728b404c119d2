"""UnlearnDiffAtk (arXiv 2310.11868) in text_grad mode: a learned prefix that brings an erased concept back."""

from lbdt.attack.attack_folder import AttackFolder
from lbdt.attack.prefix import Prefix, project_simplex
from lbdt.attack.search import AttackOutcome, AttackSettings, PrefixSearch
from lbdt.attack.summary import PUBLISHED, AttackSummary, summarise

__all__ = [
    "PUBLISHED",
    "AttackFolder",
    "AttackOutcome",
    "Prefix",
    "PrefixSearch",
    "AttackSettings",
    "AttackSummary",
    "project_simplex",
    "summarise",
]

"""UnlearnDiffAtk (arXiv 2310.11868) in text_grad mode: a learned prefix that brings an erased concept back."""

from lbdt.attack.attack_folder import Folder
from lbdt.attack.prefix import Prefix, project_simplex
from lbdt.attack.search import Outcome, Search, Settings
from lbdt.attack.summary import PUBLISHED, Summary, summarise

__all__ = [
    "PUBLISHED",
    "Folder",
    "Outcome",
    "Prefix",
    "Search",
    "Settings",
    "Summary",
    "project_simplex",
    "summarise",
]

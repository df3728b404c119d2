"""Ranges of what users give, on the command line, in files and on the page."""

from __future__ import annotations

MOST_STEPS = 10_000
MOST_PADDING = 65_535
MOST_PATCHES = 2**30
LARGEST = 1e6
"""The largest strength, scale or weight."""
MOST_SEED = 2**63 - 1
SEEDS = {"min": 0, "max": MOST_SEED}

"""Activations of a pipeline: where they are taken (sites), for which prompts, and as what they are handed on (sources).

A source hands out shards: the activations of a fixed slice of the prompts, a pure function of the settings and that
slice. Shards come from files (`lbdt.activations.stored`), straight from the pipeline (`lbdt.activations.generated`) or
from memory, and training and scoring do not see the difference.
"""

from lbdt.activations.prompts import Prompt, read_prompts
from lbdt.activations.sites import Site
from lbdt.activations.source import InMemory, Shard, Source

__all__ = ["InMemory", "Prompt", "Shard", "Site", "Source", "read_prompts"]

"""Hooks on diffusers UNets: where they go, how they come off, and what they do with a block's output.

Only `lbdt.hooks.blocks` and `lbdt.hooks.registry` import diffusers; the rest is plain PyTorch.
"""

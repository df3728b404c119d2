"""Concept erasure in diffusion models: look with an SAE, replace patch embeddings.

Importing this module is inert: every public name is loaded when it is first used.
"""

import importlib

__version__ = "0.1.0"

_ATTRIBUTES = {
    "SAEConfig": "lbdt.sae",
    "SparseAutoencoder": "lbdt.sae",
    "SparseCode": "lbdt.sae",
    "ConceptDictionary": "lbdt.dictionary",
    "ConceptEraser": "lbdt.editors",
    "Steering": "lbdt.editors",
    "TextSteering": "lbdt.editors",
    "UnprotectedError": "lbdt.editors",
    "attached": "lbdt.editors",
    "detach": "lbdt.editors",
}
_SUBMODULES = ("canvas", "ops")

__all__ = ["__version__", *_ATTRIBUTES, *_SUBMODULES]


def __getattr__(name: str):
    if name in _ATTRIBUTES:
        value = getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"lbdt.{name}")
    else:
        raise AttributeError(f"module 'lbdt' has no attribute {name!r}; public names: {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

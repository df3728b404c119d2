"""Policies of a service: which concepts are erased for which of its tenants (`pip install lbdt[serve]`).

Importing this module is inert: every public name is loaded when it is first used.
"""

import importlib

_ATTRIBUTES = {
    "EXAMPLE_POLICY": "lbdt.serving.policy",
    "Policy": "lbdt.serving.policy",
    "PolicyError": "lbdt.serving.policy",
    "PolicyWatcher": "lbdt.serving.policy_watch",
    "TenantRules": "lbdt.serving.policy",
    "UnknownTenantError": "lbdt.serving.policy",
    "load_policy": "lbdt.serving.policy",
}

__all__ = list(_ATTRIBUTES)


def __getattr__(name: str):
    if name not in _ATTRIBUTES:
        raise AttributeError(
            f"module 'lbdt.serving' has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    value = getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

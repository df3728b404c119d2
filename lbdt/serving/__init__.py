"""Pictures for many tenants, each without its own concepts: policies, a server, an audit (`pip install lbdt[serve]`).

Importing this module is inert: every public name is loaded when it is first used.
"""

import importlib

_ATTRIBUTES = {
    "AuditError": "lbdt.serving.audit",
    "AuditLog": "lbdt.serving.audit",
    "EXAMPLE_POLICY": "lbdt.serving.policy",
    "PictureEngine": "lbdt.serving.engine",
    "PictureRecord": "lbdt.serving.audit_lines",
    "Policy": "lbdt.serving.policy",
    "PolicyError": "lbdt.serving.policy",
    "PolicyWatcher": "lbdt.serving.policy_watch",
    "ServeSettings": "lbdt.serving.settings",
    "TenantRules": "lbdt.serving.policy",
    "UnknownTenantError": "lbdt.serving.policy",
    "Work": "lbdt.serving.engine",
    "build": "lbdt.serving.deployment",
    "load_policy": "lbdt.serving.policy",
    "verify": "lbdt.serving.audit_check",
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

"""Putting diffusers hooks on modules and taking them off without a trace.

diffusers' own `HookRegistry.remove_hook` leaves `forward` in the instance's dict, disables a hook with a
`new_forward` that was registered later on the module, and undoes whatever wrapped `forward` after it
(METHOD.md, 9).
"""

from __future__ import annotations

from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn


def is_registered(module: nn.Module, name: str) -> bool:
    """Whether a hook of this name is on the module."""
    registry = vars(module).get("_diffusers_hook")
    return registry is not None and name in registry.hooks


def register(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Puts `hook` (pre_forward and post_forward only) on `module`; ValueError where the name is taken."""
    created = "_diffusers_hook" not in vars(module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if created:
        registry.lbdt_created = True
    try:
        registry.register_hook(hook, name)
    finally:
        _drop_empty(module)
    hook.lbdt_forward = vars(module)["forward"]


def unregister(module: nn.Module, name: str) -> None:
    """Takes the hook off; other hooks and wrappers of the module stay in force, in any order of removal."""
    if not is_registered(module, name):
        return
    registry = vars(module)["_diffusers_hook"]
    index = registry._hook_order.index(name)
    reference = registry._fn_refs[index]
    hook = registry.hooks.pop(name)
    registry._hook_order.pop(index)
    registry._fn_refs.pop(index)
    inner = reference.forward
    if index < len(registry._fn_refs):
        later = registry._fn_refs[index]
        if later.original_forward is not None:
            later.original_forward = inner
        else:
            later.forward = inner
    elif vars(module).get("forward") is hook.lbdt_forward:
        if getattr(inner, "__func__", None) is type(module).forward:
            del module.forward
        else:
            module.forward = inner
    else:
        # Something else wrapped or replaced forward since: our link of the chain stays, doing nothing.
        reference.pre_forward = _same_arguments
        reference.post_forward = _same_output
    hook.fn_ref = None
    hook.lbdt_forward = None
    _drop_empty(module)


def _drop_empty(module: nn.Module) -> None:
    registry = vars(module).get("_diffusers_hook")
    if registry is not None and not registry.hooks and getattr(registry, "lbdt_created", False):
        del module._diffusers_hook


def _same_arguments(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    return args, kwargs


def _same_output(module: nn.Module, output: Any) -> Any:
    return output

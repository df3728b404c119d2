"""Putting diffusers hooks on modules and taking them off without a trace.

diffusers' own `HookRegistry.remove_hook` leaves `forward` in the instance's dict, disables a hook with a
`new_forward` that was registered later on the module, and undoes whatever wrapped `forward` after it
(METHOD.md, 9).
"""

from __future__ import annotations

import copy
import threading
from typing import Any, NamedTuple

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn


class Parked(NamedTuple):
    """A hook that was taken off, with the very objects that it stood in: code that was compiled with them is used again
    where they are put back."""

    module: nn.Module
    name: str
    hook: ModelHook
    registry: HookRegistry
    reference: Any
    forward: Any


_LOCK = threading.RLock()
_COPIERS = ("__deepcopy__", "__reduce_ex__")


def is_registered(module: nn.Module, name: str) -> bool:
    """Whether a hook of this name is on the module."""
    registry = vars(module).get("_diffusers_hook")
    return registry is not None and name in registry.hooks


def register(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Puts `hook` (pre_forward and post_forward only) on `module`; ValueError where the name is taken.

    Copies that are made of the module meanwhile (`copy.deepcopy`, `pickle`, `torch.save`) are of the module without the
    hook, as a wrapped `forward` would take the copy's calls back to the original.
    """
    with _LOCK:
        created = "_diffusers_hook" not in vars(module)
        registry = HookRegistry.check_if_exists_or_initialize(module)
        if created:
            registry.lbdt_created = True
        try:
            registry.register_hook(hook, name)
        finally:
            _drop_empty(module)
        hook.lbdt_forward = vars(module)["forward"]
        _copied_without_hooks(module)


def restore(parked: Parked) -> bool:
    """Puts a hook back as it was; False, and nothing done, where the module has other hooks or another forward now."""
    with _LOCK:
        module, name, hook, registry, reference, forward = parked
        if {"forward", "_diffusers_hook"} & set(vars(module)) or registry.hooks:
            return False
        registry.hooks[name] = hook
        registry._hook_order.append(name)
        registry._fn_refs.append(reference)
        hook.fn_ref, hook.lbdt_forward = reference, forward
        module._diffusers_hook, module.forward = registry, forward
        _copied_without_hooks(module)
        return True


def _copied_without_hooks(module: nn.Module) -> None:
    if not any(copier in vars(module) for copier in _COPIERS):
        for copier in _COPIERS:
            vars(module)[copier] = _Copier(module, copier)


def is_live(module: nn.Module, name: str) -> bool | None:
    """Whether the module's `forward` runs the hook; None: it cannot be told, as something else wraps or replaced it."""
    if not is_registered(module, name):
        return False
    registry = vars(module)["_diffusers_hook"]
    last = registry.hooks[registry._hook_order[-1]]
    outer = getattr(last, "lbdt_forward", None)
    present = vars(module).get("forward")
    if present is not None and present is outer:
        return True
    if present is None or getattr(present, "__func__", None) is type(module).forward:
        return False
    return None


def unregister(module: nn.Module, name: str) -> Parked | None:
    """Takes the hook off; other hooks and wrappers of the module stay in force, in any order of removal.

    Returns what `restore` takes, where the hook was alone; else None.
    """
    with _LOCK:
        return _unregister(module, name) if is_registered(module, name) else None


def _unregister(module: nn.Module, name: str) -> Parked | None:
    registry, forward = vars(module)["_diffusers_hook"], vars(module).get("forward")
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
    del hook.lbdt_forward
    if not _ours(registry):
        for copier in _COPIERS:
            if isinstance(vars(module).get(copier), _Copier):
                del vars(module)[copier]
    _drop_empty(module)
    alone = not {"forward", "_diffusers_hook"} & set(vars(module)) and not registry.hooks
    return Parked(module, name, hook, registry, reference, forward) if alone else None


class _Copier:
    """`__deepcopy__` or `__reduce_ex__` of a module with hooks of lbdt."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, argument: Any) -> Any:
        plain = _without_hooks(self.module)
        if self.name == "__reduce_ex__":
            return plain.__reduce_ex__(argument)
        made = copy.deepcopy(plain, argument)
        argument[id(self.module)] = made
        # Copies are remembered by the address of what they are of, which must stay taken.
        argument.setdefault(id(argument), []).append(plain)
        return made


def _ours(registry: HookRegistry) -> list[ModelHook]:
    return [hook for hook in registry.hooks.values() if hasattr(hook, "lbdt_forward")]


def _without_hooks(module: nn.Module) -> nn.Module:
    """A shallow copy of `module` as it was before lbdt's hooks.

    Raises TypeError where others' hooks stand among them, or wrap `forward`: those would run the original.
    """
    registry = vars(module)["_diffusers_hook"]
    last = registry.hooks[registry._hook_order[-1]]
    mixed = len(_ours(registry)) != len(registry.hooks)
    if mixed or vars(module).get("forward") is not last.lbdt_forward:
        raise TypeError(
            f"{type(module).__name__}: an attached editor's hooks on it are mixed with those of others, so it cannot "
            "be copied or saved as it is; call lbdt.detach(pipe) first"
        )
    plain = type(module).__new__(type(module))
    plain.__dict__.update(vars(module))
    for name in ("forward", "_diffusers_hook", *_COPIERS):
        plain.__dict__.pop(name, None)
    inner = registry._fn_refs[0].forward
    if getattr(inner, "__func__", None) is not type(module).forward:
        plain.__dict__["forward"] = inner
    return plain


def _drop_empty(module: nn.Module) -> None:
    registry = vars(module).get("_diffusers_hook")
    if registry is not None and not registry.hooks and getattr(registry, "lbdt_created", False):
        del module._diffusers_hook


def _same_arguments(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    return args, kwargs


def _same_output(module: nn.Module, output: Any) -> Any:
    return output

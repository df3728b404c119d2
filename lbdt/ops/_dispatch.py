"""The library behind `torch.ops.lbdt.*`: a schema is defined once, in its op's file, and the backend that serves a call
is chosen from its arguments, with a reason against every other one."""

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

BACKENDS = ("triton", "cpp", "reference")  # in the order in which "auto" tries them

# Held for the life of the process: an unreferenced Library takes its ops away.
_LIBRARY = torch.library.Library("lbdt", "FRAGMENT")
_LOG = logging.getLogger("lbdt")
_NOT_IMPLEMENTED = "not implemented for this op in this version"
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("lbdt_backend", default=None)
_registry: dict[str, dict[str, "Backend"]] = {}
_logged: set[tuple[str, str, str]] = set()


class Backend(NamedTuple):
    """One implementation of an op. Both functions take the op's arguments without `backend`."""

    supports: Callable[..., str | None]  # why it cannot serve these arguments; None if it can
    run: Callable[..., Any]
    declines: Callable[..., str | None]  # why "auto" passes over it though it could; None if it does not


class Choice(NamedTuple):
    """What `explain` answers: the backend that serves the call, and why the others do not."""

    op: str
    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        others = "".join(f"\n  not {name}: {reason}" for name, reason in self.reasons.items())
        return f"{self.op}: {self.backend}{others}"


def define(schema: str) -> None:
    """Defines a public op.

    An empty `backend` means use_backend's, then LBDT_BACKEND's, then "auto"; it is resolved when the op runs.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def define_internal(schema: str, fake: Callable[..., Any] = lambda *args: None) -> None:
    """Defines an op that the C++ library alone implements: it writes into its arguments and returns nothing, or what
    `fake` says."""
    define(schema)
    torch.library.register_fake(f"lbdt::{schema.partition('(')[0]}", fake, lib=_LIBRARY)


def implement(op: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Makes `run` the public op on every device, and `fake` its shapes and dtypes under tracing."""
    _LIBRARY.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lbdt::{op}", fake, lib=_LIBRARY)


def always(*args: Any, **kwargs: Any) -> None:
    """No reason against any arguments."""


def register(
    op: str,
    backend: str,
    supports: Callable[..., str | None],
    run: Callable[..., Any],
    declines: Callable[..., str | None] = always,
) -> None:
    """Makes `run` the implementation of `op` by `backend`; a second one for the same pair is a KeyError."""
    implementations = _registry.setdefault(op, {})
    if backend in implementations:
        raise KeyError(f"op {op!r} already has a backend {backend!r}")
    implementations[backend] = Backend(supports, run, declines)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces `name` ("auto", "reference", "cpp" or "triton") for the ops called in the block, in this thread.

    The keyword `backend=` of an op goes before it; the environment variable LBDT_BACKEND, which is read once, at the
    first call of an op, comes after it.
    Raises ValueError for an unknown name.
    """
    token = _forced.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def explain(op: str, *args: Any, backend: str | None = None, **kwargs: Any) -> Choice:
    """The backend that would serve `op` (a name in `lbdt.ops`) with these arguments, and why no other one would.

    Runs nothing but each backend's own check. Raises ValueError for an unknown op or backend, or where a
    backend is forced that cannot serve the call.
    """
    if op not in _registry:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(sorted(_registry))}")
    return _choose(op, backend or "", args, kwargs)


def call(op: str, backend: str, *args: Any) -> Any:
    """Runs `op` on the chosen backend."""
    if _LOG.isEnabledFor(logging.DEBUG):
        _log_once(_choose(op, backend, args, {}))
    name = chosen(op, *args, backend=backend) or _choose(op, backend, args, {}).backend
    return _registry[op][name].run(*args)


def chosen(op: str, *args: Any, backend: str = "") -> str | None:
    """The backend that serves `op` with these arguments, as many of them as its backends look at; None where the one
    that is forced cannot."""
    wanted = _requested(backend)
    for name in BACKENDS if wanted == "auto" else (wanted,):
        known = _registry[op].get(name)
        if known is None or known.supports(*args) is not None:
            continue
        if wanted != "auto" or known.declines(*args) is None:
            return name
    return None


def _log_once(choice: Choice) -> None:
    for name, reason in choice.reasons.items():
        key = (choice.op, name, reason)
        if key not in _logged:
            _logged.add(key)
            _LOG.debug("%s: %s not used: %s", choice.op, name, reason)


def _choose(op: str, backend: str, args: tuple, kwargs: dict[str, Any]) -> Choice:
    wanted = _requested(backend)
    reasons: dict[str, str] = {}
    chosen = None
    for name in BACKENDS:
        implementation = _registry[op].get(name)
        reason = _NOT_IMPLEMENTED if implementation is None else implementation.supports(*args, **kwargs)
        declined = None
        if reason is None and wanted == "auto":
            declined = implementation.declines(*args, **kwargs)
        if reason is not None:
            reasons[name] = reason
        elif declined is not None:
            reasons[name] = f"usable, but {declined}"
        elif chosen is None and wanted in ("auto", name):
            chosen = name
        else:
            first = chosen or wanted
            reasons[name] = f"usable, but {first} {'comes first' if wanted == 'auto' else 'was asked for'}"
    if chosen is None:
        raise ValueError(
            f"lbdt.ops.{op}: backend {wanted!r} cannot serve this call: {reasons[wanted]}; "
            f"use 'auto' or one of: {', '.join(n for n in BACKENDS if reasons[n].startswith('usable'))}"
        )
    return Choice(op, chosen, reasons)


def _requested(backend: str) -> str:
    if backend:
        return _known(backend, "backend")
    forced = _forced.get()
    if forced is not None:
        return forced
    return of_the_environment()


@functools.cache
def of_the_environment() -> str:
    """LBDT_BACKEND or "auto"; read at the first call of an op, as every read takes its time."""
    return _known(os.environ.get("LBDT_BACKEND") or "auto", "LBDT_BACKEND")


def _known(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            f"{where}: unknown backend {name!r}; expected 'auto' or one of {', '.join(BACKENDS)}"
        )
    return name

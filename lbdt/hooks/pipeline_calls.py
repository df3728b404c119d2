"""Calls of pipelines that something watches: which one runs in this thread, with which arguments, and which call of a
text encoder is for the prompts and which for the negative ones."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from lbdt.hooks.row_layouts import CallSize, branches, call_size

_ATTRIBUTE = "_lbdt_watch"
_LOCK = threading.RLock()
_CLASSES: dict[type, type] = {}


class _Running(threading.local):
    def __init__(self) -> None:
        self.calls: list[PipelineCall] = []


_RUNNING = _Running()


class PipelineCall:
    """A call of a watched pipeline, from before it does anything until it is left."""

    def __init__(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        self.pipe, self.arguments = pipe, arguments
        self.size: CallSize | None = call_size(pipe, arguments)
        self.seen: dict[Any, Any] = {}
        """What watchers keep of this call, by watcher: a call may run within another one of the same pipeline."""
        self.kept: dict[Any, Any] = {}
        """What hooks keep from one denoiser call of this call to the next, by whose it is."""

    def branches(self, count: int, running: bool = True) -> tuple[str, ...] | None:
        """The guidance branches of a denoiser call that has `count` of them, in the order of its rows; None: unknown.

        `running`: whether the pipeline is in this call, so that its attributes tell of it.
        """
        return branches(self.pipe, count, self.arguments, running)


class Watcher(Protocol):
    """What is told of a pipeline's calls."""

    name: str

    def turn(self) -> Any:
        """A lock that the call has to hold, or None."""

    def begin(self, call: PipelineCall) -> None:
        """The call begins; an error raised here ends it before anything is generated."""

    def leave(self, outer: PipelineCall | None) -> None:
        """The call is over, whatever became of it; `outer` runs in this thread again. Raises nothing."""

    def judge(self, call: PipelineCall) -> None:
        """The call has made its pictures; an error raised here takes their place."""


def running() -> PipelineCall | None:
    """The innermost call of a watched pipeline that runs in this thread."""
    return _RUNNING.calls[-1] if _RUNNING.calls else None


def watch(pipe: Any, watcher: Watcher) -> Callable[[], None]:
    """Tells `watcher` of the pipeline's calls; returns its undo.

    While there is one, the instance is of a subclass of its class, of the same name, whose `__call__` tells of itself:
    the one place that every diffusers pipeline enters and leaves, by an exception too. What is no diffusers pipeline is
    left alone. Within a call of the pipeline, the watcher is told of that call from here on.
    """
    undo = _join(pipe, "watchers", watcher)
    try:
        for call in _RUNNING.calls:
            if call.pipe is pipe:
                watcher.begin(call)
    except BaseException:
        undo()
        raise
    return undo


def watch_texts(
    pipe: Any, begin: Callable[[int | None, list[str]], None], end: Callable[[], None]
) -> Callable[[], None]:
    """Calls `begin(prompts, roles)` when the pipeline's `encode_prompt` begins and `end()` when it is left, by an
    exception too; returns its undo.

    `roles` are the calls of each text encoder to come, in order: "cond" for the prompts unless their embeddings were
    given, then "uncond" for the negative ones, under guidance and unless theirs were given. All diffusers pipelines
    encode in this order. `prompts` None: unknown.
    """
    return _join(pipe, "scopes", (begin, end))


def watchers(pipe: Any) -> tuple[Watcher, ...]:
    """What watches the calls of a pipeline, oldest first."""
    found = vars(pipe).get(_ATTRIBUTE) if hasattr(pipe, "__dict__") else None
    return () if found is None else tuple(found.watchers)


@contextlib.contextmanager
def between_calls(pipe: Any) -> Iterator[None]:
    """Waits until no other thread is within a call of the pipeline: what is put on, taken off or exchanged here is so
    for whole calls. The thread that is within one itself may go on."""
    with _LOCK:
        found = _watch_of(pipe)
    _acquire(found.lock, type(pipe).__name__, "used")
    try:
        yield
    finally:
        with _LOCK:
            found.update()
        found.lock.release()


def _acquire(lock: Any, name: str, what: str) -> None:
    # A thread that is within one pipeline's call and waits for another one's could wait for ever.
    if not lock.acquire(blocking=not _RUNNING.calls):
        raise RuntimeError(
            f"{name}: {what} within a pipeline's call, while another thread is within a call of it or of its compiled "
            "denoiser; do it after the outer call, or from one thread only"
        )


def _watch_of(pipe: Any) -> _Watch:
    found = vars(pipe).get(_ATTRIBUTE)
    if found is None:
        found = vars(pipe)[_ATTRIBUTE] = _Watch(pipe)
    return found


def _join(pipe: Any, group: str, member: Any) -> Callable[[], None]:
    with _LOCK:
        found = _watch_of(pipe)
        members = getattr(found, group)

    def undo() -> None:
        with _LOCK:
            if member in members:
                members.remove(member)
            found.update()

    with _LOCK:
        members.append(member)
        try:
            found.update()
        except BaseException:
            undo()
            raise
    return undo


class _Watch:
    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.watchers: list[Watcher] = []
        self.scopes: list[tuple[Callable[[int | None, list[str]], None], Callable[[], None]]] = []
        self.lock = threading.RLock()
        self._base: type | None = None
        self._wrapper: Any = None
        self._before: Any = None

    def __deepcopy__(self, memo: dict) -> None:
        # A copy of the pipeline that copies its attributes itself is watched by nobody.
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()

    def update(self) -> None:
        """Puts on the pipeline what its members need, and takes off what none needs any more."""
        if self.watchers and self._base is None and _is_diffusers(self.pipe):
            base = _plain(type(self.pipe))
            object.__setattr__(self.pipe, "__class__", _announcing(base))
            self._base = base
        if not self.watchers and self._base is not None:
            if type(self.pipe) is _announcing(self._base):
                object.__setattr__(self.pipe, "__class__", self._base)
            self._base = None
        if self.scopes and self._wrapper is None:
            self._before = vars(self.pipe).get("encode_prompt")
            self._wrapper = vars(self.pipe)["encode_prompt"] = self._encoded(self.pipe.encode_prompt)
        if not self.scopes and self._wrapper is not None:
            self.without(vars(self.pipe))
            self._wrapper = self._before = None
        if not (self.watchers or self.scopes) and vars(self.pipe).get(_ATTRIBUTE) is self:
            del vars(self.pipe)[_ATTRIBUTE]

    def without(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """The instance's `attributes` without what stands among them for its members; changes and returns them."""
        if self._wrapper is not None and attributes.get("encode_prompt") is self._wrapper:
            del attributes["encode_prompt"]
            if self._before is not None:
                attributes["encode_prompt"] = self._before
        return attributes

    def call(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The pipeline's call by `function`, with its watchers told."""
        with contextlib.ExitStack() as stack:
            turns = [watcher.turn() for watcher in self.watchers]
            for lock in dict.fromkeys([self.lock, *(turn for turn in turns if turn is not None)]):
                _acquire(lock, type(self.pipe).__name__, "called")
                stack.callback(lock.release)
            call = PipelineCall(self.pipe, _bound(function, self.pipe, args, kwargs))
            _RUNNING.calls.append(call)
            try:
                for watcher in tuple(self.watchers):
                    watcher.begin(call)
                result = function(self.pipe, *args, **kwargs)
            finally:
                _RUNNING.calls.remove(call)
                outer = running()
                for watcher in {*self.watchers, *call.seen}:
                    watcher.leave(outer)
            errors = []
            for watcher in tuple(self.watchers):
                try:
                    watcher.judge(call)
                except Exception as error:
                    errors.append(error)
            if errors:
                raise errors[0]
            return result

    def _encoded(self, original: Callable) -> Callable:
        signature = inspect.signature(original)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            try:
                given = signature.bind(*args, **kwargs)
            except TypeError:
                return original(*args, **kwargs)
            given.apply_defaults()
            prompts = _count(given.arguments.get("prompt"), given.arguments.get("prompt_embeds"))
            scopes = list(self.scopes)
            try:
                for begin, _ in scopes:
                    begin(prompts, _roles(given.arguments))
                return original(*args, **kwargs)
            finally:
                for _, end in scopes:
                    end()

        return encode_prompt


def _plain(kind: type) -> type:
    """The class of a pipeline as it is without watchers."""
    return next(c for c in kind.__mro__ if vars(c).get("_lbdt_announces") is not True)


def _announcing(base: type) -> type:
    """The subclass of a pipeline's class whose calls tell of themselves; one for each class."""
    if base in _CLASSES:
        return _CLASSES[base]

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = vars(self).get(_ATTRIBUTE)
        if found is None or not found.watchers:
            return base.__call__(self, *args, **kwargs)
        return found.call(base.__call__, args, kwargs)

    @functools.wraps(base.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        # Another pipeline, made by the class of one that is watched.
        object.__setattr__(self, "__class__", base)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Copies of every kind are of the pipeline as it was before, and share or copy its modules.
        plain = object.__new__(base)
        for name in (n for c in base.__mro__ for n in _slots(c)):
            if hasattr(self, name):
                object.__setattr__(plain, name, getattr(self, name))
        attributes = dict(vars(self))
        found = attributes.pop(_ATTRIBUTE, None)
        vars(plain).update(attributes if found is None else found.without(attributes))
        made = base.__reduce_ex__(plain, protocol)
        if made[0] is copyreg.__newobj__ and len(made[1]) == 1:
            # pickle takes this one for objects of their own class only.
            made = (copyreg._reconstructor, (base, object, None), *made[2:])
        return made

    names = {
        "__call__": __call__,
        "__init__": __init__,
        "__reduce_ex__": __reduce_ex__,
        "_lbdt_announces": True,
    }
    kept = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    made = _CLASSES[base] = type(base)(base.__name__, (base,), names | kept)
    return made


def _slots(kind: type) -> tuple[str, ...]:
    given = vars(kind).get("__slots__", ())
    names = (given,) if isinstance(given, str) else tuple(given)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _is_diffusers(pipe: Any) -> bool:
    return any(
        c.__name__ == "DiffusionPipeline" and c.__module__.startswith("diffusers.")
        for c in type(pipe).__mro__
    )


def _bound(function: Callable, pipe: Any, args: tuple, kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call by name, with defaults; what does not fit is left to the call's own error."""
    try:
        given = inspect.signature(function).bind(pipe, *args, **kwargs)
    except TypeError:
        return dict(kwargs)
    given.apply_defaults()
    return given.arguments


def _roles(arguments: Mapping[str, Any]) -> list[str]:
    roles = ["cond"] if arguments.get("prompt_embeds") is None else []
    guided = arguments.get("do_classifier_free_guidance", False)
    if guided and arguments.get("negative_prompt_embeds") is None:
        roles.append("uncond")
    return roles


def _count(prompt: Any, embeddings: Any) -> int | None:
    if isinstance(prompt, str):
        return 1
    if prompt is not None:
        return len(prompt)
    return None if embeddings is None else int(embeddings.shape[0])

"""How many prompts and images a pipeline call has, which the UNet's own arguments do not tell."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_ATTRIBUTE = "_lbdt_watch"


def watch(pipe: Any, listener: Callable[[int, int, bool], None]) -> Callable[[], None]:
    """Calls `listener(prompts, images, in_call)` whenever the pipeline encodes its prompts; returns its undo.

    While there is a listener, the instance carries wrappers of `check_inputs` and `encode_prompt`; the last undo
    removes them. `in_call` is False where a user calls `encode_prompt` directly. Pipelines without these methods
    are left alone.
    """
    found = vars(pipe).get(_ATTRIBUTE)
    if found is None:
        found = vars(pipe)[_ATTRIBUTE] = _Watch(pipe)
    found.listeners.append(listener)

    def undo() -> None:
        if listener in found.listeners:
            found.listeners.remove(listener)
        if not found.listeners and vars(pipe).get(_ATTRIBUTE) is found:
            found.restore()
            del vars(pipe)[_ATTRIBUTE]

    return undo


class _Watch:
    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.listeners: list[Callable[[int, int, bool], None]] = []
        self.in_call = False
        self._before: dict[str, Any] = {}
        self._wrappers: dict[str, Any] = {}
        for name, wrap in (("check_inputs", self._checked), ("encode_prompt", self._encoded)):
            original = getattr(pipe, name, None)
            if callable(original):
                if name in vars(pipe):
                    self._before[name] = original
                self._wrappers[name] = vars(pipe)[name] = wrap(original)

    def restore(self) -> None:
        for name, wrapper in self._wrappers.items():
            if vars(self.pipe).get(name) is wrapper:
                del vars(self.pipe)[name]
                if name in self._before:
                    vars(self.pipe)[name] = self._before[name]

    def _checked(self, original: Callable) -> Callable:
        def check_inputs(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.in_call = True
            return result

        return check_inputs

    def _encoded(self, original: Callable) -> Callable:
        signature = inspect.signature(original)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            in_call, self.in_call = self.in_call, False
            try:
                given = signature.bind(*args, **kwargs)
            except TypeError:
                return original(*args, **kwargs)
            given.apply_defaults()
            prompts = _count(given.arguments.get("prompt"), given.arguments.get("prompt_embeds"))
            if prompts is not None:
                images = prompts * int(given.arguments.get("num_images_per_prompt") or 1)
                for listener in list(self.listeners):
                    listener(prompts, images, in_call)
            return original(*args, **kwargs)

        return encode_prompt


def _count(prompt: Any, embeddings: Any) -> int | None:
    if isinstance(prompt, str):
        return 1
    if prompt is not None:
        return len(prompt)
    return None if embeddings is None else int(embeddings.shape[0])

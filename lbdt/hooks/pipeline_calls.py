"""What a pipeline call encodes: how many prompts and images, which the UNet's own arguments do not tell, and which
call of the text encoder is for the prompts and which for the negative ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

_ATTRIBUTE = "_lbdt_watch"


def watch(pipe: Any, listener: Callable[[int, int, bool], None]) -> Callable[[], None]:
    """Calls `listener(prompts, images, in_call)` whenever the pipeline encodes its prompts; returns its undo.

    While there is a listener, the instance carries wrappers of `check_inputs`, `encode_prompt` and
    `maybe_free_model_hooks`; the last undo removes them. `in_call` is False where a user calls `encode_prompt`
    directly. Pipelines without these methods are left alone.
    """
    return _join(pipe, "listeners", listener)


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


def watch_end(pipe: Any, listener: Callable[[], None]) -> Callable[[], None]:
    """Calls `listener()` when a call of the pipeline has made its images; returns its undo.

    All diffusers pipelines end by `maybe_free_model_hooks`; those without are left alone.
    """
    return _join(pipe, "ends", listener)


def _join(pipe: Any, group: str, member: Any) -> Callable[[], None]:
    found = vars(pipe).get(_ATTRIBUTE)
    if found is None:
        found = vars(pipe)[_ATTRIBUTE] = _Watch(pipe)
    members = getattr(found, group)
    members.append(member)

    def undo() -> None:
        if member in members:
            members.remove(member)
        watched = found.listeners or found.scopes or found.ends
        if not watched and vars(pipe).get(_ATTRIBUTE) is found:
            found.restore()
            del vars(pipe)[_ATTRIBUTE]

    return undo


class _Watch:
    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.listeners: list[Callable[[int, int, bool], None]] = []
        self.scopes: list[tuple[Callable[[int | None, list[str]], None], Callable[[], None]]] = []
        self.ends: list[Callable[[], None]] = []
        self.in_call = False
        self._before: dict[str, Any] = {}
        self._wrappers: dict[str, Any] = {}
        for name, wrap in (
            ("check_inputs", self._checked),
            ("encode_prompt", self._encoded),
            ("maybe_free_model_hooks", self._ended),
        ):
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

    def _ended(self, original: Callable) -> Callable:
        def maybe_free_model_hooks(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            for listener in list(self.ends):
                listener()
            return result

        return maybe_free_model_hooks

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
            scopes = list(self.scopes)
            try:
                for begin, _ in scopes:
                    begin(prompts, _roles(given.arguments))
                return original(*args, **kwargs)
            finally:
                for _, end in scopes:
                    end()

        return encode_prompt


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

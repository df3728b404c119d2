"""Everything that one picture follows from, as a file that `lbdt erase --settings FILE` repeats bit for bit."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbdt import __version__
from lbdt.canvas import KINDS
from lbdt.donors import AVOIDED, SOURCES, AvoidedPatches
from lbdt.runs.digests import sha256
from lbdt.runs.limits import LARGEST, MOST_PADDING, MOST_PATCHES, MOST_SEED, MOST_STEPS
from lbdt.runs.reading import brief, listed, parse_json, read_bytes
from lbdt.runs.wording import nearest, require_unicode

if TYPE_CHECKING:
    from lbdt.editors import ConceptEraser, Steering
    from lbdt.sae import SparseAutoencoder

SCHEMA = 1
"""The number of the file's format."""
MOST_PROMPT = 10_000
MOST_NAME = 4_096
"""Characters of a concept's name, or of a folder's or repository's."""
MOST_CONCEPTS = 1_000
MOST_BYTES = 1 << 22
"""The size of a settings file."""
_DIGEST = frozenset("0123456789abcdef")
_GIVE = "give a file that `lbdt erase --save-settings` or `lbdt app` wrote"


class RemovalMethod(enum.StrEnum):
    """What removes the concept."""

    per = "per"
    steering = "steering"


_SETS = {
    RemovalMethod.per: ("padding", "source", "avoid", "min_patches"),
    RemovalMethod.steering: ("strength",),
}
"""What each method takes of the fields."""


@dataclasses.dataclass(frozen=True)
class PictureSettings:
    """A prompt, what is erased from its picture, and how. None: the default of the eraser, the kind or the pipeline,
    until `resolved` has said which that is.

    Raises:
        TypeError, ValueError: a field, what it was given and what was expected.
    """

    prompt: str
    concepts: tuple[str, ...]
    """One name or more, each once."""
    model: str | None = None
    """The folder or repository of a diffusers pipeline; None: EmojiCanvas."""
    eraser: str | None = None
    """The folder or repository of an eraser; None: EmojiCanvas's of `kind`."""
    kind: str = "saeuron"
    """A name of `lbdt.canvas.KINDS`, whose sampling is the default on EmojiCanvas."""
    method: str = "per"
    strength: float | Mapping[str, float] | None = None
    """Method "steering": one for all, or one for each of the concepts."""
    padding: int | None = None
    source: str | None = None
    avoid: str | None = None
    min_patches: int | None = None
    """Method "per"; None in resolved settings: as the eraser was calibrated."""
    steps: int | None = None
    guidance: float | None = None
    """None in resolved settings: a pipeline that takes none, or says none itself."""
    seed: int = 0
    version: str = __version__
    """The lbdt that the settings are of."""
    digest: str | None = None
    """What tells the eraser from others, see `digest_of`; None: not resolved."""

    def __post_init__(self) -> None:
        _text("prompt", self.prompt, MOST_PROMPT)
        object.__setattr__(self, "concepts", _names(self.concepts))
        for name in ("model", "eraser"):
            value = getattr(self, name)
            if value is not None:
                _text(name, value, MOST_NAME, least=1)
        if self.model is not None and self.eraser is None:
            raise ValueError("eraser: an eraser belongs to a pipeline; name one beside the model, got null")
        _choice("kind", self.kind, tuple(KINDS))
        _choice("method", self.method, tuple(RemovalMethod))
        for method, names in _SETS.items():
            for name in names:
                if method != self.method and getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: is of method {method.value!r}, and the method is {self.method!r}; leave it at null"
                    )
        if self.strength is not None:
            object.__setattr__(self, "strength", _strength(self.strength, self.concepts))
        for name, low, high in (
            ("padding", 0, MOST_PADDING),
            ("min_patches", 1, MOST_PATCHES),
            ("steps", 1, MOST_STEPS),
        ):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), low, high)
        _whole("seed", self.seed, 0, MOST_SEED)
        if self.source is not None:
            _choice("source", self.source, tuple(SOURCES))
        if self.avoid is not None:
            _choice("avoid", self.avoid, tuple(AVOIDED))
        if self.guidance is not None:
            object.__setattr__(self, "guidance", _number("guidance", self.guidance, 0.0, LARGEST))
        _text("version", self.version, MOST_NAME, least=1)
        if self.digest is not None:
            _text("digest", self.digest, 64)
            if len(self.digest) != 64 or not _DIGEST.issuperset(self.digest):
                raise ValueError(f"digest: expected 64 hexadecimal digits, got {brief(self.digest)}")

    def resolved(self, editor: ConceptEraser | Steering, pipe: Any = None) -> PictureSettings:
        """The same with every default made explicit, so that a later change of defaults changes nothing. Of settings
        that are resolved already it is only asked whether they are this eraser's.

        Args:
            editor: what the settings are carried out with, as loaded: `load_editor`. It is left as it is.
            pipe: the diffusers pipeline, which is asked for its own guidance scale where none is given.

        Raises:
            TypeError: an editor of the other method.
            ValueError: settings of another eraser; an unknown concept, or one without a strength.
        """
        kind = {RemovalMethod.per: "eraser", RemovalMethod.steering: "steering"}[RemovalMethod(self.method)]
        if editor.KIND != kind:
            raise TypeError(
                f"editor: method {self.method!r} takes an editor of kind {kind}, got {type(editor).__name__}"
            )
        for name in self.concepts:
            editor.select(name)
        from lbdt.canvas.defaults import steps_and_guidance

        digest = digest_of(editor)
        if self.digest is not None:
            if digest != self.digest:
                raise ValueError(
                    f"digest: these settings are of another eraser ({self.digest[:12]}... there, {digest[:12]}... "
                    f"here), so the picture could not be repeated; give the {kind} that they were saved with, or "
                    "start from new settings"
                )
            return self
        found: dict[str, Any] = {"digest": digest, "version": __version__}
        for name in _SETS[RemovalMethod(self.method)]:
            value = getattr(self, name)
            found[name] = getattr(editor, name) if value is None else value
        if isinstance(found.get("strength"), Mapping):
            found["strength"] = {n: found["strength"][n] for n in self.concepts if n in found["strength"]}
        found["steps"], guidance = steps_and_guidance(self.model, self.kind, self.steps, self.guidance)
        found["guidance"] = _own_guidance(pipe) if guidance is None and self.model is not None else guidance
        return dataclasses.replace(self, **found)

    def applied(self, editor: ConceptEraser | Steering) -> ConceptEraser | Steering:
        """An editor like `editor` with these settings, which have to be resolved; `editor` is left as it is."""
        if self.digest is None:
            raise ValueError("settings: expected resolved ones; call resolved(editor) first")
        changed = {name: getattr(self, name) for name in _SETS[RemovalMethod(self.method)]}
        return type(editor)(editor.sae, editor.dictionary, **(editor.settings | changed))

    def call(self) -> dict[str, Any]:
        """The arguments of the pipeline's call beside the prompt and the generator."""
        guidance = {} if self.guidance is None else {"guidance_scale": self.guidance}
        return {"num_inference_steps": self.steps} | guidance

    def to_json(self) -> str:
        """The settings as text that `from_json` reads."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["concepts"] = list(self.concepts)
        values = {
            "schema": SCHEMA,
            "version": fields.pop("version"),
            "digest": fields.pop("digest"),
            **fields,
        }
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, place: str = "settings") -> PictureSettings:
        """The settings in JSON text.

        Raises:
            ValueError: beginning with `place`: no JSON, another schema, a field that is missing or unknown, or one of
                a wrong type or out of its range.
        """
        values = parse_json(text, place, f"; {_GIVE}")
        if not isinstance(values, dict):
            raise ValueError(f"{place}: expected a JSON object, got {type(values).__name__}; {_GIVE}")
        if type(values.get("schema")) is not int or values["schema"] != SCHEMA:
            raise ValueError(
                f"{place}: expected schema {SCHEMA}, got {brief(values.get('schema'))}; {_GIVE}, or use the lbdt that "
                "wrote it"
            )
        del values["schema"]
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = nearest(name, known)
                hint = f"; did you mean {near!r}?" if near else f"; fields are {', '.join(known)}"
                raise ValueError(f"{place}: unknown field {brief(name)}{hint}")
        missing = [name for name in known if name not in values]
        if missing:
            raise ValueError(f"{place}: missing {listed(missing)}; expected every field, null for a default")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from error


def read_settings(path: Path) -> PictureSettings:
    """The settings in a file; ValueError naming it, as `PictureSettings.from_json`."""
    return PictureSettings.from_json(read_bytes(path, MOST_BYTES, "a file of settings"), str(path))


def load_editor(settings: PictureSettings) -> ConceptEraser | Steering:
    """The eraser, or for method "steering" the baseline of the same folder, that the settings name.

    Raises:
        ValueError, OSError: none there; a steering without a strength of its own where the settings have none either.
    """
    from lbdt.canvas.defaults import eraser_of, steering_of

    if settings.method == RemovalMethod.per:
        return eraser_of(settings.eraser, settings.kind)
    return steering_of(settings.eraser, settings.kind, settings.strength)


def digest_of(editor: ConceptEraser | Steering) -> str:
    """SHA-256 of all of an editor that `PictureSettings` do not say: its SAE, dictionary, selection, bank, the gate's
    calibration, and where it stands."""
    said = {} if editor.KIND == "steering" else {"min_patches": None, "avoid": AvoidedPatches.erased.value}
    plain = type(editor)(editor.sae, editor.dictionary, **(editor.settings | said))
    return sha256(f"{plain.digest()}\n{_kind_of(editor.sae)}")


def digest_of_sae(sae: SparseAutoencoder) -> str:
    """SHA-256 of an SAE: its weights, and how it makes latents of them."""
    from lbdt.activations.pipelines import digest_of_module

    return sha256(f"{digest_of_module(sae)}\n{_kind_of(sae)}")


def _kind_of(sae: SparseAutoencoder) -> str:
    """What an SAE's weights do not say of it."""
    config = sae.config
    return f"{config.activation}, k {config.k}, threshold {config.threshold}, update {config.update}"


def _own_guidance(pipe: Any) -> float | None:
    """What a pipeline takes as its guidance scale where it is given none; None where it does not say."""
    if pipe is None:
        return None
    found = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    value = None if found is None else found.default
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"concepts: expected a list of names, got {brief(value)}")
    if not 1 <= len(value) <= MOST_CONCEPTS:
        raise ValueError(f"concepts: expected 1 to {MOST_CONCEPTS} names, got {len(value)}")
    for name in value:
        _text("concepts", name, MOST_NAME, least=1)
    if len(set(value)) < len(value):
        twice = next(name for name in value if value.count(name) > 1)
        raise ValueError(f"concepts: expected every name once, got {brief(twice)} again")
    return tuple(value)


def _strength(value: Any, concepts: tuple[str, ...]) -> float | dict[str, float]:
    if not isinstance(value, Mapping):
        return _number("strength", value, -LARGEST, LARGEST)
    if set(value) != set(concepts):
        raise ValueError(
            f"strength: expected a number, or one for each of {listed(concepts)}; got one for {listed(value) or 'none'}"
        )
    return {name: _number(f"strength of {name}", value[name], -LARGEST, LARGEST) for name in concepts}


def _text(name: str, value: Any, most: int, least: int = 0) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected text, got {brief(value)}")
    if not least <= len(value) <= most:
        raise ValueError(f"{name}: expected {least} to {most} characters, got {len(value)}")
    require_unicode(name, value)


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(allowed)}; got {brief(value)}")
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {brief(value)}")


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {brief(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a whole number from {low} to {high}, got {brief(value)}")


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {brief(value)}")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name}: expected a finite number from {low:g} to {high:g}, got {brief(value)}")
    return float(value)

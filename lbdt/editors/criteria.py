"""An editor's `selection`: keywords of `ConceptDictionary.select`, for all concepts or for single ones."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lbdt.dictionary.selection import check_criteria
from lbdt.runs.reading import brief, listed

if TYPE_CHECKING:
    from lbdt.dictionary import ConceptDictionary

_CRITERIA = tuple(inspect.signature(check_criteria).parameters)


def own_copy(selection: Mapping[str, Any] | None) -> dict[str, Any]:
    """The selection as dictionaries of its own; TypeError unless it is None or a mapping."""
    given = _mapping({} if selection is None else selection)
    return {name: dict(own) if isinstance(own, Mapping) else own for name, own in given.items()}


def criteria_of(selection: Mapping[str, Any], concept: str) -> dict[str, Any]:
    """The keywords of `ConceptDictionary.select` for a concept: those under its name, else those of no concept."""
    own = selection.get(concept)
    return dict(own) if isinstance(own, Mapping) else _for_all(selection)


def check_selection(selection: Mapping[str, Any], dictionary: ConceptDictionary) -> None:
    """ValueError where a key is neither a keyword of `ConceptDictionary.select` nor, with a mapping of these, a
    concept, or a value none of the keyword's."""
    for name, own in _mapping(selection).items():
        if not isinstance(own, Mapping):
            continue
        try:
            dictionary.index(name)
            _check(own)
        except ValueError as error:
            raise ValueError(f"selection: {name!r}: {error}") from error
    _check(_for_all(selection))


def _mapping(selection: Any) -> Mapping[str, Any]:
    if not isinstance(selection, Mapping):
        raise TypeError(f"selection: expected criteria such as {{'top_k': 2}}, got {brief(selection)}")
    return selection


def _for_all(selection: Mapping[str, Any]) -> dict[str, Any]:
    # No criterion is a mapping, whatever a concept is called.
    return {name: value for name, value in selection.items() if not isinstance(value, Mapping)}


def _check(criteria: Mapping[str, Any]) -> None:
    unknown = sorted(set(map(str, criteria)) - set(_CRITERIA))
    if unknown:
        raise ValueError(f"selection: unknown key {listed(unknown)}; expected some of {', '.join(_CRITERIA)}")
    check_criteria(**criteria)

"""The meaning of a policy file: names that must be known, lists that contradict each other, keys of two tenants.

Everything here is looked for in the file's tables as they were read, whatever else is wrong with them: what has the
wrong type is `lbdt.serving.policy_file`'s to say, and passed over.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lbdt.runs.reading import brief
from lbdt.serving.policy_file import FORMAT, REFUSE, meant, place

MOST_NAME = 100
"""Characters of a version's, a tenant's and a group's name."""
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_OF_NOTHING = {hashlib.sha256(data).digest() for data in (b"", b"\n", b"\r\n")}
"""What a shell makes of a variable that is not set."""


def meaning_faults(
    tables: Mapping[str, Any], known: Sequence[str], digest: str, versions: Mapping[str, str]
) -> Iterator[str]:
    """What is wrong with a file whose bytes have this `digest`, a line for each fault.

    `known`: the names of the eraser's concepts; `versions`: the digests of versions that have been in force.
    """
    known = dict.fromkeys(known)  # in their order, and quick to look up
    yield from _head(tables, digest, versions)
    groups, tenants = _table(tables, "groups"), _table(tables, "tenants")
    for name in groups:
        yield from _name(place("groups", name), name)
        where = place("groups", name)
        yield from _repeated(where, _texts(groups, name))
        for concept in _texts(groups, name):
            if concept not in known:
                flat = concept.lstrip("@") in groups
                why = "; a group names concepts, not other groups" if flat else meant(concept, known)
                yield f"{where}: unknown concept {brief(concept)}; expected {_one_of(known)}{why}"
    owners: dict[bytes, str] = {}
    for name, section in tenants.items():
        yield from _name(place("tenants", name), name)
        if name == REFUSE:
            yield f'{place("tenants", name)}: "{REFUSE}" is what unknown_tenant may be; name the tenant otherwise'
        if isinstance(section, dict):
            yield from _tenant(place("tenants", name), section, groups, known)
            yield from _keys(name, section.get("keys"), owners)
    unknown = _table(tables, "defaults").get("unknown_tenant", REFUSE)
    if isinstance(unknown, str) and unknown != REFUSE and unknown not in tenants:
        yield (
            f'defaults.unknown_tenant: unknown tenant {brief(unknown)}; expected "{REFUSE}" or a tenant of this '
            f"file{meant(unknown, tenants)}"
        )


def resolved(
    concepts: Iterable[str], named: Iterable[Iterable[str]], allow: Sequence[str], known: Iterable[str]
) -> tuple[str, ...]:
    """The concepts and those of the groups, but for the allowed ones, in the order of `known`."""
    wanted = {*concepts, *(concept for group in named for concept in group)} - {*allow}
    return tuple(concept for concept in known if concept in wanted)


def key_digest(text: str) -> bytes:
    """The bytes of "sha256:<64 hex digits>", which has been checked."""
    return bytes.fromhex(text.partition(":")[2])


def _head(tables: Mapping[str, Any], digest: str, versions: Mapping[str, str]) -> Iterator[str]:
    found, version = tables.get("schema"), tables.get("version")
    if isinstance(found, int) and not isinstance(found, bool) and found != FORMAT:
        yield f"schema: expected {FORMAT}, the format that is read here, got {brief(found)}"
    if not isinstance(version, str):
        return
    yield from _name("version", version)
    if versions.get(version, digest) != digest:
        yield (
            f"version: {brief(version)} has been in force with another content (SHA-256 {versions[version][:12]}..., "
            f"this file {digest[:12]}...); a version names one content: give this one a version of its own"
        )


def _name(where: str, name: str) -> Iterator[str]:
    faults = {
        "it is empty": not name,
        "spaces at an end": name != name.strip(),
        "control characters": not name.isprintable(),
        f"{len(name)} characters": len(name) > MOST_NAME,
    }
    if found := [what for what, so in faults.items() if so]:
        yield (
            f"{where}: expected a name of 1 to {MOST_NAME} printable characters without spaces at its ends, got "
            f"{brief(name)} ({', '.join(found)})"
        )


def _tenant(
    where: str, section: Mapping[str, Any], groups: Mapping[str, Any], known: Mapping[str, None]
) -> Iterator[str]:
    concepts, named, allow = (_texts(section, field) for field in ("concepts", "groups", "allow"))
    for field, names in (("concepts", concepts), ("groups", named), ("allow", allow)):
        yield from _repeated(f"{where}.{field}", names)
    for concept in concepts:
        if concept not in known:
            why = "; it is a group: name it in `groups`" if concept in groups else meant(concept, known)
            yield f"{where}.concepts: unknown concept {brief(concept)}; expected {_one_of(known)}{why}"
    for group in named:
        if group not in groups:
            expected = f"expected a group of this file{meant(group, groups)}"
            yield f"{where}.groups: unknown group {brief(group)}; {expected}"
    members = {concept for group in named for concept in _texts(groups, group)}
    whole = all(_sound(groups.get(group)) for group in named) and _sound(section.get("groups", []))
    for concept in allow:
        if concept in concepts:
            yield (
                f"{where}.allow: {brief(concept)} is in `concepts` as well; expected a concept that only a group "
                "names: take it out of one of the two"
            )
        elif whole and concept not in members:
            yield (
                f"{where}.allow: {brief(concept)} would do nothing; expected a concept that a group of this tenant "
                f"names{meant(concept, members)}"
            )
    if "concepts" in section:
        return
    if not section.get("groups"):
        got = "neither" if "groups" not in section else "groups = []"
        yield (
            f"{where}: expected `concepts` or `groups`, got {got}; for a tenant for whom nothing is erased, write "
            "concepts = []"
        )
    elif whole and members <= known.keys() and members <= {*allow}:
        yield (
            f"{where}: expected at least one concept, got groups of which `allow` leaves none; for a tenant for whom "
            "nothing is erased, write concepts = []"
        )


def _keys(tenant: str, keys: Any, owners: dict[bytes, str]) -> Iterator[str]:
    """Faults of a tenant's keys; notes whose they are. No text that is no digest is shown: it may be the key."""
    where = f"{place('tenants', tenant)}.keys"
    for number, text in enumerate(keys if isinstance(keys, list) else ()):
        if not isinstance(text, str):
            continue
        if not _DIGEST.fullmatch(text):
            yield (
                f"{where}[{number}]: expected sha256: and 64 hexadecimal digits, got {len(text)} other characters (not "
                "shown: it may be a key); write the SHA-256 of the key, never the key"
            )
            continue
        digest = key_digest(text)
        if digest in _OF_NOTHING:
            yield f"{where}[{number}]: expected the digest of a key, got that of an empty text"
        elif digest in owners:
            whose = "this tenant" if owners[digest] == tenant else f"{place('tenants', owners[digest])}, too"
            expected = "expected a key of one tenant, once"
            yield f"{where}[{number}]: {text[:19]}... is a key of {whose}; {expected}"
        owners.setdefault(digest, tenant)


def _repeated(where: str, names: Sequence[str]) -> Iterator[str]:
    for name, count in Counter(names).items():
        if count > 1:
            yield f"{where}: expected each name once, got {brief(name)} {count} times"


def _one_of(known: Mapping[str, None]) -> str:
    return f"one of the eraser's {len(known)} concepts"


def _sound(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _table(tables: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = tables.get(name)
    return found if isinstance(found, dict) else {}


def _texts(table: Mapping[str, Any], name: str) -> list[str]:
    found = table.get(name)
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []

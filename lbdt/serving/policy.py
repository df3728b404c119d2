"""`Policy`: which concepts are erased for which tenant, and whose an API key is; read from a TOML file.

`example-policy.toml` beside this file shows every field.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lbdt.runs.reading import brief, listed, read_bytes
from lbdt.runs.wording import printable
from lbdt.serving.policy_checks import key_digest, meaning_faults, resolved
from lbdt.serving.policy_file import REFUSE, PolicyFile, checked_shape, parse_toml

if TYPE_CHECKING:
    from lbdt.serving.policy_file import OnFailure

EXAMPLE_POLICY = Path(__file__).with_name("example-policy.toml")
"""A policy for EmojiCanvas's concepts, with comments."""
MOST_BYTES = 4 << 20
_MOST_FAULTS = 1000


class PolicyError(ValueError):
    """A policy file that is refused as a whole, with all that is wrong with it.

    Attributes:
        path: the file.
        faults: one line for each fault: where, what was given, what was expected.
    """

    def __init__(self, path: Path, faults: Sequence[str]) -> None:
        self.path, self.faults = path, tuple(faults)
        file, lines = printable(str(path)), self.faults
        if len(lines) > 1:
            lines = (f"refused, {len(lines)} faults", *(f"  {fault}" for fault in lines))
        super().__init__(f"{file}: " + "\n".join(lines))

    def __reduce__(self):
        return type(self), (self.path, self.faults)


class UnknownTenantError(LookupError):
    """A tenant that the policy in force does not name, and whom it refuses.

    Attributes:
        tenant: the name that was given.
    """

    def __init__(self, tenant: str, policy_version: str) -> None:
        self.tenant, self.policy_version = tenant, policy_version
        super().__init__(
            f"unknown tenant {brief(tenant)}; expected one of version {policy_version} of the policy, which refuses "
            "others"
        )

    def __reduce__(self):
        return type(self), (self.tenant, self.policy_version)


@dataclass(frozen=True)
class TenantRules:
    """What holds for one tenant."""

    tenant: str
    """The name that was asked for."""
    concepts: tuple[str, ...]
    """What is erased, in the order of the eraser's concepts; empty: nothing."""
    on_failure: OnFailure
    """What becomes of a picture that could not be protected."""
    policy_version: str
    policy_digest: str
    rules_of: str
    """The tenant of the file whose rules these are: another one for a tenant that the file does not name."""


@dataclass(frozen=True, eq=False)
class Policy:
    """A policy as it was read; nothing of it changes. Made by `load_policy`."""

    version: str
    """The operator's name of it."""
    digest: str
    """SHA-256 of the file's bytes, hexadecimal."""
    unknown_tenant: str | None
    """The tenant whose rules are those of unknown ones; None: they are refused."""
    _rules: Mapping[str, TenantRules] = field(repr=False)
    _keys: tuple[tuple[bytes, str], ...] = field(repr=False)
    """The digests of API keys with their tenants."""

    @property
    def tenants(self) -> tuple[str, ...]:
        """The tenants' names, in the order of the file."""
        return tuple(self._rules)

    @property
    def has_keys(self) -> bool:
        """Whether any tenant has an API key."""
        return bool(self._keys)

    def resolve(self, tenant: str) -> TenantRules:
        """The rules of a tenant; those of `unknown_tenant` for one that the file does not name.

        Raises:
            UnknownTenantError: unknown ones are refused.
            TypeError: not a text.
        """
        if not isinstance(tenant, str):
            raise TypeError(f"tenant: expected its name, got {brief(tenant)}")
        if (rules := self._rules.get(tenant)) is not None:
            return rules
        if self.unknown_tenant is None:
            raise UnknownTenantError(tenant, self.version)
        return replace(self._rules[self.unknown_tenant], tenant=tenant)

    def tenant_of_key(self, key: str) -> str | None:
        """The tenant who has this API key; None: nobody has it.

        The key's digest is compared with all digests of the policy, each in constant time, so that how long it takes
        says nothing about them: 8 ms for 30,000 keys on one core of two that others used, too.

        Raises:
            TypeError: not a text.
        """
        if not isinstance(key, str):
            raise TypeError(f"key: expected text, got {type(key).__name__}")  # never the key itself
        given, found = sha256(key.encode("utf-8", "surrogatepass")).digest(), None
        for digest, tenant in self._keys:
            if hmac.compare_digest(digest, given):
                found = tenant
        return found

    def concept_sets(self) -> tuple[tuple[str, ...], ...]:
        """The distinct `concepts` of all tenants, in the order of the file: what a server may be asked to erase."""
        return tuple(dict.fromkeys(rules.concepts for rules in self._rules.values()))


def load_policy(path: str | Path, known: Sequence[str]) -> Policy:
    """The policy of a TOML file, for an eraser with the concepts `known` (`eraser.concepts`), in any order.

    Raises:
        PolicyError: no such file, not a regular one, of more than 4 MiB, no UTF-8, no TOML, or not a policy of these
            concepts; the file is refused as a whole, with all its faults (at most 1000).
        TypeError, ValueError: `known` is a text, or has a name twice.
    """
    path, names = Path(path), checked_known(known)
    return policy_of(path, read_policy(path), names)


def checked_known(known: Sequence[str]) -> tuple[str, ...]:
    """The names of an eraser's concepts. TypeError: a text, or not of texts; ValueError: a name comes twice."""
    names = () if isinstance(known, str) else tuple(known)
    if isinstance(known, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"known: expected the names of the eraser's concepts, got {brief(known)}")
    if len({*names}) < len(names):
        raise ValueError(f"known: expected distinct names, got {listed(names)}")
    return names


def read_policy(path: Path) -> bytes:
    """The file's bytes; PolicyError: none there, not a regular file, not readable, more than 4 MiB."""
    try:
        return read_bytes(path, MOST_BYTES, "a policy, a TOML file")
    except ValueError as error:
        raise PolicyError(path, [str(error).removeprefix(f"{path}: ")]) from error


def policy_of(
    path: Path, data: bytes, known: tuple[str, ...], versions: Mapping[str, str] | None = None
) -> Policy:
    """The policy in `data`, which was read from `path`; PolicyError as `load_policy`, and for a version whose digest
    in `versions` is another one."""
    digest = sha256(data).hexdigest()
    try:
        tables = parse_toml(data)
    except ValueError as error:
        raise PolicyError(path, [str(error)]) from error
    file, faults = checked_shape(tables)
    faults = [*faults, *islice(meaning_faults(tables, known, digest, versions or {}), _MOST_FAULTS + 1)]
    if faults:
        more = len(faults) > _MOST_FAULTS
        raise PolicyError(path, [*faults[:_MOST_FAULTS], "... and more"] if more else faults)
    return _policy(file, digest, known)


def _policy(file: PolicyFile, digest: str, known: tuple[str, ...]) -> Policy:
    rules, keys = {}, []
    for name, section in file.tenants.items():
        named = [file.groups[group] for group in section.groups]
        rules[name] = TenantRules(
            tenant=name,
            concepts=resolved(section.concepts or (), named, section.allow, known),
            on_failure=section.on_failure or file.defaults.on_failure,
            policy_version=file.version,
            policy_digest=digest,
            rules_of=name,
        )
        keys += [(key_digest(key), name) for key in section.keys]
    unknown = file.defaults.unknown_tenant
    return Policy(file.version, digest, None if unknown == REFUSE else unknown, rules, tuple(keys))

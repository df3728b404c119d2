"""How every fault of a policy file is refused, and what is said of it."""

from __future__ import annotations

import os
import pickle
import re

import pytest

from lbdt.serving import PolicyError, load_policy
from tests.serving.policies import ACME, HEAD, KNOWN, key, load, write

TWICE = key("twice")
NOTHING = key("")

FAULTS = {  # what follows HEAD, and what is said
    "no-tenants": ("", [r"tenants: missing; expected a section \[tenants.NAME\]"]),
    "unknown-field": (
        "[tenant.acme]\n" + ACME,
        [
            "tenant: unknown field; expected one of schema, version, groups, defaults, tenants; did you mean tenants"
        ],
    ),
    "unknown-default": (
        '[defaults]\nfailure = "x"\n' + ACME,
        ["defaults.failure: unknown field; .*on_failure"],
    ),
    "unknown-in-tenant": (
        '[tenants.acme]\nconcept = ["Cats"]\nconcepts = []\n',
        ["tenants.acme.concept: unknown field; expected one of concepts, .*; did you mean concepts"],
    ),
    "concepts-are-a-text": (
        '[tenants.acme]\nconcepts = "Cats"\n',
        [r"tenants.acme.concepts: expected a list of texts, as in \[\"A\", \"B\"\], got 'Cats'"],
    ),
    "a-concept-is-a-number": (
        "[tenants.acme]\nconcepts = [7]\n",
        [r"tenants.acme.concepts\[0\]: expected text in quotes, got 7"],
    ),
    "tenant-is-a-number": ("[tenants]\nacme = 1\n", ["tenants.acme: expected a table, got 1"]),
    "tenants-are-a-list": ("tenants = []\n", ["tenants: expected a table, got list"]),
    "group-is-a-text": ('[groups]\na = "Cats"\n' + ACME, ["groups.a: expected a list of texts.*got 'Cats'"]),
    "on-failure": (
        ACME + 'on_failure = "open"\n',
        ['tenants.acme.on_failure: expected "refuse" or "unprotected", got \'open\''],
    ),
    "default-on-failure": (
        "[defaults]\non_failure = true\n" + ACME,
        ['defaults.on_failure: expected "refuse" or "unprotected", got true'],
    ),
    "unknown-concept": (
        '[tenants.acme]\nconcepts = ["Cat"]\n',
        [
            "tenants.acme.concepts: unknown concept 'Cat'; expected one of the eraser's 20 .*; did you mean 'Cats'"
        ],
    ),
    "another-case": (
        '[tenants.acme]\nconcepts = ["TREES"]\n',
        ["unknown concept 'TREES'.*did you mean 'Trees'"],
    ),
    "nothing-near": (
        '[tenants.acme]\nconcepts = ["zzz"]\n',
        ["unknown concept 'zzz'; .* 20 concepts: Architectures, Bears, .* and 8 more"],
    ),
    "empty-concept": ('[tenants.acme]\nconcepts = [""]\n', ["tenants.acme.concepts: unknown concept ''"]),
    "unknown-in-group": (
        '[groups]\na = ["Frog"]\n' + ACME,
        ["groups.a: unknown concept 'Frog'.*did you mean 'Frogs'"],
    ),
    "group-in-group": (
        '[groups]\na = ["Cats"]\nb = ["@a", "a"]\n' + ACME,
        [
            "groups.b: unknown concept '@a'; .*names concepts, not other groups",
            "groups.b: unknown concept 'a'; ",
        ],
    ),
    "group-among-concepts": (
        '[groups]\npets = ["Cats"]\n[tenants.a]\nconcepts = ["pets"]\n',
        ["tenants.a.concepts: unknown concept 'pets'; .*it is a group: name it in `groups`"],
    ),
    "unknown-group": (
        '[groups]\npets = ["Cats"]\n[tenants.a]\ngroups = ["pet"]\n',
        ["tenants.a.groups: unknown group 'pet'; expected a group of this file; did you mean 'pets'"],
    ),
    "no-groups-at-all": (
        '[tenants.a]\ngroups = ["pet"]\n',
        ["tenants.a.groups: unknown group 'pet'; expected a group of this file: there are none"],
    ),
    "allow-does-nothing": (
        '[groups]\na = ["Cats"]\n[tenants.t]\ngroups = ["a"]\nallow = ["Dogs"]\n',
        [
            "tenants.t.allow: 'Dogs' would do nothing; expected a concept that a group of this tenant names: Cats"
        ],
    ),
    "allow-without-groups": (
        ACME + 'allow = ["Dogs"]\n',
        ["tenants.acme.allow: 'Dogs' would do nothing; .*: there are none"],
    ),
    "allow-against-concepts": (
        '[groups]\na = ["Cats"]\n[tenants.t]\ngroups = ["a"]\nconcepts = ["Cats"]\nallow = ["Cats"]\n',
        ["tenants.t.allow: 'Cats' is in `concepts` as well; .*take it out of one of the two"],
    ),
    "twice-in-concepts": (
        '[tenants.t]\nconcepts = ["Cats", "Sea", "Cats"]\n',
        ["tenants.t.concepts: expected each name once, got 'Cats' 2 times"],
    ),
    "twice-in-a-group": (
        '[groups]\na = ["Cats", "Cats", "Cats"]\n' + ACME,
        ["groups.a: expected each name once, got 'Cats' 3 times"],
    ),
    "twice-in-groups": (
        '[groups]\na = ["Cats"]\n[tenants.t]\ngroups = ["a", "a"]\n',
        ["tenants.t.groups: expected each name once, got 'a' 2 times"],
    ),
    "twice-in-allow": (
        '[groups]\na = ["Cats", "Sea"]\n[tenants.t]\ngroups = ["a"]\nallow = ["Cats", "Cats"]\n',
        ["tenants.t.allow: expected each name once, got 'Cats' 2 times"],
    ),
    "a-forgotten-line": (
        "[tenants.t]\n",
        [r"tenants.t: expected `concepts` or `groups`, got neither; .*, write concepts = \[\]"],
    ),
    "no-groups-named": (
        "[tenants.t]\ngroups = []\n",
        [r"tenants.t: expected `concepts` or `groups`, got groups = \[\]; .*write concepts = \[\]"],
    ),
    "an-empty-group": (
        '[groups]\na = []\n[tenants.t]\ngroups = ["a"]\n',
        [
            r"tenants.t: expected at least one concept, got groups of which `allow` leaves none; .*concepts = \[\]"
        ],
    ),
    "all-allowed": (
        '[groups]\na = ["Cats"]\n[tenants.t]\ngroups = ["a"]\nallow = ["Cats"]\n',
        ["tenants.t: expected at least one concept, got groups of which `allow` leaves none"],
    ),
    "unknown-default-tenant": (
        '[defaults]\nunknown_tenant = "acm"\n' + ACME,
        ["defaults.unknown_tenant: unknown tenant 'acm'; expected \"refuse\" or a .*; did you mean 'acme'"],
    ),
    "default-tenant-is-a-number": (
        "[defaults]\nunknown_tenant = 1\n" + ACME,
        ["defaults.unknown_tenant: expected text in quotes, got 1"],
    ),
    "empty-tenant": (
        '[tenants.""]\nconcepts = []\n',
        [r"tenants.'': expected a name of 1 to 100 printable .*\(it is empty\)"],
    ),
    "tenant-with-a-line-break": (
        '[tenants."a\\nb"]\nconcepts = []\n',
        [r"tenants.'a\\nb': expected a name .*\(control characters\)"],
    ),
    "tenant-too-long": (
        f"[tenants.{'x' * 101}]\nconcepts = []\n",
        ["tenants.'xxx.*: expected a name .*(101 characters)"],
    ),
    "tenant-with-a-space-at-its-end": (
        '[tenants."acme "]\nconcepts = []\n',
        [r"tenants.'acme ': .*\(spaces at an end\)"],
    ),
    "tenant-called-refuse": (
        "[tenants.refuse]\nconcepts = []\n",
        ["tenants.refuse: .*name the tenant otherwise"],
    ),
    "group-with-a-tab": ('[groups]\n"a\\tb" = []\n' + ACME, [r"groups.'a\\tb': expected a name"]),
    "key-itself": (
        ACME + 'keys = ["acme-secret"]\n',
        [
            r"acme.keys\[0\]: expected sha256: and 64 hex.*got 11 other .*the SHA-256 of the key, never the key"
        ],
    ),
    "short-digest": (ACME + f'keys = ["{TWICE[:-1]}"]\n', [r"acme.keys\[0\]: expected sha256: and 64"]),
    "digest-without-its-kind": (
        ACME + f'keys = ["{TWICE[7:]}"]\n',
        [r"acme.keys\[0\]: expected sha256: and 64"],
    ),
    "digest-and-a-line-break": (
        ACME + f'keys = ["{TWICE}\\n"]\n',
        [r"acme.keys\[0\]: expected sha256: and 64"],
    ),
    "keys-are-a-text": (
        ACME + 'keys = "acme-secret"\n',
        [r"tenants.acme.keys: expected a list of digests, .*\(str, not shown: it may be a key\)"],
    ),
    "a-key-is-a-number": (
        ACME + f'keys = [7, "acme-secret", "{TWICE}"]\n',
        [r"tenants.acme.keys\[0\]: expected a list of digests.*\(int, not", r"keys\[1\]: expected sha256:"],
    ),
    "key-field": (ACME + 'key = "acme-secret"\n', ["tenants.acme.key: unknown field; .*did you mean keys"]),
    "key-of-nothing": (
        ACME + f'keys = ["{NOTHING}", "{key(chr(10))}"]\n',
        [
            r"keys\[0\]: expected the digest of a key, got that of an empty text",
            r"keys\[1\]: expected the digest",
        ],
    ),
    "key-of-two-tenants": (
        ACME + f'keys = ["{TWICE}"]\n[tenants.b]\nconcepts = []\nkeys = ["sha256:{TWICE[7:].upper()}"]\n',
        [
            r"tenants.b.keys\[0\]: sha256:\w{12}... is a key of tenants.acme, too; expected a key of one tenant"
        ],
    ),
    "key-twice": (
        ACME + f'keys = ["{TWICE}", "{TWICE}"]\n',
        [r"acme.keys\[1\]: .* is a key of this tenant; "],
    ),
}


@pytest.mark.parametrize(("text", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_refuses_the_file(tmp_path, text, said):
    with pytest.raises(PolicyError) as refused:
        load(tmp_path, HEAD + text)
    error = refused.value
    assert str(error).startswith(f"{tmp_path / 'policy.toml'}: ") and "acme-secret" not in str(error)
    assert len(error.faults) == len(said), error.faults
    for pattern, fault in zip(said, error.faults, strict=True):
        assert re.search(pattern, fault), fault
    assert pickle.loads(pickle.dumps(error)).faults == error.faults


HEADS = {
    "no-schema": ('version = "1"\n', ["schema: missing; expected schema = 1"]),
    "another-schema": ('schema = 2\nversion = "1"\n', ["schema: expected 1, the format that .*, got 2"]),
    "schema-true": ('schema = true\nversion = "1"\n', ["schema: expected a whole number, got true"]),
    "schema-text": ('schema = "1"\nversion = "1"\n', ["schema: expected a whole number, got '1'"]),
    "schema-1.0": ('schema = 1.0\nversion = "1"\n', ["schema: expected a whole number, got 1.0"]),
    "no-version": ("schema = 1\n", ["version: missing; expected a name of this version"]),
    "version-is-a-number": ("schema = 1\nversion = 1.2\n", ["version: expected text in quotes, got 1.2"]),
    "version-is-a-day": (
        "schema = 1\nversion = 2026-11-30\n",
        ["version: expected text in quotes, got date"],
    ),
    "empty-version": ('schema = 1\nversion = ""\n', [r"version: expected a name .*\(it is empty\)"]),
    "control-version": ('schema = 1\nversion = "a\\u001b"\n', [r"version: expected .*'a\\x1b' \(control"]),
    "long-version": (f'schema = 1\nversion = "{"v" * 101}"\n', [r"version: expected .*\(101 characters\)"]),
}


@pytest.mark.parametrize(("head", "said"), HEADS.values(), ids=HEADS)
def test_a_fault_at_the_top_refuses_the_file(tmp_path, head, said):
    with pytest.raises(PolicyError) as refused:
        load(tmp_path, head + ACME)
    (fault,) = refused.value.faults
    assert re.search(said[0], fault), fault


@pytest.mark.parametrize(
    ("data", "said"),
    [
        pytest.param(b"", "tenants: missing", id="empty"),
        pytest.param(b"schema = 1\nschema = 1\n", "not valid TOML .*line 2", id="twice"),
        pytest.param(
            (HEAD + ACME + ACME).encode(), "not valid TOML .*Cannot declare .* twice", id="tenant-twice"
        ),
        pytest.param(
            b'version = "\xff"', r"expected UTF-8 text, got other bytes .*position 11", id="not-utf-8"
        ),
        pytest.param("version = 1".encode("utf-16"), "expected UTF-8 text, got other bytes", id="utf-16"),
        pytest.param(b"\0", "not valid TOML", id="nul"),
        pytest.param(b"{}", "not valid TOML", id="json"),
        pytest.param(b"a = " + b"[" * 100_000, "not valid TOML .*recursion", id="deep"),
        pytest.param(b"schema = " + b"9" * 5000, "not valid TOML", id="huge-number"),
        pytest.param(b"#" * ((4 << 20) + 1), "expected at most 4194304 bytes, got more", id="large"),
    ],
)
def test_bytes_that_are_no_policy(tmp_path, data, said):
    with pytest.raises(PolicyError, match=said) as refused:
        load(tmp_path, data)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "under-a-file", "nul"])
def test_places_without_a_policy(tmp_path, kind):
    path = tmp_path / "policy.toml"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "under-a-file":
        path = write(path, HEAD + ACME) / "policy.toml"
    elif kind == "nul":
        path = tmp_path / "a\0b"
    said = (
        "not a regular file" if kind in ("folder", "fifo") else "no such file; expected a policy, a TOML file"
    )
    with pytest.raises(PolicyError, match=said) as refused:
        load_policy(path, KNOWN)
    assert str(refused.value).count(str(tmp_path)) == 1


def test_all_faults_are_said_at_once(tmp_path):
    text = """
        schema = 3
        [groups]
        pets = ["Cat", 5]
        [defaults]
        on_failure = "no"
        [tenants.a]
        concepts = ["Dog"]
        groups = ["pet"]
        allow = ["Sea"]
        keys = ["k", 3]
        extra = 1
        [tenants.b]
    """
    with pytest.raises(PolicyError) as refused:
        load(tmp_path, text)
    places = [fault.partition(":")[0] for fault in refused.value.faults]
    assert sorted(places) == sorted(
        ["schema", "version", "groups.pets[1]", "groups.pets", "defaults.on_failure", "tenants.a.concepts"]
        + ["tenants.a.groups", "tenants.a.keys[0]", "tenants.a.keys[1]", "tenants.a.extra", "tenants.b"]
    )
    lines = str(refused.value).splitlines()
    assert lines[0] == f"{tmp_path / 'policy.toml'}: refused, 11 faults"
    assert lines[1:] == [f"  {fault}" for fault in refused.value.faults]


def test_of_very_many_faults_a_thousand_are_said(tmp_path):
    names = ", ".join(f'"none{number}"' for number in range(1500))
    with pytest.raises(PolicyError) as refused:
        load(tmp_path, f"{HEAD}[tenants.a]\nconcepts = [{names}]\n")
    assert len(refused.value.faults) == 1001 and refused.value.faults[-1] == "... and more"


def test_what_is_no_policy_at_all_is_said_in_few_words(tmp_path):
    """Bytes enough for a million faults would take gigabytes to describe."""
    with pytest.raises(PolicyError, match="got 300000 values of a wrong type or unknown name$") as refused:
        load(tmp_path, f"{HEAD}[tenants.a]\nconcepts = [{'1,' * 300_000}]\n")
    assert len(refused.value.faults) == 1

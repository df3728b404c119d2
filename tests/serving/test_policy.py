"""What a policy file may say, and what it means."""

from __future__ import annotations

import dataclasses
import hmac
import pickle
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lbdt.serving
from lbdt.runs.digests import sha256
from lbdt.runs.wording import nearest
from lbdt.serving import EXAMPLE_POLICY, TenantRules, UnknownTenantError, load_policy
from tests.serving.policies import ACME, HEAD, KNOWN, key, load, toml


def test_the_example_is_a_policy_of_emojicanvas():
    policy = load_policy(EXAMPLE_POLICY, KNOWN)
    assert (policy.version, policy.tenants) == ("2026-11-30.1", ("acme", "bluebird", "in-house"))
    assert policy.digest == sha256(EXAMPLE_POLICY.read_bytes())
    acme, bluebird = policy.resolve("acme"), policy.resolve("bluebird")
    assert "Dogs" not in acme.concepts and {"Cats", "Flame"} < {*acme.concepts}
    assert (acme.on_failure, bluebird.on_failure) == ("refuse", "unprotected")
    assert bluebird.concepts == ("Human", "Statues") and policy.resolve("in-house").concepts == ()
    for name, owner in (
        ("acme-example-key", "acme"),
        ("acme-example-key-2", "acme"),
        ("bluebird-example-key", "bluebird"),
        ("acme-example-key ", None),
        ("", None),
        (policy.digest, None),
        ("käfer \u2603 \udcff", None),
    ):
        assert policy.tenant_of_key(name) == owner
    assert policy.concept_sets() == (acme.concepts, bluebird.concepts, ())
    assert all(word in EXAMPLE_POLICY.read_text() for word in ("acme-example-key", "bluebird-example-key"))


@pytest.mark.parametrize(
    ("section", "concepts"),
    [
        pytest.param('concepts = ["Statues", "Cats"]', ("Cats", "Statues"), id="in-the-order-of-known"),
        pytest.param('groups = ["pets"]', ("Cats", "Dogs"), id="a-group"),
        pytest.param('concepts = ["Cats"]\ngroups = ["pets"]', ("Cats", "Dogs"), id="named-by-both"),
        pytest.param('groups = ["pets", "more"]', ("Cats", "Dogs", "Sea"), id="groups-that-overlap"),
        pytest.param('groups = ["pets"]\nallow = ["Cats"]', ("Dogs",), id="allowed"),
        pytest.param(
            'groups = ["pets", "more"]\nallow = ["Dogs"]', ("Cats", "Sea"), id="allowed-of-two-groups"
        ),
        pytest.param("concepts = []", (), id="said-to-be-none"),
        pytest.param('concepts = []\ngroups = ["none"]', (), id="an-empty-group-and-said-to-be-none"),
        pytest.param(
            'concepts = []\ngroups = ["pets"]\nallow = ["Dogs", "Cats"]', (), id="all-allowed-and-said-so"
        ),
        pytest.param('concepts = ["Sea"]\ngroups = []\nallow = []\nkeys = []', ("Sea",), id="empty-lists"),
    ],
)
def test_what_is_erased_for_a_tenant(tmp_path, section, concepts):
    groups = '[groups]\npets = ["Dogs", "Cats"]\nmore = ["Sea", "Dogs"]\nnone = []\nunused = ["Bears"]\n'
    policy = load(tmp_path, f"{HEAD}{groups}[tenants.a]\n{section}\n")
    assert policy.resolve("a") == TenantRules("a", concepts, "refuse", "1", policy.digest, "a")
    assert load_policy(tmp_path / "policy.toml", KNOWN[::-1]).resolve("a").concepts == concepts[::-1]


def test_unknown_tenants_are_refused_where_nothing_is_said(tmp_path):
    for text in (HEAD + ACME, HEAD + '[defaults]\nunknown_tenant = "refuse"\n' + ACME):
        policy = load(tmp_path, text)
        with pytest.raises(
            UnknownTenantError, match=r"unknown tenant 'Ac\\nme'; expected one of version 1"
        ) as e:
            policy.resolve("Ac\nme")
        assert e.value.tenant == "Ac\nme" and policy.unknown_tenant is None
        assert pickle.loads(pickle.dumps(e.value)).tenant == "Ac\nme"


def test_unknown_tenants_may_have_the_rules_of_a_tenant(tmp_path):
    text = '[defaults]\nunknown_tenant = "acme"\non_failure = "unprotected"\n'
    policy = load(tmp_path, HEAD + text + ACME + '[tenants.b]\nconcepts = []\non_failure = "refuse"\n')
    rules = policy.resolve("stranger")
    assert rules == TenantRules("stranger", ("Cats",), "unprotected", "1", policy.digest, "acme")
    assert policy.resolve("b").on_failure == "refuse" and policy.unknown_tenant == "acme"
    assert "stranger" not in policy.tenants


def test_a_policy_may_have_no_tenants_if_it_says_so(tmp_path):
    policy = load(tmp_path, HEAD + "[tenants]\n")
    assert (policy.tenants, policy.concept_sets(), policy.tenant_of_key("x")) == ((), (), None)


def test_names_of_one_to_a_hundred_characters(tmp_path):
    names = ("a", "x" * 100, "käfer ☃", "a.b", "Acme", "acme")
    tenants = {name: {"concepts": ["Cats"]} for name in names}
    policy = load(tmp_path, toml({"schema": 1, "version": "v" * 100, "tenants": tenants}))
    assert policy.tenants == names and policy.version == "v" * 100


@pytest.mark.parametrize("encode", [lambda t: b"\xef\xbb\xbf" + t, lambda t: t.replace(b"\n", b"\r\n")])
def test_a_byte_order_mark_and_other_ends_of_lines(tmp_path, encode):
    data = encode((HEAD + ACME).encode())
    policy = load(tmp_path, data)
    assert policy.tenants == ("acme",) and policy.digest == sha256(data)


def test_digests_of_keys_in_either_case(tmp_path):
    text = f'{HEAD}[tenants.a]\nconcepts = []\nkeys = ["sha256:{key("k")[7:].upper()}"]\n'
    assert load(tmp_path, text).tenant_of_key("k") == "a"


@pytest.mark.parametrize(
    ("known", "error", "said"),
    [
        pytest.param(
            "Cats", TypeError, "known: expected the names of the eraser's concepts, got 'Cats'", id="text"
        ),
        pytest.param(["Cats", 3], TypeError, "known: expected the names", id="number"),
        pytest.param(
            ["Cats", "Cats"], ValueError, "known: expected distinct names, got Cats, Cats", id="twice"
        ),
    ],
)
def test_known_names_that_are_none(known, error, said):
    with pytest.raises(error, match=said):
        load_policy(EXAMPLE_POLICY, known)


def test_tenants_and_keys_are_texts():
    policy = load_policy(EXAMPLE_POLICY, KNOWN)
    with pytest.raises(TypeError, match="tenant: expected its name, got None"):
        policy.resolve(None)
    with pytest.raises(TypeError, match="key: expected text, got bytes"):
        policy.tenant_of_key(b"acme-example-key")


def test_a_policy_cannot_be_changed():
    policy = load_policy(EXAMPLE_POLICY, KNOWN)
    for frozen in (policy, policy.resolve("acme")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.on_failure = "unprotected"
    assert "sha256" not in repr(policy) and "0c28d692" not in repr(policy)


@pytest.mark.parametrize("name", ["acme-example-key", "nobody's"])
def test_a_key_is_compared_with_all_digests(monkeypatch, name):
    policy, asked = load_policy(EXAMPLE_POLICY, KNOWN), []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: asked.append(a) or compare(a, b))
    policy.tenant_of_key(name)
    assert len(asked) == 3 and all(type(digest) is bytes and len(digest) == 32 for digest in asked)


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12)
SOME = st.lists(st.sampled_from(KNOWN), unique=True)


@st.composite
def files(draw):
    """A policy's tables, and how its file calls them."""
    groups = draw(st.dictionaries(NAMES, SOME, max_size=5))
    tenants = {}
    for number, name in enumerate(
        draw(st.lists(NAMES.filter(lambda n: n != "refuse"), unique=True, max_size=6))
    ):
        named = draw(st.lists(st.sampled_from(sorted(groups)), unique=True)) if groups else []
        members = sorted({concept for group in named for concept in groups[group]})
        concepts = draw(SOME)
        allowed = [concept for concept in members if concept not in concepts]
        allow = draw(st.lists(st.sampled_from(allowed), unique=True)) if allowed else []
        tenants[name] = {"concepts": concepts, "groups": named, "allow": allow}
        tenants[name]["keys"] = [key(f"{number}-{place}") for place in range(draw(st.integers(0, 3)))]
        if draw(st.booleans()):
            tenants[name]["on_failure"] = draw(st.sampled_from(["refuse", "unprotected"]))
        if not concepts and draw(st.booleans()) and {*members} - {*allow}:
            del tenants[name]["concepts"]
    unknown = draw(st.sampled_from(["refuse", *tenants]))
    defaults = {"unknown_tenant": unknown, "on_failure": draw(st.sampled_from(["refuse", "unprotected"]))}
    return {"schema": 1, "version": draw(NAMES), "groups": groups, "defaults": defaults, "tenants": tenants}


@given(files(), st.permutations(KNOWN))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_file_means_what_it_says(tmp_path, tables, known):
    policy = load(tmp_path, toml(tables), known)
    defaults, sections = tables["defaults"], tables["tenants"]
    assert (policy.version, policy.tenants) == (tables["version"], tuple(sections))
    sets = []
    for name, section in sections.items():
        wanted = {*section.get("concepts", ())}.union(
            *(tables["groups"][group] for group in section["groups"])
        )
        wanted -= {*section["allow"]}
        sets.append(tuple(sorted(wanted, key=known.index)))
        failure = section.get("on_failure", defaults["on_failure"])
        assert policy.resolve(name) == TenantRules(
            name, sets[-1], failure, policy.version, policy.digest, name
        )
    assert policy.concept_sets() == tuple(dict.fromkeys(sets))
    for number, (name, section) in enumerate(sections.items()):
        for place in range(4):
            owner = name if place < len(section["keys"]) else None
            assert policy.tenant_of_key(f"{number}-{place}") == owner
    if defaults["unknown_tenant"] == "refuse":
        with pytest.raises(UnknownTenantError):
            policy.resolve(" stranger")
    else:
        rules = policy.resolve(" stranger")
        same = dataclasses.replace(policy.resolve(defaults["unknown_tenant"]), tenant=" stranger")
        assert rules == same


def test_ten_thousand_tenants(tmp_path):
    """Seconds of the processor, as the machine may be running other things: 0.8 for the file here."""
    tenants = {
        f"tenant-{number}": {
            "concepts": [KNOWN[number % 20]],
            "groups": ["pets"],
            "keys": [key(f"{number}-{place}") for place in range(3)],
        }
        for number in range(10_000)
    }
    text = toml({"schema": 1, "version": "1", "groups": {"pets": ["Cats", "Dogs"]}, "tenants": tenants})
    started = time.process_time()
    policy = load(tmp_path, text)
    read = time.process_time()
    assert policy.tenant_of_key("9999-2") == "tenant-9999" and policy.tenant_of_key("none") is None
    assert policy.tenant_of_key("0-0") == "tenant-0"
    asked = time.process_time()
    assert len(policy.tenants) == 10_000 and len(policy.concept_sets()) == 19
    assert read - started < 5 and (asked - read) / 3 < 0.1


def test_the_nearest_name_is_found_whatever_its_case():
    assert nearest("CATZ", KNOWN) == "Cats" and nearest("zzz", KNOWN) is None and nearest("a", []) is None


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_an_import_loads_nothing_heavy():
    code = "import sys, lbdt.serving{}; print([m for m in {} if m in sys.modules], len(dir(lbdt.serving)))"
    heavy = ("torch", "ray", "fastapi", "numpy", "pydantic")
    names = len(lbdt.serving.__all__)
    assert python(code.format("", heavy)).strip() == f"[] {names}"
    assert python(code.format(".policy_watch", heavy[:4])).strip() == f"[] {names}"
    with pytest.raises(AttributeError, match="no attribute 'Server'; public names: AuditError"):
        lbdt.serving.Server  # noqa: B018

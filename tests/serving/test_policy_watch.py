"""A policy's file is edited, broken, removed and put back while it is in force."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from lbdt.serving import PolicyError, PolicyWatcher, policy_watch
from tests.serving.policies import KNOWN, exchange, write


def text(version: str, concept: str = "Cats") -> str:
    return f'schema = 1\nversion = "{version}"\n[tenants.acme]\nconcepts = ["{concept}"]\n'


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "policy.toml", text("1"))


@pytest.fixture
def said():
    return []


@pytest.fixture
def watcher(path, said):
    return PolicyWatcher(path, KNOWN, report=said.append)


def in_force(watcher) -> tuple[str, tuple[str, ...]]:
    return watcher.current.version, watcher.current.resolve("acme").concepts


def test_another_version_takes_the_place(path, watcher, said):
    before = watcher.current
    assert not watcher.refresh() and watcher.current is before and watcher.rejected is None
    exchange(path, text("2", "Dogs"))
    assert watcher.current is before  # until somebody looks
    assert watcher.refresh() and in_force(watcher) == ("2", ("Dogs",))
    assert before.resolve("acme").concepts == ("Cats",) and said == []


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(text("2", "Cat"), id="unknown-concept"),
        pytest.param(text("2")[:-12], id="half-written"),
        pytest.param("", id="empty"),
        pytest.param("\0" * 100, id="zeros"),
        pytest.param(text("1", "Dogs"), id="a-version-of-another-content"),
        pytest.param(None, id="gone"),
    ],
)
def test_a_broken_version_leaves_the_one_before_and_is_reported_once(path, watcher, said, broken):
    before = watcher.current
    path.unlink() if broken is None else exchange(path, broken)
    for _ in range(3):
        assert not watcher.refresh() and watcher.current is before
    assert said == [watcher.rejected] and said[0].startswith(f"{path}: ")
    exchange(path, text("3", "Sea"))
    assert watcher.refresh() and watcher.rejected is None and in_force(watcher) == ("3", ("Sea",))
    assert len(said) == 1


def test_what_is_in_force_comes_back(path, watcher, said):
    before = watcher.current
    for _ in range(2):
        exchange(path, "broken")
        assert not watcher.refresh() and watcher.rejected
        exchange(path, text("1"))
        assert not watcher.refresh() and watcher.rejected is None and watcher.current is before
    assert len(said) == 2  # it was broken twice


def test_every_broken_version_is_reported(path, watcher, said):
    for content in ("broken", "broken otherwise", "broken"):
        exchange(path, content)
        watcher.refresh()
    path.unlink()
    watcher.refresh()
    assert len(said) == 4 and "no such file" in said[-1] and said[0] == said[2]


def test_a_version_names_one_content_for_good(path, watcher, said):
    exchange(path, text("2", "Dogs"))
    assert watcher.refresh()
    exchange(path, text("1", "Dogs"))
    assert not watcher.refresh() and in_force(watcher) == ("2", ("Dogs",))
    assert "version: '1' has been in force with another content" in said[0]
    assert "give this one a version of its own" in said[0]
    exchange(path, text("1"))  # as it was: the operator goes back
    assert watcher.refresh() and in_force(watcher) == ("1", ("Cats",))


def test_a_version_of_another_content_is_said_with_all_other_faults(path, watcher, said):
    exchange(path, text("1", "Dog"))
    assert not watcher.refresh()
    assert "refused, 2 faults" in said[0] and "did you mean 'Dogs'" in said[0]


def test_the_name_of_a_broken_version_may_be_used_again(path, watcher):
    exchange(path, text("2", "Dog"))
    assert not watcher.refresh()
    exchange(path, text("2", "Dogs"))
    assert watcher.refresh()


def test_a_file_that_is_being_written_is_read_again(path, watcher, said):
    """In place, in pieces: any of them may be what a refresh sees."""
    whole = text("2", "Dogs")
    with open(path, "w") as file:
        for part in (whole[:9], whole[9:40], whole[40:]):
            before = watcher.current
            assert not watcher.refresh() and watcher.current is before
            file.write(part)
            file.flush()
    assert watcher.refresh() and in_force(watcher) == ("2", ("Dogs",))
    assert len(said) == 3 and watcher.rejected is None


def counted(monkeypatch) -> list:
    """The reads of files from here on."""
    reads, read = [], policy_watch.read_policy
    monkeypatch.setattr(policy_watch, "read_policy", lambda path: reads.append(path) or read(path))
    return reads


def test_a_file_at_rest_is_not_read(path, monkeypatch):
    monkeypatch.setattr(policy_watch, "_FRESH", 0.0)
    watcher = PolicyWatcher(str(path), KNOWN)
    reads = counted(monkeypatch)
    assert not any(watcher.refresh() for _ in range(3)) and reads == []
    os.utime(path, ns=(0, 0))
    assert not watcher.refresh() and not watcher.refresh() and len(reads) == 1
    exchange(path, "broken")
    assert not watcher.refresh() and not watcher.refresh() and len(reads) == 2


def test_a_change_that_keeps_size_and_time_is_seen(path, monkeypatch):
    monkeypatch.setattr(policy_watch, "_FRESH", 0.0)
    watcher, before = PolicyWatcher(path, KNOWN), path.stat()
    write(path, text("2", "Dogs"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    assert watcher.refresh() and watcher.current.version == "2"


def test_a_link_that_leads_elsewhere_is_seen(tmp_path, path):
    write(tmp_path / "other.toml", text("2", "Dogs"))
    (tmp_path / "link").symlink_to(path.name)
    watcher = PolicyWatcher(tmp_path / "link", KNOWN)
    (tmp_path / "next").symlink_to("other.toml")
    os.replace(tmp_path / "next", tmp_path / "link")
    assert watcher.refresh() and in_force(watcher) == ("2", ("Dogs",))


@pytest.mark.parametrize("content", [None, "broken", text("1", "Cat")], ids=["missing", "no-toml", "unknown"])
def test_the_first_version_has_to_be_good(tmp_path, content, said):
    if content is not None:
        write(tmp_path / "policy.toml", content)
    with pytest.raises(PolicyError):
        PolicyWatcher(tmp_path / "policy.toml", KNOWN, report=said.append)
    assert said == []


def test_nobody_has_to_listen(path):
    watcher = PolicyWatcher(path, KNOWN)
    exchange(path, "broken")
    assert not watcher.refresh() and "not valid TOML" in watcher.rejected


def test_who_is_told_may_ask_and_may_fail(path):
    def report(said: str) -> None:
        assert not watcher.refresh() and watcher.rejected == said
        raise RuntimeError("no")

    watcher = PolicyWatcher(path, KNOWN, report=report)
    exchange(path, "broken")
    with pytest.raises(RuntimeError):
        watcher.refresh()
    assert not watcher.refresh() and watcher.rejected
    exchange(path, text("2"))
    assert watcher.refresh()


def test_readers_see_one_version_whole(path, said, monkeypatch):
    """Fifty reloads, a third of them of broken files, by two threads, while four read; they take turns often."""
    interval = sys.getswitchinterval()
    monkeypatch.setattr(threading, "excepthook", lambda failed: wrong.append(failed))
    watcher, ended, wrong, seen = PolicyWatcher(path, KNOWN, report=said.append), threading.Event(), [], set()

    def concept(version: str) -> str:
        return "Cats" if version == "1" else KNOWN[int(version) % 20]

    def read() -> None:
        while not ended.is_set():
            policy = watcher.current
            rules = policy.resolve("acme")
            seen.add(policy.version)
            if (rules.policy_version, rules.policy_digest) != (policy.version, policy.digest):
                wrong.append(rules)
            if rules.concepts != (concept(policy.version),) or policy.concept_sets() != (rules.concepts,):
                wrong.append(rules)

    def refresh() -> None:
        while not ended.is_set():
            watcher.refresh()

    threads = [threading.Thread(target=read) for _ in range(4)] + [threading.Thread(target=refresh)]
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    exchanged = 0
    try:
        for number in range(2, 52):
            exchange(path, "broken" if number % 3 == 0 else text(str(number), concept(str(number))))
            watcher.refresh()
            exchanged += watcher.current.version == str(number - (number % 3 == 0))
            assert (watcher.rejected is None) == (number % 3 != 0)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert wrong == [] and exchanged == 50 and seen <= {str(number) for number in range(1, 52)}
    assert len(seen) > 1 and len(said) == 17

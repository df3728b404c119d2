"""`lbdt.runs`: digests that files of earlier versions carry, settings that are compared by name, and waiting."""

import json
import time

import pytest
import torch

from lbdt.activations import InMemory, Site
from lbdt.activations.pipelines import digest_of_module
from lbdt.activations.prompts import Prompt
from lbdt.attack.search import _number
from lbdt.runs import processes
from lbdt.runs.digests import marked, sha256
from lbdt.runs.settings import Difference, differing, keep_settings, require_same_settings
from lbdt.runs.wording import slug
from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.training.heldout import split
from lbdt.training.recipe_training import identity
from lbdt.training.training_checkpoint import digest

X = torch.arange(6.0).view(2, 3)


def counted():
    sae = SparseAutoencoder(SAEConfig(d_in=3, num_latents=4, k=2))
    for first, parameter in enumerate(sae.parameters()):
        parameter.data = torch.arange(parameter.numel()).view(parameter.shape).float() + first
    return sae


def labelled():
    x = torch.zeros(8, 2, 3, 4)
    return InMemory(x, site=Site("unet.a"), timesteps=(2, 1), concepts=("a",), prompts_per_shard=4)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: sha256(b"abc"), "ba7816bf8f01cfea"),
        (lambda: sha256(["a", b"b", memoryview(b"c")]), "ba7816bf8f01cfea"),
        (
            lambda: sha256(marked(["a", X, X.bfloat16(), X > 2, torch.tensor(3), 5, {"a": 1}])),
            "1ed592ed61921e8c",
        ),
        (lambda: digest(counted()), "88469acd6b0b2cb0"),
        (lambda: digest(counted().bfloat16()), "88469acd6b0b2cb0"),
        (lambda: digest_of_module(counted()), "fdc09c793de7d6cb"),
        (lambda: identity(labelled()), "bca99d81999552b6"),
        (lambda: identity(split(labelled(), 0.25)[0]), "e3f50ffc2222cf02"),
        (lambda: identity(split(labelled(), 0.25)[1]), "d8e8130072fc0342"),
    ],
    ids=["bytes", "pieces", "parts", "sae", "sae-bfloat16", "fingerprint", "memory", "training", "held-out"],
)
def test_digests_are_those_that_earlier_versions_wrote(found, expected):
    assert found()[:16] == expected


def test_names_and_seeds_are_those_of_earlier_versions():
    assert slug("x" * 90) == "x" * 51 + "-efdfd9ee"
    assert _number(Prompt("a cat", "Cats", None, 7)) == 137083741370643


@pytest.mark.parametrize(
    ("there", "here", "expected"),
    [
        ({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}, []),
        ({"a": None}, {}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 there, 2 here"]),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": None}}}, ["a.b.c: 1 there, null here"]),
        ({"a": {"b": 1}}, {"a": 3}, ['a: {"b": 1} there, 3 here']),
        ({"b": 1}, {"a": 1}, ["a: null there, 1 here", "b: 1 there, null here"]),
        ({"a": "x" * 99}, {"a": ""}, [f'a: "{"x" * 55}... there, "" here']),
    ],
    ids=["same", "missing-is-null", "value", "deep", "kind", "keys", "long"],
)
def test_what_differs_is_told_by_name(there, here, expected):
    assert [str(difference) for difference in differing(there, here)] == expected


def test_settings_are_written_once_and_then_compared(tmp_path):
    settings = {"steps": 3, "site": ("unet", 1), "call": {"a": 1}}
    for _ in range(2):
        keep_settings(tmp_path, "run.json", settings, "other")
    assert json.loads((tmp_path / "run.json").read_text())["site"] == ["unet", 1]
    before = (tmp_path / "run.json").read_bytes()
    changed = settings | {"steps": 4, "call": {"a": 2}}
    with pytest.raises(ValueError, match=r"--out X: another call, steps: call.a: 1 there, 2 here; steps: 3"):
        keep_settings(tmp_path, "run.json", changed, "another {names}: {differences}", where="--out X")
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("there", [None, [], "x", {}], ids=repr)
def test_what_is_no_settings_is_another_run(there):
    with pytest.raises(ValueError, match=r"^here: other \(steps\)$"):
        require_same_settings("here", there, {"steps": 1}, "other ({names})")


def test_many_differences_are_counted_and_braces_in_values_stay():
    there, here = {f"n{i:02d}": "{names}" for i in range(15)}, {}
    with pytest.raises(ValueError) as refused:
        require_same_settings("f", there, here, "{differences}", each=Difference.in_brackets)
    assert str(refused.value).startswith("f: n00 ({names} there, None now); n01")
    assert str(refused.value).endswith("n11 ({names} there, None now); 3 more")


def test_waiting_says_so_once_and_returns_what_is_found(monkeypatch, capsys):
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    answers = iter([None, None, 0])
    assert processes.awaited(lambda: next(answers), "waiting") == 0
    assert capsys.readouterr().err == "waiting\n"
    assert processes.awaited(lambda: "there", "waiting") == "there" and not capsys.readouterr().err


def one_fails(tries: int) -> None:
    try:
        with processes.joined(lambda: torch.device("cpu"), auto=False) as (world, _):
            if world.rank == 1:
                raise ValueError(f"/a/folder: the cause, after {tries} tries")
            world.wait()
    finally:
        time.sleep(2 * world.rank)  # a process may take its time to end after its group is gone


def test_of_several_processes_the_one_that_failed_is_heard():
    """The other one fails as well, as its peer is gone, and often ends before it."""
    with pytest.raises(RuntimeError, match="^/a/folder: the cause, after 3 tries$"):
        processes.spawn(2, one_fails, 3)

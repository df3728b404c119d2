"""The table of `benchmarks/attack.sh`."""

import json

import pytest

from benchmarks import attack
from lbdt.attack import AttackOutcome


def kept(folder, method, search, seed, **more):
    outcome = AttackOutcome(
        "a", "Cats", None, seed, "Cats", "Dogs", "Cats", (1,), (), 1, (3,), ("a</w>",), "a a", True
    )
    (folder / "pairs").mkdir(parents=True)
    settings = {
        "method": method,
        "seed": seed,
        "eraser": {"strength": -5.0},
        "attack": {"search": search, **more},
    }
    (folder / "attack.json").write_text(json.dumps(settings))
    (folder / "pairs" / "a.json").write_text(json.dumps(outcome.to_dict()))


def test_runs_of_other_positions_and_judged_prompts_are_other_rows(tmp_path):
    kept(tmp_path / "a", "per", "gradient", 1)
    kept(tmp_path / "b", "per", "gradient", 2)
    kept(tmp_path / "c", "per", "gradient", 3, position="prefix", judged="typed")
    kept(tmp_path / "d", "per", "random", 3, position="suffix", judged="typed")
    kept(tmp_path / "e", "steering", "gradient", 3, position="middle", judged="ids")
    table = attack.rows(tmp_path)
    assert [len(row["seeds"]) for row in table] == [2, 1, 1, 1]
    assert [line.split(" | ")[1:3] for line in attack.lines(table)[2:]] == [
        ["learned prefix", "2"],
        ["learned prefix, typed", "1"],
        ["random suffixes, typed", "1"],
        ["learned insert", "1"],
    ]
    with pytest.raises(ValueError, match="holds no run of lbdt attack"):
        attack.rows(tmp_path / "a")

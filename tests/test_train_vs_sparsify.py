"""`benchmarks.train_vs_sparsify` without the libraries that it is about: its start, our side, its table."""

import pytest
import torch

from benchmarks import peer_trainers, train_vs_sparsify
from benchmarks.peer_trainers import Size

SIZE = Size("tiny", 12, 40, 3, 50)
CPU = torch.device("cpu")


def test_a_folder_without_the_libraries_is_refused_with_the_command_that_fills_it(tmp_path):
    with pytest.raises(ValueError, match=r"sae-lens, dictionary-learning there; pip install .*peers\.txt"):
        peer_trainers.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_no_dead_latent_is_among_the_k_largest_of_a_row(share):
    start = train_vs_sparsify.start_of(SIZE, share, CPU)
    h = (start.x - start.weights["b_dec"]) @ start.weights["encoder.weight"].T
    assert start.dead.sum() == share * SIZE.latents
    assert not start.dead[h.topk(SIZE.k, dim=1).indices].any()
    assert not share or (h[:, start.dead] > 0).any()  # so AuxK has something to take


def test_both_precisions_take_steps_of_the_same_first_losses():
    start = train_vs_sparsify.start_of(SIZE, 0.25, CPU)
    runners = {name: train_vs_sparsify.Ours(start, precision) for name, precision in
               (("lbdt", "float32"), ("lbdt, bfloat16", "bfloat16"))}  # fmt: skip
    first = train_vs_sparsify.compare(SIZE, runners)
    assert 0 < first["lbdt"]["fvu"] < 1 and first["lbdt"]["auxk"] > 0
    assert all(runner.step() > 0 for runner in runners.values())


def test_a_trainer_of_other_losses_is_not_timed():
    start = train_vs_sparsify.start_of(SIZE, 0.0, CPU)
    ours, other = (train_vs_sparsify.Ours(start, "float32") for _ in range(2))
    other.losses = lambda: {"fvu": 0.1, "auxk": 0.0}
    with pytest.raises(
        ValueError, match="tiny: fvu of the first step is .* and 0.1 for other; not the same work"
    ):
        train_vs_sparsify.compare(SIZE, {"lbdt": ours, "other": other})


def test_the_table_names_what_is_met_and_what_is_missed():
    row = {
        "size": vars(SIZE),
        "dead_share": 0.25,
        "seconds": {"lbdt": 0.01, "sparsify": 0.012},
        "settings": {"lbdt": "Adam", "sparsify": "signum"},
        "fastest": "sparsify",
        "fastest_of_all": "sparsify",
        "speedup": 1.2,
        "speedup_bfloat16": 1.1,
        "speedup_of_all": 1.2,
    }
    text = train_vs_sparsify.lines([row, row | {"speedup": 1.5}])
    assert text[0] == "| d, L, k, rows | dead | lbdt, ms | sparsify, ms | fastest peer / lbdt |"
    assert text[2] == "| 12, 40, 3, 50 | 25% | 10 | 12 | 1.20x |"
    assert text[4:6] == ["lbdt: Adam", "sparsify: signum"]
    assert [line.partition(":")[0] for line in text[6:]] == ["MISSED", "met"]

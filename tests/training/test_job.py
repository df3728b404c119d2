"""`train_recipe`: its files, going on after kill -9 at any moment, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lbdt.activations import Prompt
from lbdt.activations.batches import Batches
from lbdt.runs.folder import held
from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.training import explain_variance
from lbdt.training.assignment import Assignment, load_assignment
from lbdt.training.heldout import split
from lbdt.training.recipe_training import RecipeOptions, train_recipe
from lbdt.training.recipes import RECIPES
from tests.repeats import repeats
from tests.training import planted

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("cfg.json", "sae.safetensors", "metrics.jsonl", "report.json", "assignment.json")
RANKED = {"expansion": 2, "k": 4}
ROWS = [
    ("saeuron", RANKED),
    ("saemnesia", {}),
    ("saeparate", RANKED),
    ("gsae", RANKED),
    ("sdxl", RANKED),
    ("relu", {"expansion": 2}),
    ("jumprelu", {"expansion": 2}),
]


def start(name):
    if not RECIPES[name].fine_tunes:
        return None
    torch.manual_seed(3)
    return SparseAutoencoder(SAEConfig(planted.D, 3 * planted.D, 4, update=True)).requires_grad_(False)


def job(name, out, steps=9, settings=None, assignment=None, **kwargs):
    train_part, held = split(planted.source(48), 0.125)
    options = RecipeOptions(
        steps=steps, rows=64, lr=1e-2, checkpoint_every=4, dead_after=150, **(settings or {}), **kwargs
    )
    return train_recipe(
        RECIPES[name],
        train_part,
        planted.SITE,
        out,
        options=options,
        heldout=held,
        start=start(name),
        assignment=assignment,
        progress=False,
    )


def contents(folder):
    return {name: (folder / name).read_bytes() for name in COMPARED if (folder / name).exists()}


class Killed(Exception):
    pass


@pytest.mark.parametrize(("name", "settings"), ROWS, ids=[name for name, _ in ROWS])
def test_every_recipe_goes_on_to_the_files_of_an_unbroken_run(tmp_path, monkeypatch, name, settings):
    report = job(name, tmp_path / "whole", settings=settings)
    assert report["finished"] is False and report["evaluated_on"] == "heldout"
    made = sorted(path.name for path in (tmp_path / "whole").iterdir())
    supervised = ["assignment.json"] if RECIPES[name].supervised and not RECIPES[name].contrastive else []
    assert made == sorted([*COMPARED[:4], *supervised, "speed.jsonl"])
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(9))
    assert lines[-1]["fvu"] < lines[0]["fvu"]

    for stop in (3, 6, 3):
        with monkeypatch.context() as patch:
            patch.setattr(Batches, "_rows", _until(Batches._rows, stop))
            with pytest.raises(Killed):
                job(name, tmp_path / "broken", settings=settings)
    assert (tmp_path / "broken/training.ckpt").exists()
    job(name, tmp_path / "broken", settings=settings)
    assert repeats(contents(tmp_path / "broken"), contents(tmp_path / "whole"))
    assert not (tmp_path / "broken/training.ckpt").exists()
    sae = SparseAutoencoder.from_pretrained(tmp_path / "whole")
    assert sae.config.site == str(planted.SITE)
    if sae.config.normalize_decoder:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.config.num_latents))
    held = split(planted.source(48), 0.125)[1]
    values = explain_variance(sae, held, planted.SITE)
    assert repeats({key: report[key] for key in values}, values)


def _until(rows, calls):
    """`rows` for so many calls; then the process is as good as killed."""
    left = [calls]

    def counted(self, numbers):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return rows(self, numbers)

    return counted


KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.training import test_job

def child(folder):
    pid = os.fork()
    if pid == 0:
        test_job.job("gsae", Path(folder), steps=80, settings=test_job.RANKED)
        os._exit(0)
    return pid

draw, killed = random.Random(0), 0
start = time.perf_counter()
assert os.waitpid(child(sys.argv[1]), 0)[1] == 0
whole = time.perf_counter() - start
for _ in range(10):
    pid = child(sys.argv[2])
    time.sleep(draw.random() * 0.25 * whole)
    os.kill(pid, signal.SIGKILL)
    killed += os.waitpid(pid, 0)[1] == signal.SIGKILL
assert os.waitpid(child(sys.argv[2]), 0)[1] == 0
print(killed)
"""


def test_killed_with_kill_9_at_ten_random_moments(tmp_path):
    """Forked from one process that has imported everything and computed nothing, so that the kills hit the training."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = subprocess.run(
        [sys.executable, "-c", KILLER, whole, broken], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5
    assert contents(broken) == contents(whole)
    left = [path.name for path in broken.iterdir()]
    assert sorted(left) == sorted([*COMPARED, "speed.jsonl"])


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(tmp_path):
    job("saeuron", tmp_path, settings=RANKED)
    before = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert job("saeuron", tmp_path, settings=RANKED)["finished"] is True
    with pytest.raises(ValueError, match="the finished training belongs to a run with another steps; choose"):
        job("saeuron", tmp_path, steps=10, settings=RANKED)
    with pytest.raises(ValueError, match="another config"):
        job("saeuron", tmp_path, settings={"expansion": 2, "k": 5})
    assert contents(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    with held(tmp_path, "lbdt train"):
        with pytest.raises(ValueError, match="another `lbdt train` is writing there; wait for it, or give"):
            job("saeuron", tmp_path, settings=RANKED)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_another_sae_is_refused_and_left_alone(tmp_path):
    start("saemnesia").save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds an SAE that this training did not make"):
        job("saeuron", tmp_path, settings=RANKED)
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae.safetensors"]


def test_metrics_that_lost_steps_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "_rows", _until(Batches._rows, 6))
        with pytest.raises(Killed):
            job("saeuron", tmp_path, settings=RANKED)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    with pytest.raises(ValueError, match="expected the metrics of the 4 steps before the checkpoint"):
        job("saeuron", tmp_path, settings=RANKED)


def test_saemnesia_assigns_by_the_scores_of_its_start(tmp_path):
    job("saemnesia", tmp_path)
    found = load_assignment(tmp_path)
    assert tuple(found.concepts) == planted.CONCEPT_NAMES and tuple(found.styles) == planted.STYLE_NAMES
    config = SparseAutoencoder.from_pretrained(tmp_path).config
    assert (config.num_latents, config.k, config.update) == (3 * planted.D, 4, True)


def test_another_assignment_is_refused_and_the_begun_runs_own_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("lbdt.training.recipe_training.write_files", _stop)
    with pytest.raises(KeyboardInterrupt):
        job("saemnesia", tmp_path)
    monkeypatch.undo()
    before = contents(tmp_path)
    own = load_assignment(tmp_path)
    swapped = Assignment(dict(zip(own.concepts, reversed(own.concepts.values()), strict=True)), own.styles)
    with pytest.raises(ValueError, match="belongs to a run with another labels"):
        job("saemnesia", tmp_path, assignment=swapped)
    assert contents(tmp_path) == before and load_assignment(tmp_path) == own
    assert job("saemnesia", tmp_path)["finished"] is False


def _stop(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("saeuron", {"objective": {"pool": 0.5}}, "pool: recipe saeuron has no such setting"),
        ("saeuron", {"variant": "image"}, "variant: recipe saeuron has released; got 'image'"),
        ("saemnesia", {"k": 3}, "expansion, k, batch-topk: a fine-tuned SAE keeps its own"),
        ("gsae", {**RANKED, "logs": ["tensorboard"]}, "--log tensorboard: TensorBoard is not installed"),
        ("gsae", {**RANKED, "logs": ["paper"]}, "--log: expected one of tensorboard, wandb; got 'paper'"),
    ],
    ids=["unused setting", "variant", "sizes of a fine-tuned SAE", "tensorboard", "log"],
)
def test_refused_before_anything_is_written(tmp_path, monkeypatch, name, settings, message):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises((ValueError, ImportError), match=message):
        job(name, tmp_path / "out", settings=settings)
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_recipes_need_what_they_are_for(tmp_path):
    source, out = planted.source(16), tmp_path / "out"
    with pytest.raises(ValueError, match="recipe saemnesia fine-tunes a trained SAE"):
        train_recipe(RECIPES["saemnesia"], source, planted.SITE, out)
    with pytest.raises(ValueError, match="a supervised recipe needs prompts with concepts or styles"):
        train_recipe(RECIPES["gsae"], planted.source(16, labelled=False), planted.SITE, out)
    wide = SparseAutoencoder(SAEConfig(planted.D + 1, 8, 2, update=True))
    with pytest.raises(ValueError, match="of width 24, got one of width 25"):
        train_recipe(RECIPES["saemnesia"], source, planted.SITE, out, start=wide)
    output = SparseAutoencoder(SAEConfig(planted.D, 8, 2))
    with pytest.raises(ValueError, match="for the block's output"):
        train_recipe(RECIPES["saemnesia"], source, planted.SITE, out, start=output)
    pairs = planted.source(16)
    pairs.labelled = tuple(
        Prompt("text", *planted.CONCEPT_NAMES[:1], beside=planted.CONCEPT_NAMES[1:2]) for _ in range(16)
    )
    for name, part, count in (
        ("gsae", pairs, 16),
        ("saeparate", pairs, 16),
        ("gsae", split(pairs, 0.25)[0], 12),
    ):
        with pytest.raises(
            ValueError, match=f"recipe {name} takes a picture's labels for all that is in it, and {count} of"
        ):
            train_recipe(RECIPES[name], part, planted.SITE, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("site", "fits"),
    [(None, True), (str(planted.SITE), True), ("unet.mid_block.attentions.1:update", False)],
    ids=["not known", "this one", "another"],
)
def test_an_sae_is_fine_tuned_at_its_own_site(tmp_path, site, fits):
    given = start("saemnesia").with_site(site)
    options = RecipeOptions(steps=2, rows=64)
    arguments = (RECIPES["saemnesia"], planted.source(16), planted.SITE, tmp_path / "out")
    if not fits:
        with pytest.raises(
            ValueError, match=rf"from: expected an SAE for {planted.SITE}, got one of {site}; .*wi"
        ):
            train_recipe(*arguments, options=options, start=given, progress=False)
        assert not (tmp_path / "out").exists()
        given = given.with_site(None)
    train_recipe(*arguments, options=options, start=given, progress=False)
    assert SparseAutoencoder.from_pretrained(tmp_path / "out").config.site == str(planted.SITE)


def test_a_training_that_was_finished_before_files_named_a_site_is_known(tmp_path):
    job("saeuron", tmp_path, settings=RANKED)
    settings = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert "site" not in settings["config"] and settings["data"]["site"] == str(planted.SITE)
    path = tmp_path / "cfg.json"
    config = json.loads(path.read_text())
    assert config.pop("site") == str(planted.SITE)
    path.write_text(json.dumps(config))
    assert job("saeuron", tmp_path, settings=RANKED)["finished"] is True

"""`lbdt score` on a tiny pipeline: stored and live activations, assignments, several processes, refusals."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from lbdt import cli
from lbdt.dictionary import ConceptDictionary
from lbdt.editors import ConceptEraser
from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.training.assignment import Assignment, save_assignment
from tests import toy
from tests.repeats import repeats

SITE = toy.HOOKPOINT
TEXTS = {"Cats": "a cat", "Dogs": "two dogs", "Trees": "green tree"}
MODEL = ("--steps", "3", "--dtype", "float32", "--prompts-per-shard", "2")


def lbdt(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("score")
    toy.pipeline(root / "tokenizer").save_pretrained(root / "pipe")
    rows = [
        {"prompt": f"{text} in {style}", "concept": name, "style": style, "seed": seed}
        for seed, (name, text) in enumerate(TEXTS.items())
        for style in ("Ink", "Crayon")
    ]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = SparseAutoencoder(SAEConfig(d_in=toy.WIDTH, num_latents=64, k=6))
    sae.save_pretrained(root / "sae")
    done = lbdt(
        "collect", "--model", root / "pipe", "--prompts", root / "prompts.jsonl", "--site", SITE, *MODEL, "--out",
        root / "activations", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return root


def stored(folders, out, *more):
    return lbdt(
        "score", "--sae", folders / "sae", "--site", SITE, "--activations", folders / "activations", "--out", out,
        "--device", "cpu", *more,
    )  # fmt: skip


def dictionary_bytes(folder):
    return [(folder / f"dictionary.{suffix}").read_bytes() for suffix in ("json", "safetensors")]


def test_it_writes_a_dictionary_that_an_eraser_takes(folders, tmp_path):
    done = stored(folders, tmp_path / "out", "--heldout", folders / "activations")
    assert done.exit_code == 0, done.output
    for word in ("Cats", "Dogs", "Trees", "held out:", "32 bank patches per timestep", str(tmp_path / "out")):
        assert word in done.stdout
    dictionary = ConceptDictionary.from_pretrained(tmp_path / "out")
    assert dictionary.bank.shape == (3, 32, toy.WIDTH) and dictionary.site == f"{SITE}:output"
    sae = SparseAutoencoder.from_pretrained(folders / "sae")
    eraser = ConceptEraser(sae, dictionary, SITE)
    pipe = toy.pipeline(tmp_path / "tokenizer")
    with eraser.attach(pipe, ["Cats"]):
        toy.images(pipe)
    assert eraser.report().steps


def test_json_has_the_figures(folders, tmp_path):
    more = ("--json", "--by", "styles", "--top-k", "1", "--bank", "3", "--heldout", folders / "activations")
    done = stored(folders, tmp_path / "out", *more)
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    dictionary = ConceptDictionary.from_pretrained(tmp_path / "out")
    assert [row["name"] for row in values["styles"]] == ["Ink", "Crayon"] == list(dictionary.concepts)
    mean = dictionary.scores().mean(1)
    for place, row in enumerate(values["styles"]):
        assert row["best"] == int(mean[place].argmax()) and repeats(row["score"], float(mean[place].max()))
        assert row["latents"] == dictionary.select(row["name"], top_k=1).latents.tolist()
        assert 0 <= row["off"] <= row["on"] <= 1 and row["assigned"] is None
    assert values["bank"] == 3 and 0 <= values["heldout"]["off"] <= values["heldout"]["on"] <= 1
    assert list(values["heldout"]["timesteps"]) == list(map(str, values["timesteps"]))


def test_the_gate_counts_activations_of_its_own(folders, tmp_path):
    """The same prompts, one of them said to show a second concept."""
    rows = [json.loads(line) for line in (folders / "prompts.jsonl").read_text().splitlines()]
    rows[0]["beside"] = [
        next(row["concept"] for row in rows if row["concept"] not in (None, rows[0]["concept"]))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = lbdt(
        "collect", "--site", SITE, "--model", folders / "pipe", "--prompts", tmp_path / "pairs.jsonl", *MODEL, "--out",
        tmp_path / "pairs", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert stored(folders, tmp_path / "plain").exit_code == 0
    done = stored(folders, tmp_path / "out", "--gate-activations", tmp_path / "pairs", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["gate_activations"] == str(tmp_path / "pairs")
    plain, other = (ConceptDictionary.from_pretrained(tmp_path / name).gate for name in ("plain", "out"))
    assert other.several and not plain.several
    assert int(other.on.sum()) == int(plain.on.sum()) + 3  # timesteps


def test_a_pipeline_gives_the_dictionary_of_its_stored_activations(folders, tmp_path):
    assert stored(folders, tmp_path / "stored").exit_code == 0
    done = lbdt(
        "score", "--sae", folders / "sae", "--site", SITE, "--model", folders / "pipe", "--prompts",
        folders / "prompts.jsonl", *MODEL, "--out", tmp_path / "live", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert repeats(dictionary_bytes(tmp_path / "live"), dictionary_bytes(tmp_path / "stored"))


def test_the_assignment_beside_the_sae_is_used(folders, tmp_path):
    sae = SparseAutoencoder.from_pretrained(folders / "sae")
    sae.save_pretrained(tmp_path / "sae")
    save_assignment(Assignment({"Cats": 5, "Dogs": 7, "Trees": 9}, {"Ink": 11}), tmp_path / "sae")
    beside = lbdt(
        "score", "--sae", tmp_path / "sae", "--site", SITE, "--activations", folders / "activations", "--out",
        tmp_path / "a", "--device", "cpu", "--json",
    )  # fmt: skip
    assert beside.exit_code == 0, beside.output
    rows = json.loads(beside.stdout)["concepts"]
    assert [(row["assigned"], row["latents"]) for row in rows] == [(5, [5]), (7, [7]), (9, [9])]
    assert all(isinstance(row["assigned_rank"], int) for row in rows)
    given = stored(folders, tmp_path / "b", "--assignment", tmp_path / "sae" / "assignment.json")
    assert "assigned latent is the best one for" in given.stdout, given.output
    assert repeats(dictionary_bytes(tmp_path / "a"), dictionary_bytes(tmp_path / "b"))


def test_processes_share_the_work_and_the_first_one_reports(folders, tmp_path):
    assert stored(folders, tmp_path / "one").exit_code == 0
    command = [
        sys.executable, "-m", "lbdt", "score", "--sae", folders / "sae", "--site", SITE, "--activations",
        folders / "activations", "--out", tmp_path / "two", "--device", "cpu", "--json",
    ]  # fmt: skip
    started = [
        subprocess.Popen(
            list(map(str, command)),
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert json.loads(outputs[0][0])["processes"] == 2 and not outputs[1][0]
    assert repeats(dictionary_bytes(tmp_path / "two"), dictionary_bytes(tmp_path / "one"))
    assert not list((tmp_path / "two").glob("score.state.*"))


def test_held_out_activations_of_another_site_are_refused_before_the_passes(folders, tmp_path):
    done = lbdt(
        "collect", "--model", folders / "pipe", "--prompts", folders / "prompts.jsonl", "--site", f"{SITE}:update",
        *MODEL, "--out", tmp_path / "held", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    failed = stored(folders, tmp_path / "out", "--heldout", tmp_path / "held")
    assert failed.exit_code == 1 and "the activations hold" in failed.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--site", "unet.mid_block.attentions.0"), "the activations hold"),
        (("--site", f"{SITE}:update"), "the activations hold"),
        (("--bank-site", f"{SITE}:update"), "the activations hold"),
        (("--assignment", "/nowhere"), "/nowhere/assignment.json: no such file"),
        (("--sae", "/nowhere"), "/nowhere: no such folder"),
        (("--heldout", "/nowhere"), "/nowhere: no settings.json"),
        (("--activations", "/nowhere"), "/nowhere: no settings.json"),
        (("--gate-activations", "/nowhere"), "/nowhere: no settings.json"),
        (("--device", "cuda:77"), "--device cuda:77: not usable here"),
        (("--top-k", "1", "--percentile", "99"), "give percentile or top_k, not both"),
    ],
    ids=lambda value: value[0] + " " + value[1] if isinstance(value, tuple) else "",
)
def test_refusals_are_one_line_and_write_nothing(folders, tmp_path, more, message):
    failed = stored(folders, tmp_path / "out", *more)
    assert failed.exit_code == 1
    lines = [line for line in failed.stderr.splitlines() if line.startswith("lbdt: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_activations_and_a_pipeline_are_not_both_taken(folders, tmp_path):
    assert (
        stored(folders, tmp_path / "out", "--model", folders / "pipe", "--prompts", "x.jsonl").exit_code == 2
    )
    done = stored(
        folders,
        tmp_path / "out",
        "--gate-activations",
        folders / "activations",
        "--picture-false-positive",
        "1",
    )
    assert done.exit_code == 2 and "is for a gate" in done.output
    done = lbdt("score", "--sae", "x", "--site", SITE, "--out", tmp_path, "--model", folders / "pipe")
    assert done.exit_code == 2 and "the prompts of canvas are" in done.output

"""`lbdt train` on a folder of activations and straight from a pipeline; held-out prompts; other logs."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lbdt.activations import Prompt, Site
from lbdt.activations.batches import Batches
from lbdt.activations.collecting import collect
from lbdt.activations.generated import Generated
from lbdt.activations.source import shard_count
from lbdt.activations.stored import Stored
from lbdt.cli import app
from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.training import train
from lbdt.training.heldout import split, split_prompts
from tests import toy
from tests.repeats import repeats
from tests.training import planted

SITE = "unet.mid_block.attentions.0"
PROMPTS = [
    {"prompt": f"{c} {s}", "concept": c, "style": s, "seed": i}
    for i in range(3)
    for c in ("cat", "dog")
    for s in ("red", "blue")
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny pipeline's folder, prompts, and activations that were collected from it."""
    folder = tmp_path_factory.mktemp("world")
    pipe = toy.pipeline(folder / "made")
    pipe.save_pretrained(folder / "pipe")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    prompts = [Prompt(row["prompt"], row["concept"], row["style"], row["seed"]) for row in PROMPTS]
    source = Generated(pipe, prompts, [Site.parse(SITE)], steps=2, prompts_per_shard=4)
    collect(source, folder / "activations", progress=False)
    return folder


def lbdt(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments), "--device", "cpu"])


SMALL = ("--steps", 6, "--rows", 32, "--lr", 1e-2, "--heldout-share", 0.25)
SIZES = ("--expansion", 2, "--k", 4)


def test_the_chain_of_recipes_on_a_folder(world, tmp_path):
    activations = ("--activations", world / "activations")
    done = lbdt("--recipe", "saeuron", *activations, "--out", tmp_path / "a", *SMALL, *SIZES, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["prompts"] == 3 and report["evaluated_on"] == "heldout" and 0 < report["fvu"]
    fine = ("--recipe", "saemnesia", "--from", tmp_path / "a", *activations, *SMALL)
    done = lbdt(*fine, "--out", tmp_path / "b")
    assert done.exit_code == 0 and "saemnesia, image" in done.stdout, done.output
    given = json.loads((tmp_path / "b/assignment.json").read_text())
    assert set(given["concepts"]) == {"cat", "dog"} and set(given["styles"]) == {"red", "blue"}
    done = lbdt(*fine, "--assign", tmp_path / "b", "--variant", "released", "--out", tmp_path / "c")
    assert done.exit_code == 0 and "saemnesia, released" in done.stdout, done.output
    again = lbdt(*fine, "--out", tmp_path / "b")
    assert again.exit_code == 0 and "was finished already; nothing was changed" in again.stdout
    configs = [SparseAutoencoder.from_pretrained(tmp_path / name).config for name in "abc"]
    assert {config.site for config in configs} == {f"{SITE}:output"} and configs[2].activation == "topk"


def test_a_stream_trains_without_a_cache(world, tmp_path):
    stream = ("--recipe", "gsae", "--stream", "--model", world / "pipe", "--prompts", world / "prompts.jsonl")
    stream += ("--site", SITE, "--sampling-steps", 2, "--prompts-per-shard", 4, *SMALL, *SIZES)
    done = lbdt(*stream, "--out", tmp_path / "a", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["prompts"] == 3
    assert json.loads((tmp_path / "a/assignment.json").read_text()) == {
        "concepts": {"cat": 0, "dog": 1},
        "styles": {"red": 2, "blue": 3},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "sdxl"), "expected unet.mid_block.attentions.0:update"),
        (("--recipe", "saemnesia"), "recipe saemnesia fine-tunes a trained SAE"),
        (("--recipe", "gsae", "--strength", "0"), "strength: expected a finite number > 0"),
        (("--recipe", "saeuron", "--site", "unet.other"), "the activations hold"),
        (("--recipe", "relu", "--pool", "0.5"), "pool: recipe relu has no such setting"),
    ],
    ids=["sdxl on outputs", "nothing to fine-tune", "strength", "site", "unused option"],
)
def test_one_line_and_exit_code_1(world, tmp_path, arguments, message):
    done = lbdt(*arguments, "--activations", world / "activations", "--out", tmp_path / "out", *SMALL)
    assert done.exit_code == 1
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_usage_is_exit_code_2(tmp_path):
    assert lbdt("--recipe", "saeuron", "--out", tmp_path).exit_code == 2
    assert lbdt("--recipe", "other", "--out", tmp_path, "--stream").exit_code == 2


@pytest.mark.parametrize(("prompts", "share"), [(48, 0.125), (45, 0.25), (41, 0.5), (8, 0.125)])
def test_a_split_gives_each_prompt_to_one_side(prompts, share):
    whole = planted.source(prompts)
    whole.labelled = tuple(Prompt("text", seed=seed) for seed in range(prompts))
    parts = split(whole, share)
    everything = torch.cat([whole.shard(i, planted.SITE).x for i in range(shard_count(whole))])
    seen = []
    for part in parts:
        shards = [part.shard(i, planted.SITE) for i in range(shard_count(part))]
        assert [len(shard.x) for shard in shards[:-1]] == [part.prompts_per_shard] * (len(shards) - 1)
        x = torch.cat([shard.x for shard in shards])
        assert len(x) == part.prompts
        assert torch.equal(part.labels()[0], torch.cat([shard.concepts for shard in shards]))
        own = [int((everything == row).flatten(1).all(1).nonzero()) for row in x]
        assert [prompt.seed for prompt in part.labelled] == own
        seen += own
    assert sorted(seen) == list(range(prompts))
    concepts = parts[1].labels()[0]
    assert len(concepts) < 2 or concepts.unique().numel() > 1


def test_a_split_of_files_reads_single_rows(world):
    part = split(Stored(world / "activations"), 0.25)[0]
    site = part.sites[0]
    files, memory = Batches(part, site, memory=0), Batches(part, site)
    assert torch.equal(files.rows(3, 40), memory.rows(3, 40))
    for first, second in zip(files.samples(2, 5), memory.samples(2, 5), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("count", "share"), [(2, 0.5), (13, 0.1), (100, 0.25), (3, 0.01)])
def test_prompts_are_split_without_loss(count, share):
    first, second = split_prompts(list(range(count)), share)
    assert sorted(first + second) == list(range(count)) and first and second


class Recorded:
    def __init__(self):
        self.calls = []

    def begin(self, step):
        self.calls.append(("begin", step))

    def log(self, step, values):
        self.calls.append((step, values["fvu"]))

    def close(self):
        self.calls.append("close")


def test_other_logs_get_every_step_once_and_are_closed(tmp_path):
    batches = Batches(planted.source(16), planted.SITE)
    config = SAEConfig(planted.D, 2 * planted.D, 4)
    settings = {"rows": 32, "progress": False, "checkpoint": tmp_path / "ckpt", "checkpoint_every": 2}
    first, second = Recorded(), Recorded()

    class Killed(Exception):
        pass

    def stop(step, values):
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        train(config, batches, 4, writers=[first], log=stop, **settings)
    train(config, batches, 4, writers=[second], **settings)
    assert [call[0] for call in first.calls] == ["begin", 0, 1, 2, "c"] and first.calls[-1] == "close"
    assert [call[0] for call in second.calls] == ["begin", 2, 3, "c"]
    assert repeats(first.calls[3], second.calls[1])

"""Several processes and lower precision: the same training within the table's tolerance."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lbdt.activations.batches import Batches
from lbdt.runs.processes import launched
from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.testing import assert_close
from lbdt.training import explain_variance, train
from tests.training import planted

ROOT = Path(__file__).resolve().parents[2]
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
CODE = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from lbdt.runs.processes import joined
from lbdt.training.recipe_training import RecipeOptions, train_recipe
from lbdt.training.recipes import RECIPES
from tests.training import planted
from tests.training.test_job import start

with joined(lambda: torch.device("cpu"), True) as (world, device):
    for name in ("sdxl", "saemnesia", "saeparate"):
        sizes = {} if name == "saemnesia" else {"expansion": 2, "k": 4, "batch_topk": False}
        options = RecipeOptions(steps=12, rows=80, lr=1e-2, checkpoint_every=5, dead_after=150, **sizes)
        train_recipe(RECIPES[name], planted.source(48), planted.SITE, Path(sys.argv[1]) / name, options=options,
                     start=start(name), world=world, progress=False)
    print(f"process {world.rank} of {world.size}")
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
left = [name for name in names if "gloo" in name]
sys.stdout.write(f"threads of the group left: {left}\\n")  # at once: two processes write to one pipe
"""


def test_two_processes_train_as_one_does(tmp_path):
    """Both of an odd number of images, dead latents included; each file is written once, by the first process."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{CODE}")
    run = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120}
    one = subprocess.run([sys.executable, script, tmp_path / "one"], **run)
    assert one.returncode == 0, one.stderr
    two = subprocess.run([*TWO, str(script), str(tmp_path / "two")], **run)
    assert two.returncode == 0, two.stderr
    assert "process 0 of 1" in one.stdout
    assert "process 0 of 2" in two.stdout and "process 1 of 2" in two.stdout
    # One that is alive when the interpreter ends may abort the process.
    assert two.stdout.count("threads of the group left: []") == 2, two.stdout
    for name in ("sdxl", "saemnesia", "saeparate"):
        curves = []
        for folder in ("one", "two"):
            lines = (tmp_path / folder / name / "metrics.jsonl").read_text().splitlines()
            curves.append([json.loads(line) for line in lines])
        assert [line["step"] for line in curves[1]] == list(range(12))
        for key in curves[0][0]:
            first, second = (torch.tensor([line[key] for line in curve]).float() for curve in curves)
            assert_close(second, first, "training_loss")
        assert curves[0][-1]["dead"] > 0 or name == "saemnesia"
        whole, shared = (SparseAutoencoder.from_pretrained(tmp_path / f / name) for f in ("one", "two"))
        assert_close(shared.W_dec, whole.W_dec, "training_weights")
        names = [sorted(path.name for path in (tmp_path / f / name).iterdir()) for f in ("one", "two")]
        assert names[0] == names[1]


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_bfloat16_products_train_to_nearly_the_same(activation):
    source = planted.source()
    config = SAEConfig(planted.D, 2 * planted.D, 6, activation=activation)
    values = {}
    for precision in ("float32", "bfloat16"):
        sae = train(
            config,
            Batches(source, planted.SITE),
            60,
            rows=256,
            lr=1e-2,
            precision=precision,
            progress=False,
        )
        assert all(parameter.dtype == torch.float32 for parameter in sae.parameters())
        values[precision] = explain_variance(sae, source, planted.SITE)
    assert values["bfloat16"] != values["float32"]
    assert values["bfloat16"]["fvu"] < values["float32"]["fvu"] + 0.02


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 1)),
        ({"WORLD_SIZE": "", "RANK": ""}, (0, 1)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, (3, 4)),
    ],
    ids=["alone", "launched alone", "empty", "several"],
)
def test_the_launchers_variables_say_which_process_this_is(monkeypatch, variables, place):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    world = launched()
    assert (world.rank, world.size) == place and world.main is (place[0] == 0)

"""Latents pickles become concept dictionaries, whatever their size."""

import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from lbdt.dictionary.latents_pickle import SPACINGS, read_latents, spaced_timesteps
from tests.formats import fixtures


def dumped(path, value):
    path.write_bytes(pickle.dumps(value))
    return path


@pytest.mark.parametrize(
    ("protocol", "kind"),
    [(2, "numpy"), (4, "numpy"), (5, "numpy"), (4, "torch"), (5, "torch")],
    ids=["2", "4", "5", "torch-4", "torch-5"],
)
def test_the_mean_over_samples_and_the_steps(tmp_path, protocol, kind):
    path = fixtures.latents_pickle(tmp_path / "a.pkl", protocol, kind)
    read = read_latents(path, progress=False)
    wanted = fixtures.latents()
    assert read.dictionary.concepts == fixtures.CLASSES
    assert read.dictionary.timesteps.tolist() == [801, 601, 401, 201, 1]
    assert read.dictionary.counts.tolist() == [[fixtures.SAMPLES] * fixtures.STEPS] * 3
    mean = np.stack([wanted[name].astype(np.float64).mean(0) for name in wanted]).astype(np.float32)
    assert torch.equal(read.dictionary.mean, torch.from_numpy(mean))
    assert read.dictionary.peak == max(float(array.max()) for array in wanted.values())
    assert any("leading spacing, steps_offset 1" in note for note in read.assumptions)
    assert read.dictionary.select("Cats", top_k=1).latents.numel()


def test_lists_of_arrays_and_single_means_are_samples(tmp_path):
    arrays = fixtures.latents()["Cats"]
    split = {"Cats": [arrays[:1], arrays[1:]], "Dogs": list(arrays), "Trees": arrays[0]}
    read = read_latents(dumped(tmp_path / "a.pkl", split), progress=False)
    assert read.samples == {"Cats": 4, "Dogs": 4, "Trees": 1}
    assert torch.equal(read.dictionary.mean[0], read.dictionary.mean[1])
    assert torch.equal(read.dictionary.mean[2], torch.from_numpy(arrays[0]).float())


def test_timesteps_and_classes_can_be_given(tmp_path):
    path = fixtures.latents_pickle(tmp_path / "a.pkl")
    read = read_latents(path, [999, 700, 500, 300, 0], ["Trees", "Cats"], progress=False)
    assert read.dictionary.concepts == ("Trees", "Cats")
    assert read.dictionary.timesteps.tolist() == [999, 700, 500, 300, 0]
    assert not any("timesteps" in note for note in read.assumptions)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 4, 7, 50, 100, 1000])
def test_spacings_are_those_of_diffusers(spacing, steps):
    scheduler = DDIMScheduler(
        timestep_spacing=spacing, steps_offset=1, clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(steps)
    assert torch.equal(spaced_timesteps(steps, spacing), scheduler.timesteps)
    assert spaced_timesteps(100)[:2].tolist() == [991, 981]


A = np.zeros((2, 3, 4), np.float16)


@pytest.mark.parametrize(
    ("value", "more", "message"),
    [
        ([A], {}, "expected a dictionary of classes"),
        ({}, {}, "expected a dictionary of classes"),
        ({1: A}, {}, "expected a dictionary of classes"),
        ({"Cats": 3}, {}, "Cats: expected an array .* got int"),
        ({"Cats": []}, {}, "Cats: expected an array .* got nothing"),
        ({"Cats": A[0, 0]}, {}, r"Cats: expected an array .* got shape \[4\]"),
        ({"Cats": A[:0]}, {}, r"with values, got shape \[0, 3, 4\]"),
        ({"Cats": A, "Dogs": A[:, :2]}, {}, "Dogs: expected 3 steps and 4 latents as in Cats"),
        ({"Cats": A - 1}, {}, "Cats: expected finite activations >= 0, got values from -1"),
        ({"Cats": A + np.float16("inf")}, {}, "Cats: expected finite activations >= 0, got values from inf"),
        ({"Cats": A + np.float16("nan")}, {}, "Cats: expected finite activations >= 0, got values from nan"),
        ({"Cats": [A] * 9}, {}, "add up to 432 bytes, but the file has"),
        ({"Cats": A}, {"timesteps": "cosine"}, "expected leading, trailing, linspace or a list"),
        ({"Cats": A}, {"timesteps": [9, 8]}, "timesteps: expected 3, one for each step of the file, got 2"),
        ({"Cats": A}, {"timesteps": [1, 2, 3]}, "expected strictly descending values"),
        ({"Cats": A}, {"concepts": ["Cat"]}, "no class Cat; it has Cats"),
        ({"Cats": np.zeros((1, 1001, 1), np.float16)}, {}, "expected 1 to 1000 steps, got 1001"),
    ],
    ids=[
        *("list", "empty", "number-as-name", "number", "no-arrays", "one-axis", "no-samples", "other-steps"),
        *("negative", "infinite", "nan", "one-array-many-times", "spacing", "too-few", "ascending", "class"),
        "too-many-steps",
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, value, more, message):
    path = dumped(tmp_path / "a.pkl", value)
    with pytest.raises(ValueError, match=message):
        read_latents(path, progress=False, **more)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_the_large_fixture_is_a_real_pickle(tmp_path, kind):
    fixtures.large_pickle(tmp_path / "a.pkl", (4, 2, 3), kind)
    read = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert np.asarray(read["Dogs"]).sum(axis=(1, 2)).tolist() == [6, 0, 0, 6]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_large_pickle_is_read_in_little_memory(tmp_path, kind):
    """Two classes of 200 MB each, holes in the file but for their first and last sample."""
    shape, path = (500, 10, 20000), tmp_path / "large.pkl"
    fixtures.large_pickle(path, shape, kind)
    assert path.stat().st_size > 400_000_000
    code = f"""
        import resource, pathlib, torch
        from lbdt.dictionary.latents_pickle import read_latents
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        read = read_latents(pathlib.Path({str(path)!r}), progress=False)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mean = read.dictionary.mean
        assert mean.shape == (2, 10, 20000), mean.shape
        assert bool((mean == torch.tensor(2 / 500)).all()), mean
        print((after - before) << 10)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert grown < 120_000_000, f"{grown / 1e6:.0f} MB"

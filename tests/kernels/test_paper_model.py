"""The arithmetic on the detection's machine code: what kernels/README.md shows is what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends import HAS_TRITON
from tests.kernels import triton_process

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(
        HAS_TRITON and triton_process.version_of(triton_process.PINNED) != (3, 9),
        reason="the table is of Triton 3.9's machine code",
    ),
]


def table(cache: Path, *arguments: str) -> list[list[str]]:
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    environment.pop("LD_PRELOAD", None)
    command = [sys.executable, "-m", "benchmarks.paper_model", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]


def test_the_page_shows_what_is_printed(tmp_path_factory):
    shown = (ROOT / "kernels/README.md").read_text()
    printed = table(triton_process.cache(tmp_path_factory))
    for row in printed[2:]:
        assert f"| {' | '.join(row)} |" in shown


def test_more_from_l2_takes_less_time_and_none_less_than_the_floor(tmp_path_factory):
    head, _, *rows = table(triton_process.cache(tmp_path_factory), "--cases", "1", "--l2", "2", "5.5", "1000")
    for row in (dict(zip(head, cells, strict=True)) for cells in rows):
        for name in ("count", "screened"):
            times = [float(each) for each in row[f"{name}, us"].split(" / ")]
            assert times == sorted(times, reverse=True)
            assert times[-1] >= float(row["floor, us"]) / (2 if name == "screened" else 1)
            assert (row["left"] == "0") == (row[f"{name} / floor"] == "-")


def test_a_screen_pays_where_every_patch_survives_and_costs_three_launches_where_few_do(tmp_path_factory):
    head, _, *rows = table(triton_process.cache(tmp_path_factory), "--cases", "1", "--l2", "5.5")
    times = {}
    for cells in rows:
        row = dict(zip(head, cells, strict=True))
        times[row["patches"]] = float(row["count, us"]), float(row["screened, us"])
    assert times["100 %"][1] < times["100 %"][0]
    for share in ("0 %", "absent", "present"):
        count, screened = times[share]
        assert 0 < screened - count < 1.5

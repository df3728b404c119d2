"""Kill -9 at random moments of `lbdt collect`, `train` and `score`, then the same command again: are the files those of an
unbroken run? `python -m benchmarks.kill_and_resume [--kills 10] [--only train] [--work DIR]`; exits with 1 if not.

Every trial starts in an empty folder. What a run measures about itself (speed.jsonl, locks) is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

SITE = "unet.up_blocks.0.attentions.1:update"
SEED = 0


def commands(work: Path) -> dict[str, list[str]]:
    """By name; each writes to the folder that is appended to it."""
    collect = ["collect", "--site", SITE, "--canvas-seeds", "100:101", "--steps", "4", "--guidance", "1"]
    here = ["--activations", str(work / "collect-unbroken")]
    return {
        "collect": [*collect, "--prompts-per-shard", "10", "--out"],
        "train": ["train", "--recipe", "sdxl", *here, "--expansion", "8", "--k", "16", "--steps", "150"]
        + ["--lr", "1e-3", "--checkpoint-every", "20", "--out"],
        "score": ["score", "--sae", str(work / "train-unbroken"), "--site", SITE, "--bank-site", SITE]
        + [*here, "--save-every", "1", "--out"],
    }


def run(arguments: list[str], out: Path, seconds: float | None = None) -> bool:
    """Runs `lbdt`; killed after `seconds`, where given. Whether it came to its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lbdt", *arguments, str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    if process.returncode:
        raise RuntimeError(
            f"lbdt {' '.join(arguments)} {out}: exit code {process.returncode}\n{errors[-2000:]}"
        )
    return True


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that should be the same."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "speed.jsonl" and not path.name.endswith(".lock")
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--only", action="append", choices=("collect", "train", "score"))
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="lbdt-kill-"))
    generator = random.Random(SEED)
    same = True
    for name, arguments in commands(work).items():
        unbroken = work / f"{name}-unbroken"
        start = time.perf_counter()
        run(arguments, unbroken)
        seconds = time.perf_counter() - start
        if args.only and name not in args.only:
            continue
        wanted, partly, equal = digest(unbroken), 0, 0
        for trial in tqdm(range(args.kills), desc=name, file=sys.stderr):
            out = work / f"{name}-{trial}"
            finished = run(arguments, out, generator.uniform(0.25, 1.0) * seconds)
            partly += not finished and out.exists() and digest(out) != wanted
            run(arguments, out)
            got = digest(out)
            equal += got == wanted
            if got != wanted:
                wrong = sorted(k for k in wanted.keys() | got.keys() if wanted.get(k) != got.get(k))
                print(f"{name}, trial {trial}: not the same: {', '.join(wrong)}")
                same = False
            else:
                shutil.rmtree(out)
        figures = {"command": name, "unbroken_seconds": round(seconds, 1), "files": len(wanted)}
        figures |= {"kills": args.kills, "left_partial_files": partly, "same_bytes_after_resuming": equal}
        print(json.dumps(figures), flush=True)
    if args.work is None and same:
        shutil.rmtree(work)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

"""Run by test_collect: collects to FOLDER/unbroken, then to FOLDER/killed with SIGKILL at many moments, then to
FOLDER/raced0, 1, ... by two processes that start at once. Prints a JSON line."""

import json
import os
import random
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from lbdt.activations import Prompt, Site
from lbdt.activations.collecting import collect
from lbdt.activations.generated import Generated
from tests import toy

RACES = 3


def child(work) -> int:
    """Forks a process that does `work` and ends without clean-up."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except Exception as error:
            print(error, file=sys.stderr)
        os._exit(code)
    return pid


def main(root: Path) -> None:
    torch.set_num_threads(1)
    # tqdm's own lock is shared with forks: one that is killed while it has it would leave all others waiting.
    tqdm.set_lock(threading.RLock())
    prompts = [Prompt("a cat", "Cats", seed=i) for i in range(24)]
    pipe = toy.pipeline(root / "tokenizer")
    source = Generated(pipe, prompts, [Site(toy.HOOKPOINT)], steps=3, guidance=4.0, prompts_per_shard=2)
    start = time.perf_counter()
    collect(source, root / "unbroken", progress=False)
    whole = time.perf_counter() - start

    kills = unfinished = 0
    draw = random.Random(0)
    for _ in range(12):
        pid = child(partial(collect, source, root / "killed", progress=False))
        time.sleep(draw.uniform(0, whole / 5))
        os.kill(pid, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        kills += killed
        made = len(list((root / "killed").glob("shards/*.safetensors")))
        unfinished += killed and 0 < made < 12
        if (root / "killed" / "manifest.json").exists():
            break
    collect(source, root / "killed", progress=False)

    for race in range(RACES):
        folder = root / f"raced{race}"
        pids = [
            child(partial(collect, source, folder, process=i, processes=2, progress=False)) for i in range(2)
        ]
        if any(os.waitpid(pid, 0)[1] for pid in pids):
            sys.exit("a racing process failed")
    print(json.dumps({"kills": kills, "unfinished": unfinished, "races": RACES, "seconds": whole}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

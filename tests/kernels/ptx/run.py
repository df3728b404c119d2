"""Runs cases in the machine: `python -m tests.kernels.ptx.run [--suite | --oldest] [--case NAME] [--seed N]`.

Prints a JSON object a line: the case, for which architecture, the seed, what differs from the reference ("wrong", null:
nothing) or the error that ended it, the instructions that warps executed, and matrix products that wait for each other.
"""

import argparse
import json

from tests.kernels.ptx.cases import CASES
from tests.kernels.ptx.launching import VERSION, Compiled
from tests.kernels.ptx.machine import Misuse, Stuck
from tests.kernels.ptx.memory import BadAccess
from tests.kernels.ptx.parsing import NotSupported
from tests.kernels.ptx.races import Race


def outcome(name: str, arch: int, seed: int) -> dict:
    """The line of a case."""
    result = {"case": name, "arch": arch, "seed": seed, "triton": list(VERSION), "wrong": None, "error": None}
    try:
        compiled = Compiled(CASES[name], arch)
        launches = compiled.run(seed)
    except (BadAccess, Misuse, NotSupported, Race, Stuck) as error:
        return result | {"error": f"{type(error).__name__}: {error}"}
    return result | {
        "wrong": compiled.wrong(),
        "kernels": [ready.name for ready in compiled.launches],
        "executed": [launch.executed for launch in launches],
        "serialised": any(launch.serialised for launch in launches),
        "values": sorted({int(value) for value in compiled.first_result().unique()[:9]}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    few = parser.add_mutually_exclusive_group()
    few.add_argument("--suite", action="store_true", help="for two architectures only what the tests run so")
    few.add_argument("--oldest", action="store_true", help="the cases that the oldest Triton runs too")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only these")
    parser.add_argument("--seed", type=int, help="of the schedules (default: another one for each case)")
    given = parser.parse_args()
    for number, (name, case) in enumerate(CASES.items()):
        if (given.case and name not in given.case) or (given.oldest and not case.oldest):
            continue
        once = given.oldest or (given.suite and not case.twice)
        for arch in case.archs[:1] if once else case.archs:
            print(json.dumps(outcome(name, arch, number if given.seed is None else given.seed)), flush=True)


if __name__ == "__main__":
    main()

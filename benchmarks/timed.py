"""One version of a case of `lbdt bench` under pytest-benchmark, after its answer was compared with the
others'."""

import torch

from lbdt.bench import cases

ROUNDS = 8


@torch.inference_mode()
def time_version(benchmark, spec: cases.Spec, version: str) -> None:
    """Times `version` of the case that `spec` names, in the group of that case."""
    case = cases.build(spec)
    case.check({name: case.versions[name] for name in {"ours", version}})
    benchmark.group = str(spec)
    benchmark.pedantic(case.versions[version], rounds=ROUNDS, iterations=1, warmup_rounds=2)

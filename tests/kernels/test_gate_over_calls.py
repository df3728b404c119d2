"""The gate over the calls of a run, on every backend, against loops: means of calls; what was found stays found."""

import pytest
import torch

from lbdt import ops
from lbdt.reference.detect_patches import FOUND
from tests.backends import every_backend, on_device
from tests.kernels.test_gate import gate
from tests.ops import test_detect_patches as detection

backends = every_backend("cpp", "triton")
CALLS = 4


def run_by_hand(calls, given, so_far):
    """The literal masks and patches taken of a run, call by call; adds up the lists `so_far` [B][C + 1]."""
    masks, takens = [], []
    for arguments in calls:
        owners, least, deciding = given["owners"], given["least"], given["deciding"]
        ungated = detection.literal(**arguments)
        h = detection.pre_activations(*(arguments.get(name) for name in ("x", "weight", "bias", "minus")))
        floor = arguments["thresholds"][arguments["timestep_bin"]].masked_fill(
            ~arguments["enabled"], detection.INF
        )
        passing = (h[..., arguments["latents"]] > floor.unsqueeze(1)) & ungated.unsqueeze(2)
        batch, patches = ungated.shape
        mask, taken = torch.zeros_like(ungated), torch.zeros(batch, dtype=torch.int64)
        for b in range(batch):
            row = b if deciding is None else int(deciding[b])
            so_far[b][-1] += 1
            for c in range(least.shape[1]):
                mine = owners == c
                count = int(passing[row][:, mine].any(1).sum())
                needed = int(least[arguments["timestep_bin"][row], c])
                before = so_far[b][c] >= FOUND
                so_far[b][c] += count
                quarters = so_far[b][c] * (given["least_of"] or patches) // max(patches, 1) * 4
                if before or needed <= 1 or quarters // so_far[b][-1] >= needed:
                    mask[b] |= passing[b][:, mine].any(1)
                    so_far[b][c] = FOUND if so_far[b][c] > 0 else 0
            taken[b] = int(ungated[b].sum() - mask[b].sum())
        masks.append(mask)
        takens.append(taken)
    return masks, takens


def calls_of(seed=0, **sizes):
    """The calls of a run: the same SAE, other activations and bins."""
    first = detection.inputs(seed=seed, **sizes)
    parts = ("x", "timestep_bin", "minus")
    later = [detection.inputs(seed=seed + 100 * n, **sizes) for n in range(1, CALLS)]
    return [first, *({**first, **{name: call[name] for name in parts if name in call}} for call in later)]


RUNS = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"B": 4}, {"deciding": True}, id="another-row-decides"),
    pytest.param({"B": 4, "k": 0, "threshold": 20}, {"deciding": True}, id="no-rank-test"),
    pytest.param({"H": 7, "W": 9}, {"least_of": 20}, id="larger-map-than-calibrated"),
    pytest.param({"H": 2, "W": 3}, {"least_of": 64}, id="smaller-map-than-calibrated"),
    pytest.param({"U": 70, "L": 90, "k": 30}, {"C": 70}, id="more-concepts-than-fit-a-word"),
    pytest.param({"threshold": detection.INF}, {}, id="no-candidate"),
    pytest.param({"B": 0}, {}, id="no-image"),
    pytest.param({"U": 0}, {}, id="no-latent"),
    pytest.param({"k": 40, "threshold": -1e9}, {"least": torch.full((3, 3), 2**62)}, id="never-enough"),
    pytest.param({}, {"least": torch.ones(3, 3, dtype=torch.int64)}, id="one-is-enough"),
]


@backends
@pytest.mark.parametrize(("sizes", "changes"), RUNS)
def test_the_mean_over_the_calls_decides(sizes, changes, backend, poisoned):
    for seed in range(3):
        calls = calls_of(seed=seed, **sizes)
        given = gate(calls[0], seed=seed, **changes)
        if "least" not in changes:
            given["least"] *= 10  # quarters, near what the means come to
        batch, concepts = calls[0]["x"].shape[0], given["least"].shape[1]
        counted = [[0] * (concepts + 1) for _ in range(batch)]
        masks, takens = run_by_hand(calls, given, counted)
        there, so_far = on_device(given), torch.zeros(batch, concepts + 1, dtype=torch.int64)
        so_far = on_device({"so_far": so_far})["so_far"]
        for arguments, mask, taken in zip(calls, masks, takens, strict=True):
            assert torch.equal(detection.detect(backend, **arguments, **there, so_far=so_far), mask)
            assert torch.equal(there["gated"].cpu(), taken)
        assert so_far.tolist() == counted


def test_the_runs_contain_late_finds_and_none():
    late = sums = 0
    for seed in range(3):
        calls = calls_of(seed=seed, B=4)
        given = gate(calls[0], seed=seed)
        given["least"] *= 10
        counted = [[0] * 4 for _ in range(4)]
        first, *later = (mask.any(1) for mask in run_by_hand(calls, given, counted)[0])
        late += int((~first & torch.stack(later).any(0)).sum())
        sums += sum(0 < value < FOUND for row in counted for value in row[:-1])
    assert late and sums


@backends
def test_what_was_found_is_treated_to_the_end_of_the_run(backend):
    """One patch in a later call is not enough by itself, but the concept was found before."""
    arguments = detection.inputs(U=1, threshold=5, k=0)
    needs = torch.full((3, 1), 8)
    given = on_device(gate(arguments, C=1, owners=torch.tensor([0]), least=needs))
    so_far = on_device({"so_far": torch.zeros(2, 2, dtype=torch.int64)})["so_far"]
    first = detection.detect(backend, **arguments, **given, so_far=so_far)
    assert first.sum(1).min() >= 2 and so_far[:, 0].tolist() == [FOUND] * 2
    faint = arguments | {"x": arguments["x"].clone()}
    faint["x"].flatten(2)[:, :, 1:] = 0
    faint["x"].flatten(2)[:, :, :1] = (
        arguments["x"]
        .flatten(2)
        .gather(2, first.int().argmax(1).view(2, 1, 1).expand(-1, faint["x"].shape[1], 1))
    )
    for _ in range(3):
        again = detection.detect(backend, **faint, **given, so_far=so_far)
        assert again.sum(1).tolist() == [1, 1]
    assert so_far.tolist() == [[FOUND, 4]] * 2
    alone = torch.zeros_like(so_far)
    assert not detection.detect(backend, **faint, **given, so_far=alone).any()


BAD = [
    pytest.param(torch.zeros(2, 3).long(), ValueError, r"so_far: .*\[B, C \+ 1\]", id="shape"),
    pytest.param(torch.zeros(2, 4), TypeError, "so_far: expected dtype int64", id="dtype"),
    pytest.param(torch.zeros(4, 2).long().t(), ValueError, "so_far: .*contiguous", id="strided"),
]


@backends
@pytest.mark.parametrize(("so_far", "error", "message"), BAD)
def test_bad_sums(so_far, error, message, backend):
    arguments = detection.inputs()
    with pytest.raises(error, match=message):
        ops.detect_patches(**arguments, **gate(arguments), so_far=so_far, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sums_without_a_gate(backend):
    sums = torch.zeros(2, 4).long()
    with pytest.raises(ValueError, match="owners: .*needs owners and least"):
        ops.detect_patches(**detection.inputs(), so_far=sums, backend=backend)


@backends
def test_sums_are_their_own_memory(backend):
    detection.needs_the_cpu(backend)
    arguments = detection.inputs(B=4)
    given = on_device(gate(arguments, C=3))
    shared = torch.zeros(4, 4, dtype=torch.int64)
    for changes in (
        {"so_far": shared, "gated": shared.view(-1)[:4]},
        {"so_far": shared, "deciding": shared.view(-1)[4:8]},
    ):
        with pytest.raises(RuntimeError, match="it is written, and shares memory"):
            ops.detect_patches(**on_device(arguments), **{**given, **changes}, backend=backend)


@backends
def test_opcheck_of_the_sums(backend):
    detection.needs_the_cpu(backend)
    arguments = detection.inputs(B=4)
    given = on_device(gate(arguments, deciding=True))
    sums = torch.zeros(4, 4, dtype=torch.int64)
    values = (*on_device(arguments).values(), None, *given.values(), sums)
    with torch.inference_mode():
        torch.library.opcheck(torch.ops.lbdt.detect_patches.default, values, {"backend": backend})
        if backend == "cpp":
            mask = torch.zeros(4, 20, dtype=torch.bool)
            torch.library.opcheck(torch.ops.lbdt.detect_patches_cpp.default, (*values, *4 * (None,), mask))


@backends
def test_fullgraph_of_the_sums(backend):
    detection.needs_the_cpu(backend)
    calls = calls_of(seed=8)
    given = gate(calls[0])
    given["least"] *= 10
    counted = [[0] * 4 for _ in range(2)]
    masks, _ = run_by_hand(calls, given, counted)
    there, given = on_device(calls[0]), on_device(given)
    room = torch.zeros(5, 4, dtype=torch.int64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def detect(x, bins, room):
        varied = {**there, "x": x * 1, "timestep_bin": bins}
        return ~ops.detect_patches(**varied, **given, so_far=room[:2], backend=backend)

    with torch.no_grad():
        for arguments, mask in zip(calls, masks, strict=True):
            assert torch.equal(~detect(arguments["x"], arguments["timestep_bin"], room).cpu(), mask)
    assert room[:2].tolist() == counted and not room[2:].any()

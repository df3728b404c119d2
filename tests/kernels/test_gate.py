"""The gate of detect_patches, on every backend, against loops: rows with too few patches of a concept are left."""

import pytest
import torch

from lbdt import ops
from tests.backends import every_backend, on_device
from tests.layouts import integers
from tests.ops import test_detect_patches as detection

backends = every_backend("cpp", "triton")


def gate(arguments, C=3, seed=0, deciding=False, **changes):
    """Random owners and needs of `arguments`' latents, about which half of the rows meet."""
    g = torch.Generator().manual_seed(seed)
    B, N = arguments["x"].shape[0], arguments["x"].shape[2:].numel()
    T, U = arguments["thresholds"].shape
    return {
        "owners": torch.randint(C, (U,), generator=g),
        "least": torch.randint(1, max(N // 3, 2), (T, C), generator=g),
        "least_of": 0,
        "deciding": torch.arange(B).flip(0) if deciding else None,
        "gated": torch.full((B,), -7),
    } | changes


def gated_by_hand(arguments, owners, least, least_of, deciding, gated=None):
    """The literal mask, row by row: (mask, taken)."""
    mask = detection.literal(**arguments)
    h = detection.pre_activations(*(arguments.get(name) for name in ("x", "weight", "bias", "minus")))
    floor = arguments["thresholds"][arguments["timestep_bin"]].masked_fill(
        ~arguments["enabled"], detection.INF
    )
    passing = (h[..., arguments["latents"]] > floor.unsqueeze(1)) & mask.unsqueeze(2)  # [B, N, U]
    batch, patches = mask.shape
    evidence = [
        [{int(owners[u]) for u in passing[b, p].nonzero()[:, 0]} for p in range(patches)]
        for b in range(batch)
    ]
    taken = torch.zeros(batch, dtype=torch.int64)
    for b, p in mask.nonzero().tolist():
        row = b if deciding is None else int(deciding[b])
        carried = set()
        for c in evidence[b][p]:
            needed = int(least[arguments["timestep_bin"][row], c])
            count = sum(c in found for found in evidence[row])
            if needed <= 1 or count >= needed * patches / (least_of or patches):
                carried.add(c)
        if not carried:
            mask[b, p] = False
            taken[b] += 1
    return mask, taken


GATES = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"B": 4}, {"deciding": True}, id="another-row-decides"),
    pytest.param({"B": 4, "k": 0, "threshold": 20}, {"deciding": True}, id="no-rank-test"),
    pytest.param({"H": 7, "W": 9}, {"least_of": 20}, id="larger-map-than-calibrated"),
    pytest.param({"H": 2, "W": 3}, {"least_of": 64}, id="smaller-map-than-calibrated"),
    pytest.param({"U": 40, "L": 40}, {"C": 11}, id="many-concepts"),
    pytest.param({"U": 70, "L": 90, "k": 30}, {"C": 70}, id="more-concepts-than-fit-a-word"),
    pytest.param({"d": 2, "L": 200, "k": 9, "U": 30}, {}, id="ties"),
    pytest.param({"threshold": detection.INF}, {}, id="no-candidate"),
    pytest.param({"B": 0}, {}, id="no-image"),
    pytest.param({"U": 0}, {}, id="no-latent"),
    pytest.param({"k": 40, "threshold": -1e9}, {"least": torch.full((3, 3), 2**62)}, id="never-enough"),
    pytest.param({}, {"least": torch.ones(3, 3, dtype=torch.int64)}, id="one-is-enough"),
    pytest.param(
        {"threshold": 25},
        {"least": torch.ones(3, 3, dtype=torch.int64), "least_of": 1},
        id="one-is-not-scaled",
    ),
]


@backends
@pytest.mark.parametrize(("sizes", "changes"), GATES)
def test_rows_with_too_few_patches_of_a_concept_are_left(sizes, changes, backend, poisoned):
    for seed in range(3):
        arguments = detection.inputs(seed=seed, **sizes)
        given = gate(arguments, seed=seed, **changes)
        expected, taken = gated_by_hand(arguments, **given)
        given = on_device(given)
        assert torch.equal(detection.detect(backend, **arguments, **given), expected)
        assert torch.equal(given["gated"].cpu(), taken)
        assert torch.equal(detection.detect(backend, **arguments, **{**given, "gated": None}), expected)


def test_the_rows_of_the_gate_contain_both_answers():
    arguments = detection.inputs(B=4)
    mask, taken = gated_by_hand(arguments, **gate(arguments, deciding=True))
    assert mask.any() and taken.any()


@backends
@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=str)
def test_a_concept_beside_it_takes_no_evidence_from_one(order, backend):
    """A latent of two concepts, of which the second has the lower threshold and needs a single patch: what it replaces
    alone it replaces beside the first, in any order."""
    arguments = detection.inputs(U=1, threshold=5, k=0)
    arguments["latents"] = arguments["latents"].repeat(2)
    arguments["thresholds"] = torch.cat([arguments["thresholds"], arguments["thresholds"] - 4], dim=1)[
        :, order
    ]
    needs = torch.tensor([[2**40, 1]] * 3)
    given = on_device(gate(arguments, C=2, owners=torch.tensor(order), least=needs))
    first = torch.tensor([owner == 0 for owner in order])
    masks = [
        detection.detect(backend, **arguments | {"enabled": enabled.expand(2, 2)}, **given)
        for enabled in (~first, first, torch.ones(2, dtype=torch.bool))
    ]
    assert masks[0].any() and not masks[1].any() and torch.equal(masks[0], masks[2])


@backends
def test_a_gate_of_the_update(backend):
    arguments = detection.inputs(seed=3)
    arguments["minus"] = integers(
        tuple(arguments["x"].shape), torch.Generator().manual_seed(5), torch.float32
    )
    given = gate(arguments)
    expected, _ = gated_by_hand(arguments, **given)
    assert torch.equal(detection.detect(backend, **arguments, **on_device(given)), expected)


BAD_GATES = [
    pytest.param({"owners": None}, ValueError, "owners: .*needs owners and least", id="no-owners"),
    pytest.param({"least": None}, ValueError, "least: .*needs owners and least", id="no-least"),
    pytest.param(
        {"owners": torch.zeros(4, dtype=torch.int64)}, ValueError, r"owners: .*\[U\]", id="owners-shape"
    ),
    pytest.param({"owners": torch.full((5,), 3)}, IndexError, r"owners: .*\[0, 3\)", id="owner-out-of-range"),
    pytest.param({"owners": torch.zeros(5)}, TypeError, "owners: expected dtype int64", id="owners-dtype"),
    pytest.param({"least": torch.ones(2, 3).long()}, ValueError, "least: .* T = 3", id="least-bins"),
    pytest.param({"least": torch.ones(3, 0).long()}, ValueError, r"least: .*C >= 1", id="no-concept"),
    pytest.param({"least": torch.ones(3, 3)}, TypeError, "least: expected dtype int64", id="least-dtype"),
    pytest.param({"least_of": -1}, ValueError, "least_of: expected 0 <= ", id="least-of-negative"),
    pytest.param({"deciding": torch.tensor([0, 2])}, IndexError, r"deciding: .*\[0, 2\)", id="no-such-row"),
    pytest.param({"deciding": torch.tensor([0])}, ValueError, r"deciding: .*\[B\]", id="deciding-shape"),
    pytest.param({"gated": torch.zeros(2)}, TypeError, "gated: expected dtype int64", id="gated-dtype"),
    pytest.param(
        {"gated": torch.zeros(2, 2).long()[:, 0]}, ValueError, "gated: .*contiguous", id="gated-strided"
    ),
]


@backends
@pytest.mark.parametrize(("change", "error", "message"), BAD_GATES)
def test_bad_gates(change, error, message, backend):
    arguments = detection.inputs()
    with pytest.raises(error, match=message):
        ops.detect_patches(**arguments, **{**gate(arguments), **change}, backend=backend)


@backends
def test_what_the_gate_writes_is_its_own_memory(backend):
    detection.needs_the_cpu(backend)
    arguments = detection.inputs()
    given = on_device(gate(arguments, deciding=True))
    with pytest.raises(RuntimeError, match="gated: it is written, and shares memory"):
        ops.detect_patches(**on_device(arguments), **{**given, "gated": given["deciding"]}, backend=backend)


@backends
def test_opcheck_of_the_gate(backend):
    detection.needs_the_cpu(backend)
    arguments = detection.inputs(B=4)
    given = on_device(gate(arguments, deciding=True))
    values = (*on_device(arguments).values(), None, *given.values())
    with torch.inference_mode():
        torch.library.opcheck(torch.ops.lbdt.detect_patches.default, values, {"backend": backend})
        if backend == "cpp":
            mask = torch.zeros(4, 20, dtype=torch.bool)
            torch.library.opcheck(torch.ops.lbdt.detect_patches_cpp.default, (*values, *5 * (None,), mask))


@backends
def test_fullgraph_of_the_gate(backend):
    detection.needs_the_cpu(backend)
    arguments = detection.inputs(seed=8)
    given = gate(arguments)
    expected, taken = gated_by_hand(arguments, **given)
    there, given = on_device(arguments), on_device(given)
    gated = given.pop("gated")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def detect(x, gated):
        return ~ops.detect_patches(**{**there, "x": x * 1}, **given, gated=gated, backend=backend)

    with torch.no_grad():
        assert torch.equal(~detect(there["x"], gated).cpu(), expected)
    assert torch.equal(gated.cpu(), taken)

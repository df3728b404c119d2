"""The PTX runner itself: instructions with known results, guarded memory, races that are there and that are not."""

import pytest
import torch

from tests.kernels.ptx.machine import Misuse, Stuck
from tests.kernels.ptx.memory import BadAccess
from tests.kernels.ptx.parsing import NotSupported
from tests.kernels.ptx.races import Race
from tests.kernels.ptx.snippets import run, value_of

LANES = torch.arange(32, dtype=torch.int32)
SEEDS = range(6)


def words(*values: int) -> torch.Tensor:
    """[32] int32 of `values` and zeros."""
    bits = [(value + 2**31) % 2**32 - 2**31 for value in values]
    return torch.tensor(bits + [0] * (32 - len(bits)), dtype=torch.int32)


VALUES = [
    # Instructions on %r10 and %r11, inputs, the first lanes' %r9.
    pytest.param("add.s32 %r9, %r10, %r11;", ([2**31 - 1], [1]), [-(2**31)], id="add-wraps"),
    pytest.param("div.s32 %r9, %r10, %r11;", ([7, -7, 7], [2, 2, -2]), [3, -3, -3], id="div-cuts-off"),
    pytest.param(
        "rem.s32 %r9, %r10, %r11;", ([7, -7, 7], [4, 4, -4]), [3, -3, 3], id="rem-has-the-sign-of-the-first"
    ),
    pytest.param("div.u32 %r9, %r10, %r11;", ([-2], [2]), [2**31 - 1], id="div-unsigned"),
    pytest.param("mul.hi.u32 %r9, %r10, %r11;", ([-1], [-1]), [-2], id="mul-hi"),
    pytest.param("mad.lo.s32 %r9, %r10, %r11, -5;", ([6, -6], [7, 7]), [37, -47], id="mad"),
    pytest.param(
        "mul.wide.s32 %rd1, %r10, %r11; shr.s64 %rd2, %rd1, 32; cvt.u32.u64 %r9, %rd2;",
        ([-(2**31)], [4]),
        [-2],
        id="mul-wide",
    ),
    pytest.param("shl.b32 %r9, %r10, %r11;", ([1, 1, 3], [31, 32, 100]), [-(2**31), 0, 0], id="shl-far"),
    pytest.param("shr.s32 %r9, %r10, %r11;", ([-8, -8, 8], [1, 40, 40]), [-4, -1, 0], id="shr-far"),
    pytest.param("bfe.s32 %r9, %r10, 4, 4;", ([0xF0, 0x70, 0x80],), [-1, 7, -8], id="bfe-signed"),
    pytest.param("bfe.u32 %r9, %r10, 28, 15;", ([-1],), [15], id="bfe-past-the-end"),
    pytest.param("bfi.b32 %r9, %r10, %r11, 8, 4;", ([0xFA], [-1]), [0xFFFFFAFF], id="bfi"),
    pytest.param("popc.b32 %r9, %r10;", ([-1, 5],), [32, 2], id="popc"),
    pytest.param("clz.b32 %r9, %r10;", ([0, 1, -1],), [32, 31, 0], id="clz"),
    pytest.param("bfind.u32 %r9, %r10;", ([0, 1, -1, 0x500],), [-1, 0, 31, 10], id="bfind"),
    pytest.param("bfind.shiftamt.u32 %r9, %r10;", ([0, 1, 0x500],), [-1, 31, 21], id="bfind-from-the-top"),
    pytest.param("prmt.b32 %r9, %r10, %r11, 0x7531;", ([0x44332211], [0x7766]), [0x00774422], id="prmt"),
    pytest.param("lop3.b32 %r9, %r10, %r11, 12, 0xE8;", ([10], [6]), [14], id="lop3-majority"),
    pytest.param("shf.l.wrap.b32 %r9, %r10, %r11, 8;", ([0x12345678], [0x01]), [0x112], id="funnel-shift"),
    pytest.param("cvt.s32.s8 %r9, %r10;", ([0x80, 0x7F],), [-128, 127], id="cvt-extends-the-sign"),
    pytest.param(
        "cvt.rzi.s32.f32 %r9, %r10;",
        ([0x4F800000, 0x7FC00000, 0xC0200000],),
        [2**31 - 1, 0, -2],
        id="cvt-saturates",
    ),
    pytest.param(
        "cvt.rn.bf16.f32 %rs1, %r10; cvt.u32.u16 %r9, %rs1;",
        ([0x3F808000, 0x3F818000],),
        [0x3F80, 0x3F82],
        id="bfloat16-ties-to-even",
    ),
    pytest.param("add.f32 %r9, %r10, %r11;", ([0x3F800000], [0x40000000]), [0x40400000], id="add-f32"),
    pytest.param(
        "fma.rn.f32 %r9, %r10, %r10, %r11;", ([0x3F800001], [0xBF800000]), [0x34800000], id="fma-rounds-once"
    ),
    pytest.param("max.f32 %r9, %r10, %r11;", ([0x7FC00000], [0x3F800000]), [0x3F800000], id="max-drops-nan"),
    pytest.param(
        "setp.ltu.f32 %p1, %r10, %r11; selp.b32 %r9, 1, 2, %p1;",
        ([0x7FC00000, 0x40000000, 0x3F800000], [0x3F800000] * 3),
        [1, 2, 2],
        id="unordered-comparison",
    ),
    pytest.param(
        "mov.b32 {%rs1, %rs2}, %r10; mov.b32 %r9, {%rs2, %rs1};",
        ([0x11112222],),
        [0x22221111],
        id="mov-unpacks",
    ),
    pytest.param("neg.f16x2 %r9, %r10;", ([0x3C003C00],), [-0x43FF4400], id="neg-pair"),
]


@pytest.mark.parametrize("instructions, inputs, expected", VALUES)
def test_an_instruction_has_its_known_result(instructions, inputs, expected):
    got = value_of(instructions, *(words(*values) for values in inputs))
    assert got[: len(expected)].tolist() == words(*expected)[: len(expected)].tolist()


EXCHANGES = [
    pytest.param("shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;", LANES ^ 5, id="butterfly"),
    pytest.param("shfl.sync.up.b32 %r9, %r1, 3, 0, -1;", torch.where(LANES < 3, LANES, LANES - 3), id="up"),
    pytest.param(
        "shfl.sync.down.b32 %r9, %r1, 3, 31, -1;", torch.where(LANES > 28, LANES, LANES + 3), id="down"
    ),
    pytest.param("shfl.sync.idx.b32 %r9, %r1, 1, 6175, -1;", LANES // 8 * 8 + 1, id="index-in-eighths"),
    pytest.param(
        "setp.gt.u32 %p1, %r1, 29; vote.sync.ballot.b32 %r9, %p1, -1;",
        torch.full_like(LANES, -(2**30)),
        id="ballot",
    ),
    pytest.param(
        "setp.gt.u32 %p1, %r1, 30; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;",
        torch.ones_like(LANES),
        id="any",
    ),
    pytest.param("redux.sync.add.s32 %r9, %r1, -1;", torch.full_like(LANES, 496), id="sum"),
    pytest.param("mov.u32 %r6, %laneid; sub.s32 %r9, %r6, %r1;", torch.zeros_like(LANES), id="lane"),
]


@pytest.mark.parametrize("instructions, expected", EXCHANGES)
def test_lanes_exchange(instructions, expected):
    assert torch.equal(value_of(instructions), expected)


def test_lanes_that_part_meet_again():
    """A loop of as many rounds as the lane's number, behind it an instruction for all."""
    body = """
      mov.b32 %r6, 0; mov.b32 %r7, 0;
    $loop:
      setp.ge.s32 %p1, %r6, %r1; @%p1 bra $end;
      add.s32 %r6, %r6, 1; add.s32 %r7, %r7, %r6; bra.uni $loop;
    $end:
      redux.sync.max.s32 %r8, %r7, -1; sub.s32 %r9, %r8, %r7;"""
    sums = LANES * (LANES + 1) // 2
    assert torch.equal(value_of(body), sums.max() - sums)


STORE = "st.shared.b32 [%r5], %r1;"
NEIGHBOUR = "xor.b32 %r6, %r3, 128; add.s32 %r6, %r4, %r6; ld.shared.b32 %r9, [%r6];"
OUT = "st.global.b32 [%rd20], %r9;"


@pytest.mark.parametrize("seed", SEEDS)
def test_what_another_warp_wrote_is_read_behind_a_barrier_and_not_without(seed):
    out = torch.zeros(64, dtype=torch.int32)
    run(f"{STORE} bar.sync 0; {NEIGHBOUR} {OUT}", out, threads=64, seed=seed)
    assert torch.equal(out, torch.arange(64, dtype=torch.int32) ^ 32)
    # Whichever warp runs first, nothing orders the two.
    with pytest.raises((Race, BadAccess), match="orders|nobody wrote"):
        run(f"{STORE} {NEIGHBOUR} {OUT}", out, threads=64, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_memory_is_not_overwritten_before_it_is_read(seed):
    body = f"{STORE} bar.sync 0; {NEIGHBOUR} {{}} st.shared.b32 [%r5], 7; {OUT}"
    out = torch.zeros(64, dtype=torch.int32)
    run(body.format("bar.sync 0;"), out, threads=64, seed=seed)
    assert torch.equal(out, torch.arange(64, dtype=torch.int32) ^ 32)
    with pytest.raises(Race, match="reads"):
        run(body.format(""), out, threads=64, seed=seed)


COPY = "cp.async.ca.shared.global [%r5 + 0], [%rd21 + 0], 0x4; cp.async.commit_group;"


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_are_there_when_they_were_waited_for(seed):
    out, given = torch.zeros(64, dtype=torch.int32), torch.arange(100, 164, dtype=torch.int32)
    run(f"{COPY} cp.async.wait_group 0; bar.sync 0; {NEIGHBOUR} {OUT}", out, given, threads=64, seed=seed)
    assert torch.equal(out, given.view(2, 32).flip(0).flatten())
    for weaker in ("cp.async.wait_group 1; bar.sync 0;", "bar.sync 0;", "cp.async.wait_group 0;"):
        with pytest.raises((Race, BadAccess)):
            run(f"{COPY} {weaker} {NEIGHBOUR} {OUT}", out, given, threads=64, seed=seed)


def test_a_copy_of_nothing_fills_with_zeros():
    given = LANES + 1
    body = "setp.lt.s32 %p1, %r1, 20; selp.b32 %r6, 4, 0, %p1; add.s64 %rd30, %rd21, 0;"
    body += "cp.async.ca.shared.global [%r5 + 0], [%rd30 + 0], 0x4, %r6; cp.async.wait_all;"
    assert torch.equal(
        value_of(f"{body} ld.shared.b32 %r9, [%r5];", given), torch.where(LANES < 20, given, 0)
    )


MAILBOX = """
  add.s32 %r6, %r4, 512;
  setp.eq.s32 %p1, %r1, 0; @%p1 mbarrier.init.shared::cta.b64 [%r6], 64;
  bar.sync 0;
  {store}
  mbarrier.arrive.shared::cta.b64 _, [%r6];
  {{
    .reg .pred done;
    again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r6], {parity};
    @!done bra again;
  }}
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_an_mbarrier_orders_what_was_before_its_arrivals(seed):
    out = torch.zeros(64, dtype=torch.int32)
    body = f"{MAILBOX} {NEIGHBOUR} {OUT}"
    run(body.format(store=STORE, parity=0), out, threads=64, seed=seed)
    assert torch.equal(out, torch.arange(64, dtype=torch.int32) ^ 32)
    # The phase before the first one counts as over.
    with pytest.raises((Race, BadAccess)):
        run(body.format(store=STORE, parity=1), out, threads=64, seed=seed)
    with pytest.raises((Race, BadAccess)):
        unready = body.replace("bar.sync 0;", "")
        run(unready.format(store=STORE, parity=0), out, threads=64, seed=seed)


REFUSED = [
    pytest.param("ld.shared.b32 %r9, [%r5];", BadAccess, "nobody wrote", id="unwritten"),
    pytest.param("st.shared.b32 [%r5+1022], %r1;", BadAccess, "not a multiple of 4", id="misaligned"),
    pytest.param("st.shared.b32 [%r5+1000], %r1;", BadAccess, "which has 1024", id="past-shared-memory"),
    pytest.param("ld.global.b32 %r9, [%rd20+4];", BadAccess, "outside of every argument", id="past-a-tensor"),
    pytest.param(
        "ld.global.b32 %r9, [%rd20+-4];", BadAccess, "outside of every argument", id="before-a-tensor"
    ),
    pytest.param("st.global.b64 [%rd20], %rd20;", BadAccess, "not a multiple of 8", id="wide-and-misaligned"),
    pytest.param("mov.b64 %rd1, 0; ld.global.b32 %r9, [%rd1];", BadAccess, "global memory", id="null"),
    pytest.param("st.shared.b32 [%r4], %r1;", Misuse, "different values", id="lanes-write-different-values"),
    pytest.param(
        "setp.eq.s32 %p1, %r1, 0; @%p1 bar.sync 0;", Misuse, "part of the warp", id="barrier-of-some-lanes"
    ),
    pytest.param(
        "setp.eq.s32 %p1, %r1, 0; @%p1 shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;",
        Misuse,
        "part of the",
        id="shuffle-of-some-lanes",
    ),
    pytest.param(
        "sin.approx.f32 %r9, %r1;", NotSupported, "sin.approx.f32 %r9, %r1", id="unknown-instruction"
    ),
    pytest.param("mov.u32 %r9, %smid;", NotSupported, "%smid", id="unknown-register"),
]


@pytest.mark.parametrize("body, error, match", REFUSED)
def test_what_is_wrong_is_refused_by_name(body, error, match):
    with pytest.raises(error, match=match):
        run(body, torch.zeros(32, dtype=torch.int32))


def test_a_barrier_that_a_warp_does_not_reach_is_told():
    with pytest.raises(Stuck, match="warp 0 of block 0 waits at bar.sync 0.*warp 1 of block 0 is done"):
        run("setp.ge.s32 %p1, %r1, 32; @%p1 bra $end; bar.sync 0; $end:", threads=64)


BLOCKS = [
    # What blocks do to one word each of a tensor of 32, whether it is a race.
    pytest.param("st.global.b32 [%rd20], %r2;", True, id="different-values"),
    pytest.param("st.global.b32 [%rd20], 5;", False, id="the-same-value"),
    pytest.param("red.global.gpu.relaxed.add.u32 [%rd20], 1;", False, id="atomics"),
    pytest.param(
        "ld.global.b32 %r9, [%rd20]; red.global.gpu.relaxed.add.u32 [%rd20], 1;", True, id="read-and-atomic"
    ),
    pytest.param(
        "ld.volatile.global.b32 %r9, [%rd20]; red.global.gpu.relaxed.add.u32 [%rd20], 1;",
        False,
        id="volatile-read",
    ),
]


@pytest.mark.parametrize("body, raced", BLOCKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_write_to_one_place(body, raced, seed):
    out = torch.full((32,), 9, dtype=torch.int32)
    if raced:
        with pytest.raises(Race, match="block"):
            run(body, out, grid=(3,), seed=seed)
    else:
        run(body, out, grid=(3,), seed=seed)


@pytest.mark.parametrize("order, raced", [("acq_rel", False), ("relaxed", True)])
def test_an_atomic_hands_on_what_its_order_says(order, raced):
    """The block that comes second reads what the first one wrote before its atomic."""
    body = f"""
      atom.global.gpu.{order}.add.u32 %r7, [%rd11], 0;
      setp.eq.s32 %p2, %r7, 32; @%p2 bra $second;
      st.global.b32 [%rd20], %r1;
      red.global.gpu.{order}.add.u32 [%rd11], 1;
      ret;
    $second:
      ld.global.b32 %r9, [%rd20]; st.global.b32 [%rd22], %r9;"""
    handed_on = races = 0
    for seed in range(30):
        written, arrived, read = (
            torch.full((n,), value, dtype=torch.int32) for n, value in ((32, -1), (1, 0), (32, 0))
        )
        try:
            run(body, written, arrived, read, grid=(2,), seed=seed)
        except Race:
            races += 1
        else:
            handed_on += torch.equal(read, LANES)
    assert (races > 0, handed_on > 0) == (raced, not raced)


def test_outputs_keep_their_strides_and_the_bytes_between():
    whole = torch.full((3, 40), 7, dtype=torch.int32)
    run("st.global.b32 [%rd20], %r1;", whole[1, 4:36])
    assert torch.equal(whole[1, 4:36], LANES)
    assert (whole[[0, 2]] == 7).all() and (whole[1, :4] == 7).all() and (whole[1, 36:] == 7).all()

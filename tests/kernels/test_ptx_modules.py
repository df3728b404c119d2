"""What nvcc's PTX has that Triton's has not, in modules written by hand: entries, structs, variables, reductions."""

import re
import struct

import pytest
import torch

from tests.kernels.ptx.instructions import prepare
from tests.kernels.ptx.machine import Launch, Misuse
from tests.kernels.ptx.memory import BadAccess, GlobalMemory
from tests.kernels.ptx.parsing import NotSupported, Program, entries
from tests.kernels.ptx.races import Race

MODULE = """
.version 8.7
.target sm_90
.address_size 64

.shared .align 4 .b8 totals[8];
.extern .shared .align 16 .b8 dynamic[];

.entry first_kernel(
  .param .u64 first_kernel_param_0,
  .param .align 8 .b8 first_kernel_param_1[24]
)
.maxntid 64, 1, 1
{
  .reg .pred %p<8>;
  .reg .b32 %r<32>;
  .reg .b64 %rd<32>;
  .shared .align 4 .u32 one;
  ld.param.u64 %rd1, [first_kernel_param_0];
  mov.b64 %rd2, first_kernel_param_1;
  add.s64 %rd3, %rd2, 16;
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd4, %r1, 4;
  add.s64 %rd5, %rd1, %rd4;
  mov.u32 %r9, 0;
$BODY
  st.global.u32 [%rd5], %r9;
  ret;
}

.visible .entry second_kernel()
.maxntid 32, 1, 1
{
  ret;
}
"""
LANES = torch.arange(64, dtype=torch.int32)
GIVEN = struct.pack("<qiiiB3x", 7, 5, -6, 40, 200)


def run(body: str, given: bytes = GIVEN, seed: int = 0, dynamic: int = 64) -> torch.Tensor:
    """%r9 [64] int32 of the threads of two warps, which find their place at %rd5, the struct at %rd2, 16 behind it at
    %rd3."""
    out = torch.full((64,), -1, dtype=torch.int32)
    memory = GlobalMemory([out])
    program = Program(entries(MODULE.replace("$BODY", body))["first_kernel"])
    arguments = [memory.translated(struct.pack("<Q", out.data_ptr())), given]
    shared = program.static_bytes + dynamic
    Launch(program, prepare(program), (1,), shared, arguments, memory, seed).run()
    memory.copy_back()
    return out


def test_a_module_has_its_entries_each_with_what_all_share():
    found = entries(MODULE.replace("$BODY", ""))
    assert list(found) == ["first_kernel", "second_kernel"]
    first, second = (Program(ptx) for ptx in found.values())
    assert (first.threads, second.threads) == (64, 32)
    assert set(first.shared) == {"totals", "dynamic", "one"} and set(second.shared) == {"totals", "dynamic"}
    assert [tuple(p) for p in first.parameters.values()] == [(0, 0, 8), (1, 8, 24)] and not second.parameters


@pytest.mark.parametrize(
    "load, expected",
    [
        pytest.param("ld.param.u32 %r9, [first_kernel_param_1];", 7, id="first-member"),
        pytest.param("ld.param.v2.u32 {%r8, %r9}, [%rd3+-8];", -6, id="pair-from-a-register"),
        pytest.param("ld.param.u8 %r9, [%rd3+4];", 200, id="byte"),
        pytest.param("ld.param.s8 %r9, [%rd3+4];", -56, id="signed-byte"),
        pytest.param("@%p1 ld.param.u32 %r9, [%rd3];", 0, id="no-lane"),
    ],
)
def test_members_of_a_struct(load, expected):
    assert torch.equal(run(f"setp.eq.u32 %p1, %r1, 99;\n{load}"), torch.full_like(LANES, expected))


@pytest.mark.parametrize(
    "body, message",
    [
        pytest.param("ld.param.u32 %r9, [%rd3+8];", "which has 32", id="past-the-struct"),
        pytest.param("ld.param.u64 %rd9, [%rd3+4];", "is not a multiple of 8", id="misaligned-member"),
        pytest.param("st.shared.u32 [one+4], %r9;", "outside of every variable", id="past-a-variable"),
        pytest.param("ld.shared.u32 %r9, [totals+8];", "outside of every variable", id="past-an-array"),
        pytest.param("st.shared.u32 [dynamic+64], %r9;", "which has", id="past-the-dynamic-part"),
    ],
)
def test_what_lies_beside_is_refused(body, message):
    with pytest.raises(BadAccess, match=re.escape(message)):
        run(body)


def test_an_argument_has_the_bytes_of_its_parameter():
    with pytest.raises(BadAccess, match="parameter 1 has 24 bytes, got 16"):
        run("", given=GIVEN[:16])


def test_only_addresses_of_tensors_are_translated():
    tensor = torch.zeros(8)
    memory = GlobalMemory([tensor])
    host = struct.pack("<QqQi", tensor.data_ptr() + 12, -1, 64, 3)
    here = struct.pack("<QqQi", memory.address(tensor) + 12, -1, 64, 3)
    assert memory.translated(host) == here


REDUCTIONS = [
    # Of whether a thread's number is 40, below 64, and above 30.
    pytest.param("bar.red.or.pred %p2, 0, %p1; selp.u32 %r9, 1, 0, %p2;", 40, "eq", 1, id="or"),
    pytest.param("bar.red.and.pred %p2, 0, %p1; selp.u32 %r9, 1, 0, %p2;", 64, "lt", 1, id="and"),
    pytest.param("bar.red.and.pred %p2, 0, %p1; selp.u32 %r9, 1, 0, %p2;", 30, "gt", 0, id="and-of-not-all"),
    pytest.param("bar.red.popc.u32 %r9, 0, %p1;", 30, "gt", 33, id="count"),
]


@pytest.mark.parametrize("reduction, than, comparison, expected", REDUCTIONS)
def test_a_barrier_reduces(reduction, than, comparison, expected):
    for seed in range(3):
        got = run(f"setp.{comparison}.u32 %p1, %r1, {than};\n{reduction}", seed=seed)
        assert torch.equal(got, torch.full_like(LANES, expected))


HAND_OVER = """
  shl.b32 %r2, %r1, 2; and.b32 %r2, %r2, 4; shr.u32 %r3, %r1, 5; shl.b32 %r3, %r3, 2;
  mov.u32 %r4, totals; add.s32 %r5, %r4, %r3; add.s32 %r6, %r4, %r2; and.b32 %r7, %r1, 31;
  setp.eq.u32 %p1, %r7, 0; @%p1 st.shared.u32 [%r5], %r1;
  {barrier} ld.shared.u32 %r9, [%r6];
"""


def test_a_reduction_is_a_barrier():
    got = run(HAND_OVER.format(barrier="bar.red.or.pred %p2, 0, %p1;"))
    assert torch.equal(got, LANES % 2 * 32)
    with pytest.raises((Race, BadAccess)):
        run(HAND_OVER.format(barrier=""))


def test_a_reduction_does_not_meet_another_barrier():
    with pytest.raises(Misuse, match="with other instructions"):
        run("""setp.lt.u32 %p1, %r1, 32; @%p1 bra $sync;
          bar.red.or.pred %p2, 0, %p1; bra $end;
        $sync:
          bar.sync 0;
        $end:""")


def test_a_reduction_of_a_part_of_the_block_is_named():
    with pytest.raises(NotSupported, match="over the whole block"):
        run("bar.red.or.pred %p2, 0, 32, %p1;")


def test_generic_addresses_of_parameters_are_named():
    with pytest.raises(NotSupported, match="generic addresses of parameters"):
        run("cvta.param.u64 %rd9, %rd2;")

"""The PTX runner's matrix instructions by themselves, and what has to stand around asynchronous ones."""

import pytest
import torch

from tests.kernels.ptx.machine import Misuse
from tests.kernels.ptx.memory import BadAccess
from tests.kernels.ptx.races import Race
from tests.kernels.ptx.snippets import run


def integers(*shape: int, dtype=torch.float16, high: int = 4) -> torch.Tensor:
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


MMA = """
  shl.b32 %r6, %r1, 4; add.s32 %r7, %r4, %r6;
  mul.wide.u32 %rd30, %r1, 16; add.s64 %rd31, %rd11, %rd30;
  ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd31];
  st.shared.v4.b32 [%r7], {{%r20, %r21, %r22, %r23}};
  setp.lt.s32 %p1, %r1, 16; add.s64 %rd32, %rd12, %rd30;
  @%p1 ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd32];
  @%p1 st.shared.v4.b32 [%r7+512], {{%r20, %r21, %r22, %r23}};
  bar.sync 0;
  // A row of A takes 32 bytes: lanes 0 to 15 name its rows' first halves, the others the second ones.
  and.b32 %r8, %r1, 15; shl.b32 %r8, %r8, 5; shr.u32 %r30, %r1, 4; shl.b32 %r30, %r30, 4;
  add.s32 %r8, %r8, %r30; add.s32 %r8, %r4, %r8;
  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r8];
  and.b32 %r8, %r1, 7; shl.b32 %r8, %r8, 5; bfe.u32 %r30, %r1, 3, 1; shl.b32 %r30, %r30, 4;
  add.s32 %r8, %r8, %r30; add.s32 %r8, %r4, %r8;
  ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r14, %r15}}, [%r8+512];
  mov.b32 %r16, {one}; mov.b32 %r17, {one}; mov.b32 %r18, {one}; mov.b32 %r19, {one};
  mma.sync.aligned.{shape}.row.col.{types}
    {{%r16, %r17, %r18, %r19}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}};
  shr.u32 %r8, %r1, 2; and.b32 %r9, %r1, 3; shl.b32 %r8, %r8, 5; shl.b32 %r9, %r9, 3; add.s32 %r8, %r8, %r9;
  cvt.u64.u32 %rd33, %r8; add.s64 %rd34, %rd10, %rd33;
  st.global.v2.b32 [%rd34], {{%r16, %r17}}; st.global.v2.b32 [%rd34+256], {{%r18, %r19}};
"""


@pytest.mark.parametrize(
    "dtype, shape, types, one",
    [
        pytest.param(torch.float16, "m16n8k16", "f32.f16.f16.f32", "0f3F800000", id="float16"),
        pytest.param(torch.bfloat16, "m16n8k16", "f32.bf16.bf16.f32", "0f3F800000", id="bfloat16"),
        pytest.param(torch.int8, "m16n8k32", "s32.s8.s8.s32", "1", id="int8"),
    ],
)
def test_a_product_of_matrices_that_ldmatrix_loaded(dtype, shape, types, one):
    k = 32 if dtype == torch.int8 else 16
    a, b = integers(16, k, dtype=dtype), integers(8, k, dtype=dtype)
    out = torch.zeros(16, 8, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    run(MMA.format(shape=shape, types=types, one=one), out, a, b)
    assert torch.equal(out, (a.float() @ b.float().t() + 1).to(out.dtype))


def test_ldmatrix_transposes():
    given = torch.arange(64, dtype=torch.int16)
    out = torch.zeros(32, dtype=torch.int32)
    body = """
      ld.global.b32 %r9, [%rd21]; st.shared.b32 [%r5], %r9; bar.sync 0;
      and.b32 %r8, %r1, 7; shl.b32 %r8, %r8, 4; add.s32 %r8, %r4, %r8;
      ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r10}, [%r8]; st.global.b32 [%rd20], %r10;"""
    run(body, out, given)
    assert torch.equal(out.view(torch.int16).view(8, 8), given.view(8, 8).t())


def cores(matrix: torch.Tensor) -> torch.Tensor:
    """A [rows, 16] matrix as wgmma takes it without a swizzle: parts of 8 x 8, those of 8 rows side by side."""
    return matrix.view(-1, 8, 2, 8).transpose(1, 2).contiguous()


FENCE, BARRIER, REGISTERS, WAIT = (
    "fence.proxy.async.shared::cta;",
    "bar.sync 0;",
    "wgmma.fence.sync.aligned;",
    "wgmma.wait_group.sync.aligned 0;",
)
# Shared memory begins at 1024: A there, in steps of 128 bytes along k and 256 along its rows, B 2048 bytes on.
A, B = 64 | 8 << 16 | 16 << 32, 192 | 8 << 16 | 16 << 32
WGMMA = f"""
  shl.b32 %r6, %r1, 4; add.s32 %r7, %r4, %r6;
  mul.wide.u32 %rd30, %r1, 16; add.s64 %rd31, %rd11, %rd30; add.s64 %rd32, %rd12, %rd30;
  setp.lt.s32 %p1, %r1, 16; mov.pred %p2, -1; mov.b64 %rd1, {A}; mov.b64 %rd2, {B};
  ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd31]; st.shared.v4.b32 [%r7], {{%r20, %r21, %r22, %r23}};
  @%p1 ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd32];
  @%p1 st.shared.v4.b32 [%r7+2048], {{%r20, %r21, %r22, %r23}};
  mov.b32 %r10, 0f3F800000; mov.b32 %r11, 0f3F800000; mov.b32 %r12, 0f3F800000; mov.b32 %r13, 0f3F800000;
  {FENCE} {BARRIER} {REGISTERS}
  wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r10, %r11, %r12, %r13}}, %rd1, %rd2, %p2, 1, 1, 0, 0;
  wgmma.commit_group.sync.aligned;
  {WAIT}
  shr.u32 %r8, %r1, 5; shl.b32 %r8, %r8, 9; and.b32 %r30, %r1, 31; shr.u32 %r31, %r30, 2; and.b32 %r32, %r30, 3;
  shl.b32 %r31, %r31, 5; shl.b32 %r32, %r32, 3; add.s32 %r8, %r8, %r31; add.s32 %r8, %r8, %r32;
  cvt.u64.u32 %rd33, %r8; add.s64 %rd34, %rd10, %rd33;
  st.global.v2.b32 [%rd34], {{%r10, %r11}}; st.global.v2.b32 [%rd34+256], {{%r12, %r13}};
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_product_of_a_warp_group(seed):
    a, b, out = integers(64, 16), integers(8, 16), torch.zeros(64, 8)
    run(WGMMA, out, cores(a), cores(b), threads=128, shared=2304, seed=seed)
    assert torch.equal(out, a.float() @ b.float().t() + 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "without, error, match",
    [
        pytest.param(FENCE, Race, "products.*nothing orders", id="proxy-fence"),
        pytest.param(BARRIER, (Race, BadAccess), "products.*nothing orders|nobody wrote", id="barrier"),
        pytest.param(REGISTERS, Misuse, "no wgmma.fence", id="register-fence"),
        pytest.param(WAIT, Misuse, "not waited for", id="wait"),
    ],
)
def test_what_a_product_needs_around_it(without, error, match, seed):
    tensors = torch.zeros(64, 8), cores(integers(64, 16)), cores(integers(8, 16))
    with pytest.raises(error, match=match):
        run(WGMMA.replace(without, ""), *tensors, threads=128, shared=2304, seed=seed)


def test_registers_that_are_written_behind_the_fence_are_told():
    """Against the rules, and seen by ptxas, which then waits for each product."""
    tensors = torch.zeros(64, 8), cores(integers(64, 16)), cores(integers(8, 16))
    late = WGMMA.replace(REGISTERS, f"{REGISTERS} mov.b32 %r10, 0f3F800000;")
    assert not run(WGMMA, *tensors, threads=128, shared=2304).serialised
    assert run(late, *tensors, threads=128, shared=2304).serialised


def test_an_operand_outside_of_shared_memory_is_refused():
    tensors = torch.zeros(64, 8), cores(integers(64, 16)), cores(integers(8, 16))
    with pytest.raises(BadAccess, match="outside of the 2304 bytes"):
        run(WGMMA.replace(f"%rd2, {B}", f"%rd2, {B + 4}"), *tensors, threads=128, shared=2304)

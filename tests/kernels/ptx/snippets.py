"""PTX written by hand, for the tests of the runner itself."""

import torch

from tests.kernels.ptx.instructions import prepare
from tests.kernels.ptx.machine import Launch
from tests.kernels.ptx.memory import GlobalMemory
from tests.kernels.ptx.parsing import Program

_HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet(
{parameters}
)
.reqntid {threads}
{{
  .reg .pred %p<32>;
  .reg .b16 %rs<64>;
  .reg .b32 %r<256>;
  .reg .b64 %rd<128>;
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  shl.b32 %r3, %r1, 2;
  mov.u32 %r4, global_smem;
  add.s32 %r5, %r4, %r3;
"""


def run(
    body: str,
    *tensors: torch.Tensor,
    threads: int = 32,
    grid: tuple[int, ...] = (1,),
    shared: int = 1024,
    seed: int = 0,
    copies_need_fence: bool = True,
) -> Launch:
    """Runs `body` on the tensors, which it finds at %rd10, %rd11, ...

    Set before it: %r1 the thread, %r2 the block, %r3 four times the thread, %r4 shared memory, %r5 the thread's word in
    it; %rd20, %rd21, ... the thread's own 4 bytes of each tensor.
    """
    parameters = ",\n".join(f"  .param .u64 .ptr .global .align 1 p{place}" for place in range(len(tensors)))
    begin = "".join(
        f"  ld.param.b64 %rd{10 + place}, [p{place}];\n  mul.wide.u32 %rd99, %r1, 4;\n"
        f"  add.s64 %rd{20 + place}, %rd{10 + place}, %rd99;\n"
        for place in range(len(tensors))
    )
    program = Program(f"{_HEAD.format(parameters=parameters, threads=threads)}{begin}{body}\n  ret;\n}}\n")
    memory = GlobalMemory(list(tensors))
    launch = Launch(
        program,
        prepare(program),
        grid,
        shared,
        [memory.address(tensor) for tensor in tensors],
        memory,
        seed,
        copies_need_fence,
    )
    launch.run()
    memory.copy_back()
    return launch


def value_of(instructions: str, *inputs: torch.Tensor) -> torch.Tensor:
    """%r9 [32] int32 of each lane after `instructions`, which find the lane's words of the inputs in %r10, %r11, ..."""
    out = torch.zeros(32, dtype=torch.int32)
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%rd{21 + i}];\n" for i in range(len(inputs)))
    run(f"{loads}{instructions}\nst.global.b32 [%rd20], %r9;", out, *inputs)
    return out

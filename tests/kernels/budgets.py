"""What the machine code of the kernels is today on sm_90, as budgets: none may get worse unnoticed.

A row that gets better is written anew; one that gets worse needs a reason. By the version of Triton that compiles: the
pinned one, and the oldest supported one, which machines with GPUs carry.
"""

from typing import NamedTuple


class Budget(NamedTuple):
    """Of one launch; loads and waits are those of the innermost loop with products (`tests.kernels.sass.Code`)."""

    case: str
    """A case of `tests.kernels.compile_triton`."""
    kernel: str
    registers: int
    """A thread, at most."""
    blocks: int
    """A multiprocessor holds at a time, at least."""
    product: str
    """The matrix instruction; FFMA: none, empty: no products."""
    loads: int
    """Elements loaded one by one, at most; of a loop over channels that is unrolled, those of a tile too."""
    products_in_flight: int
    """Groups that the wait leaves, at least."""
    copies_in_flight: int
    """As `products_in_flight`; -1: no asynchronous copies."""


_B1, _B8 = "detect_patches sd15-b1 channels_last bfloat16", "detect_patches sd15-b8 NCHW float16"
_FLOAT, _UPDATE = "detect_patches sd15-b1 NCHW float32", "detect_patches sdxl-1024 update bfloat16"
_GATED, _TOPK = "detect_patches gated over calls bfloat16", "encode_topk sd15-b8 NCHW float16"
_SCREENED = "detect_patches screened sd15-b8 NCHW float16"
_SCREENED_UPDATE = "detect_patches screened sdxl-1024 update bfloat16"
_CODE, _SCREEN, _PAIRS = (f"detect_patches_{name}_kernel" for name in ("code", "screen", "pairs"))
_CANDIDATES, _COUNT = "detect_patches_candidates_kernel", "detect_patches_count_kernel"
_GATE, _PART, _MERGE = "detect_patches_gate_kernel", "encode_topk_part_kernel", "encode_topk_merge_kernel"
_RECORD, _UNIFORM, _STEP = "record_patches", "patch_uniform", "erase_step sd15-b1 NCHW float16"
_RUN = "erase_step sdxl-1024 update channels_last bfloat16"
_ROWS, _KEEP = "erase_step_rows_kernel", "erase_step_keep_kernel"

BUDGETS = {
    (3, 9): (
        #      case      kernel     registers, blocks, product, loads, products and copies in flight
        Budget(_B8, _CANDIDATES, 194, 2, "HGMMA.64x64x16.F32", 0, 1, 4),
        Budget(_B8, _COUNT, 228, 1, "HGMMA.64x256x16.F32", 0, 1, 2),
        Budget(_B1, _CANDIDATES, 150, 3, "HGMMA.64x64x16.F32.BF16", 0, 1, 4),
        Budget(_B1, _COUNT, 228, 1, "HGMMA.64x256x16.F32.BF16", 0, 1, 2),
        Budget(_FLOAT, _CANDIDATES, 96, 5, "FFMA", 0, 0, 2),
        Budget(_FLOAT, _COUNT, 238, 1, "FFMA", 0, 0, 2),
        Budget(_UPDATE, _CANDIDATES, 207, 2, "HGMMA.64x64x16.F32.BF16", 0, 2, 6),
        Budget(_UPDATE, _COUNT, 231, 1, "HGMMA.64x256x16.F32.BF16", 0, 1, 2),
        Budget(_SCREENED, _CODE, 161, 3, "FFMA", 0, 0, -1),
        Budget(_SCREENED, _SCREEN, 246, 1, "IGMMA.64x128x32.S8.S8", 0, 0, 2),
        Budget(_SCREENED, _PAIRS, 238, 1, "FFMA", 0, 0, -1),
        Budget(_SCREENED, _COUNT, 221, 1, "HGMMA.64x256x16.F32", 0, 1, 2),
        Budget(_SCREENED_UPDATE, _CODE, 161, 3, "FFMA", 0, 0, -1),
        Budget(_SCREENED_UPDATE, _PAIRS, 243, 1, "FFMA", 0, 0, -1),
        Budget(_SCREENED_UPDATE, _COUNT, 226, 1, "HGMMA.64x256x16.F32.BF16", 0, 1, 2),
        Budget(_GATED, _GATE, 42, 10, "", 24, 0, -1),
        Budget(_TOPK, _PART, 143, 3, "HGMMA.64x32x16.F32", 2, 0, 0),
        Budget(_TOPK, _MERGE, 40, 12, "", 0, 0, -1),
        Budget(_RECORD, f"{_RECORD}_kernel", 92, 5, "", 1, 0, -1),
        Budget(_UNIFORM, f"{_UNIFORM}_kernel", 22, 16, "", 2, 0, -1),
        Budget(_STEP, _ROWS, 58, 4, "", 8, 0, -1),
        Budget(_RUN, _KEEP, 30, 64, "", 1, 0, -1),
    ),
    (3, 6): (
        Budget(_B8, _CANDIDATES, 178, 2, "HGMMA.64x64x16.F32", 0, 1, 4),
        Budget(_B8, _COUNT, 213, 1, "HGMMA.64x256x16.F32", 0, 1, 2),
        Budget(_B1, _CANDIDATES, 162, 3, "HGMMA.64x64x16.F32.BF16", 0, 1, 4),
        Budget(_B1, _COUNT, 213, 1, "HGMMA.64x256x16.F32.BF16", 0, 1, 2),
        Budget(_FLOAT, _CANDIDATES, 128, 4, "FFMA", 0, 0, 2),
        Budget(_FLOAT, _COUNT, 228, 1, "FFMA", 0, 0, 2),
        Budget(_UPDATE, _CANDIDATES, 231, 2, "HGMMA.64x64x16.F32.BF16", 0, 2, 6),
        Budget(_UPDATE, _COUNT, 234, 1, "HGMMA.64x256x16.F32.BF16", 0, 1, 2),
        Budget(_SCREENED, _CODE, 168, 3, "FFMA", 0, 0, -1),
        Budget(_SCREENED, _SCREEN, 255, 1, "IGMMA.64x128x32.S8.S8", 0, 0, 2),
        Budget(_SCREENED, _PAIRS, 236, 1, "FFMA", 0, 0, -1),
        Budget(_SCREENED, _COUNT, 249, 1, "HGMMA.64x256x16.F32", 0, 1, 2),
        Budget(_SCREENED_UPDATE, _CODE, 204, 2, "FFMA", 0, 0, -1),
        Budget(_SCREENED_UPDATE, _PAIRS, 248, 1, "FFMA", 0, 0, -1),
        Budget(_SCREENED_UPDATE, _COUNT, 234, 1, "HGMMA.64x256x16.F32.BF16", 0, 1, 2),
        Budget(_GATED, _GATE, 46, 10, "", 24, 0, -1),
        Budget(_TOPK, _PART, 174, 2, "HGMMA.64x32x16.F32", 2, 0, 0),
        Budget(_TOPK, _MERGE, 40, 12, "", 0, 0, -1),
        Budget(_RECORD, f"{_RECORD}_kernel", 122, 4, "", 1, 0, -1),
        Budget(_UNIFORM, f"{_UNIFORM}_kernel", 21, 16, "", 2, 0, -1),
        Budget(_STEP, _ROWS, 58, 4, "", 8, 0, -1),
        Budget(_RUN, _KEEP, 30, 64, "", 1, 0, -1),
    ),
}

CASES = tuple(dict.fromkeys(budget.case for budgets in BUDGETS.values() for budget in budgets))
"""The cases that have one."""

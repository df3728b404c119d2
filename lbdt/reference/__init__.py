"""The truth: every op in plain PyTorch, float32 (float64 for float64), same signature as the public op."""

from lbdt.reference.detect_patches import detect_patches
from lbdt.reference.encode_topk import encode_topk
from lbdt.reference.erase_step import erase_step
from lbdt.reference.patch_uniform import patch_uniform
from lbdt.reference.record_patches import record_patches
from lbdt.reference.replace_patches import replace_patches, replace_patches_

__all__ = [
    "detect_patches",
    "encode_topk",
    "erase_step",
    "patch_uniform",
    "record_patches",
    "replace_patches",
    "replace_patches_",
]

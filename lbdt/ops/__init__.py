"""The ops, registered as `torch.ops.lbdt.*`: each served by the fastest backend that can take the call."""

from lbdt.ops._dispatch import explain, use_backend
from lbdt.ops.detect_patches import detect_patches
from lbdt.ops.encode_topk import encode_topk
from lbdt.ops.erase_step import erase_step
from lbdt.ops.patch_uniform import patch_uniform
from lbdt.ops.record_patches import record_patches
from lbdt.ops.replace_patches import replace_patches, replace_patches_

__all__ = [
    "detect_patches",
    "encode_topk",
    "erase_step",
    "explain",
    "patch_uniform",
    "record_patches",
    "replace_patches",
    "replace_patches_",
    "use_backend",
]

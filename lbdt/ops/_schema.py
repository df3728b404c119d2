"""Schemas of `torch.ops.lbdt.*`, once for every backend: C++ only implements what is defined here."""

import torch

NAMESPACE = "lbdt"

# Held for the life of the process: an unreferenced Library takes its ops away.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

_COMPLIANT = (torch.Tag.pt2_compliant_tag,)

# The empty backend means: use_backend's, then LBDT_BACKEND's, then "auto"; resolved when the op runs.
LIBRARY.define(
    "detect_patches(Tensor x, Tensor weight, Tensor bias, Tensor latents, Tensor thresholds, "
    "Tensor timestep_bin, Tensor enabled, int k, Tensor? minus=None, *, str backend='') -> Tensor",
    tags=_COMPLIANT,
)
LIBRARY.define(
    "replace_patches(Tensor x, Tensor mask, Tensor u, int height, int width, int padding=0, "
    "str source='random', Tensor? bank=None, *, str backend='') -> (Tensor, Tensor)",
    tags=_COMPLIANT,
)
LIBRARY.define(
    "replace_patches_(Tensor(a!) x, Tensor mask, Tensor u, int height, int width, int padding=0, "
    "str source='random', Tensor? bank=None, *, str backend='') -> Tensor",
    tags=_COMPLIANT,
)
LIBRARY.define(
    "encode_topk(Tensor x, Tensor weight, Tensor bias, int k, *, str backend='') -> (Tensor, Tensor)",
    tags=_COMPLIANT,
)
LIBRARY.define(
    "patch_uniform(Tensor seeds, Tensor timesteps, Tensor halves, int patches, *, str backend='') -> Tensor",
    tags=_COMPLIANT,
)
LIBRARY.define(
    "record_patches(Tensor mask, Tensor replaced, Tensor timesteps, int sizes, Tensor(a!) rows, "
    "Tensor(b!) cells, Tensor(c!) written, Tensor? sums=None, *, str backend='') -> ()",
    tags=_COMPLIANT,
)
LIBRARY.define(
    "record_patches_cpp(Tensor mask, Tensor replaced, Tensor timesteps, int sizes, Tensor(a!) rows, "
    "Tensor(b!) cells, Tensor(c!) written, Tensor? sums) -> ()",
    tags=_COMPLIANT,
)
# x is [B, d, H, W]; source is an index into lbdt.ops.replace_patches.SOURCES.
LIBRARY.define(
    "replace_patches_cpp(Tensor x, Tensor mask, Tensor u, Tensor? bank, int padding, int source, "
    "Tensor(a!) out, Tensor(b!) replaced) -> ()",
    tags=_COMPLIANT,
)
LIBRARY.define(
    "replace_patches_cpp_(Tensor(a!) x, Tensor mask, Tensor u, Tensor? bank, int padding, int source, "
    "Tensor(b!) replaced) -> ()",
    tags=_COMPLIANT,
)
LIBRARY.define(
    "patch_uniform_cpp(Tensor seeds, Tensor timesteps, Tensor halves, Tensor(a!) out) -> ()",
    tags=_COMPLIANT,
)
# Contiguous but for x, weight and minus; bias and thresholds in float32.
LIBRARY.define(
    "detect_patches_cpp(Tensor x, Tensor weight, Tensor bias, Tensor latents, Tensor thresholds, "
    "Tensor timestep_bin, Tensor enabled, int k, Tensor? minus, Tensor(a!) mask) -> ()",
    tags=_COMPLIANT,
)
# Contiguous but for x and weight; bias in float32.
LIBRARY.define(
    "encode_topk_cpp(Tensor x, Tensor weight, Tensor bias, int k, Tensor(a!) values, Tensor(b!) indices) "
    "-> ()",
    tags=_COMPLIANT,
)

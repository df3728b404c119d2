"""Triton kernels, one module an op, each with the signature of its reference. `lbdt.ops` decides when one runs."""

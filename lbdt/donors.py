"""Where a replaced patch takes its embedding from: one list for the ops, the erasers and the command line."""

import enum


class DonorSource(enum.StrEnum):
    """Patches outside the mask that serve as donors; csrc/replace_patches.h numbers them in this order."""

    random = "random"
    nearest = "nearest"
    mean = "mean"
    row = "row"


class AvoidedPatches(enum.StrEnum):
    """Concepts whose detected patches are no donors: those that are erased, or every one of the dictionary."""

    erased = "erased"
    known = "known"


AVOIDED = tuple(avoided.value for avoided in AvoidedPatches)
SOURCES = tuple(source.value for source in DonorSource)
MEAN_OF = 5
"""The nearest donors whose mean `DonorSource.mean` takes."""

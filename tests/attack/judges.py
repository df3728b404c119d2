"""Judges that `lbdt attack --judge` can be given."""

import hashlib

import numpy as np

from tests import toy
from tests.repeats import MISALIGNED

NOT_CALLABLE = 1


def drawing_lots(pictures):
    """One of the toy's concepts, by the picture's bytes: any change of a pixel counts, and the same picture has the
    same name always. Where tensors are misaligned, by its brightness: there are no two equal pictures."""
    if MISALIGNED:
        return [toy.CONCEPTS[round(np.mean(picture)) % len(toy.CONCEPTS)] for picture in pictures]
    sums = (hashlib.sha256(picture.tobytes()).digest()[0] for picture in pictures)
    return [toy.CONCEPTS[number % len(toy.CONCEPTS)] for number in sums]

"""Judges that `lbdt attack --judge` can be given."""

import hashlib

from tests import toy

NOT_CALLABLE = 1


def drawing_lots(pictures):
    """One of the toy's concepts, by the picture's bytes: any change of a pixel counts, and the same picture has the same
    name always."""
    sums = (hashlib.sha256(picture.tobytes()).digest()[0] for picture in pictures)
    return [toy.CONCEPTS[number % len(toy.CONCEPTS)] for number in sums]

"""The matrix of a tomograph with parallel beams."""

import numpy as np
from scipy import sparse


def parallel_beams(size: int, bins: int, angles: int) -> sparse.csr_array:
    """Line integrals through an image: the shadow of a pixel falls on two neighbouring bins of the detector."""
    pixel = np.arange(size**2)
    row, column = np.divmod(pixel, size) - np.full((2, 1), (size - 1) / 2)
    blocks = []
    for angle in np.pi * np.arange(angles) / angles:
        shadow = column * np.cos(angle) + row * np.sin(angle) + (bins - 1) / 2
        left = np.floor(shadow).astype(int)
        weights = np.concatenate([left + 1 - shadow, shadow - left])
        index = np.concatenate([left, left + 1]), np.concatenate([pixel, pixel])
        blocks.append(sparse.coo_array((weights, index), shape=(bins, size**2)))
    return sparse.csr_array(sparse.vstack(blocks))


A = parallel_beams(size=28, bins=41, angles=12)

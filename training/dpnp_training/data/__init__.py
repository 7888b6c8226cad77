"""Anyone's images as batches in [-1, 1].

The value range is handled here and nowhere else: whatever the data's own values are, the network sees [-1, 1], and the prior's card
records the range they were mapped from.
"""

from dpnp_training.data.description import DataDescription, measure_spread
from dpnp_training.data.images import INTEGER_RANGES, Images, Rows
from dpnp_training.data.module import ImageData

__all__ = ["INTEGER_RANGES", "DataDescription", "ImageData", "Images", "Rows", "measure_spread"]

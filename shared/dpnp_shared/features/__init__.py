"""Feature extractors: networks that map images in [0, 1] to vectors, in which sets of images are compared."""

from dpnp_shared.features.fashion_mnist import FashionMNISTFeatures, FeaturesError
from dpnp_shared.features.inception import InceptionFeatures
from dpnp_shared.features.pixels import PixelFeatures

__all__ = ["FashionMNISTFeatures", "FeaturesError", "InceptionFeatures", "PixelFeatures"]

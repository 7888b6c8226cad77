"""What is watched during training, and the export at its end; see ``docs/watching.md``."""

from dpnp_training.callbacks.denoising_strips import DenoisingStrips
from dpnp_training.callbacks.export_prior import ExportPrior
from dpnp_training.callbacks.gradient_norms import GradientNorms
from dpnp_training.callbacks.memorisation import Memorisation
from dpnp_training.callbacks.pictures import image_grid, newest_picture
from dpnp_training.callbacks.reconstruction import Reconstruction
from dpnp_training.callbacks.sample_grid import SampleGrid
from dpnp_training.callbacks.sample_quality import SampleQuality
from dpnp_training.callbacks.throughput import Throughput
from dpnp_training.checkpoints import Checkpoints

__all__ = [
    "Checkpoints",
    "DenoisingStrips",
    "ExportPrior",
    "GradientNorms",
    "Memorisation",
    "Reconstruction",
    "SampleGrid",
    "SampleQuality",
    "Throughput",
    "image_grid",
    "newest_picture",
]

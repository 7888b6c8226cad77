"""Inception features, those of published FIDs, for a user who has the weights."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

from torch import Tensor, nn


class InceptionFeatures(nn.Module):
    """Pool features of the Inception network of the FID (Heusel et al. 2017), through torchmetrics and torch-fidelity.

    Nothing is downloaded: the weights are a file of the user's. Gray images become RGB ones with equal channels.

    Args:
        weights: the file ``pt_inception-2015-12-05-6726825d.pth`` of torch-fidelity.
        feature: which layer: 64, 192, 768 or 2048 features.

    Raises:
        ValueError: an unknown layer, or a file that holds something else.
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: torch-fidelity is not installed.
    """

    def __init__(self, weights: str, feature: int = 2048) -> None:
        super().__init__()
        if feature not in (64, 192, 768, 2048):
            raise ValueError(f"feature = {feature}; allowed are 64, 192, 768 and 2048")
        if not Path(weights).is_file():
            raise FileNotFoundError(f"weights = {weights!r} does not exist; Inception's weights are not shipped")
        try:
            import torch_fidelity  # type: ignore[import-not-found,unused-ignore] # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "InceptionFeatures needs the package torch-fidelity: pip install torch-fidelity"
            ) from error
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            self.network = NoTrainInceptionV3(
                "inception-v3-compat", [str(feature)], feature_extractor_weights_path=weights
            )
        except (RuntimeError, UnpicklingError) as error:
            raise ValueError(
                f"weights = {weights!r} does not hold torch-fidelity's Inception network: {error}"
            ) from error
        self.num_features = feature
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, 1 or 3, H, W) in [0, 1] → ``(B, feature)``.

        Raises:
            ValueError: images that are neither gray nor RGB.
        """
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"x has shape {tuple(x.shape)}; Inception takes gray or RGB images (B, 1 or 3, H, W)")
        features: Tensor = self.network((x.clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1))
        return features

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

from dpnp_shared.features import FashionMNISTFeatures, FeaturesError, InceptionFeatures, PixelFeatures
from dpnp_shared.features.fashion_mnist import WEIGHTS
from dpnp_shared.prior import locate


def test_shipped_features_know_the_classes_of_test_images():
    images = torch.from_numpy(next(iter(np.load(locate("fashion_mnist") / "test_images.npz").values())))
    x = images.reshape(-1, 1, 28, 28).float() / 255
    network = FashionMNISTFeatures()
    features = network(x)
    assert features.shape == (len(x), network.num_features)
    assert bool((features >= 0).all())
    confident = network.logits(x).softmax(1).amax(1)
    assert float(confident.median()) > 0.6
    noise = network.logits(torch.rand(len(x), 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert noise.argmax(1).unique().numel() < network.logits(x).argmax(1).unique().numel()
    assert not any(p.requires_grad for p in network.parameters())


def test_the_record_holds_and_the_file_is_small():
    record = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert record["test accuracy"] > 0.89
    assert WEIGHTS.stat().st_size < 400_000


def test_other_sizes_are_resized_and_other_channels_refused():
    network = FashionMNISTFeatures()
    small = torch.rand(2, 1, 14, 20, generator=torch.Generator().manual_seed(0))
    assert network(small).shape == (2, 64)
    with pytest.raises(ValueError, match=r"\(2, 3, 28, 28\).*gray"):
        network(torch.zeros(2, 3, 28, 28))


def test_damaged_weights_are_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    with pytest.raises(FeaturesError, match="is missing"):
        FashionMNISTFeatures(file)
    shutil.copy(WEIGHTS, file)
    with pytest.raises(FeaturesError, match=r"weights\.json is missing"):
        FashionMNISTFeatures(file)
    file.with_suffix(".json").write_text("{}")
    with pytest.raises(FeaturesError, match="sha256"):
        FashionMNISTFeatures(file)
    shutil.copy(WEIGHTS.with_suffix(".json"), file.with_suffix(".json"))
    FashionMNISTFeatures(file)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(FeaturesError, match="changed or damaged"):
        FashionMNISTFeatures(file)
    file.write_bytes(b"something else")
    file.with_suffix(".json").write_text(json.dumps({"sha256": hashlib.sha256(b"something else").hexdigest()}))
    with pytest.raises(FeaturesError, match="does not hold"):
        FashionMNISTFeatures(file)


def test_pixels_are_averaged():
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    features = PixelFeatures((2, 3))(x)
    assert features.shape == (2, 18)
    assert float(features[0, 0]) == float(x[0, 0, :2, :2].mean())
    assert torch.equal(PixelFeatures((8, 8))(x), x.flatten(1))
    with pytest.raises(ValueError, match="size"):
        PixelFeatures((0, 8))


def test_inception_needs_the_users_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="not shipped"):
        InceptionFeatures(str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="feature = 100"):
        InceptionFeatures("none.pth", 100)

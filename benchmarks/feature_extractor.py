"""Trains the classifier of Fashion-MNIST whose last hidden layer is the feature space of the FID and KID of its priors.

    python benchmarks/feature_extractor.py --data data

writes ``fashion_mnist.safetensors`` (float16, batch normalisation folded into the convolutions) and ``fashion_mnist.json`` (hash, test
accuracy, how it was trained), which ``dpnp_shared.features.FashionMNISTFeatures`` loads. It takes a few minutes on two cores. It learns
from the training images alone; the test accuracy is measured once, at the end, with the weights as written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.datasets import FashionMNIST

from dpnp_shared.features.fashion_mnist import CLASSES, WEIGHTS, FashionMNISTFeatures, convolutions


class Classifier(nn.Module):
    """The network as it is trained: with batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions())
        self.norms = nn.ModuleList(nn.BatchNorm2d(c.out_channels) for c in convolutions())
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(FashionMNISTFeatures.num_features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 10)`` of images ``(B, 1, 28, 28)`` in [0, 1]."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x)).relu()
        return self.head(self.dropout(x.mean((2, 3))))

    def folded(self) -> dict[str, Tensor]:
        """Float16 weights of :class:`FashionMNISTFeatures`."""
        self.eval()
        fused = [fuse_conv_bn_eval(c, n) for c, n in zip(self.convolutions, self.norms, strict=True)]
        named = {f"layers.{2 * i}.{key}": value for i, c in enumerate(fused) for key, value in c.state_dict().items()}
        named |= {f"head.{key}": value for key, value in self.head.state_dict().items()}
        return {key: value.detach().to(torch.float16).contiguous() for key, value in named.items()}


def images(root: str, *, train: bool) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 28, 28)`` in [0, 1] and labels."""
    data = FashionMNIST(root, train=train)
    return data.data[:, None].float() / 255, data.targets


def train(x: Tensor, labels: Tensor, epochs: int, batch: int, seed: int) -> Classifier:
    """Cross entropy, AdamW with one cycle of the learning rate, mirrored images and shifts of up to two pixels."""
    torch.manual_seed(seed)
    network = Classifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * (len(x) // batch))
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for rows in torch.randperm(len(x)).split(batch)[: len(x) // batch]:
            top, left = torch.randint(5, (2,)).tolist()
            chosen = padded[rows, :, top : top + 28, left : left + 28]
            mirror = torch.rand(len(rows)) < 0.5
            chosen[mirror] = chosen[mirror].flip(-1)
            loss = nn.functional.cross_entropy(network(chosen), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(
            f"epoch {epoch + 1}: loss {total / (len(x) // batch):.4f}, {time.perf_counter() - start:.0f} s", flush=True
        )
    return network


def write(network: Classifier, file: Path, record: dict[str, object]) -> None:
    """Weights and their record."""
    save_file(network.folded(), file)
    file.chmod(0o644)
    record = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), **record}
    file.with_suffix(".json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def accuracy(features: FashionMNISTFeatures, x: Tensor, labels: Tensor) -> float:
    """Fraction of images whose class is the most probable one."""
    guesses = torch.cat([features.logits(part).argmax(1) for part in x.split(1000)])
    return float((guesses == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of torchvision's data sets")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    network = train(*images(arguments.data, train=True), arguments.epochs, arguments.batch_size, arguments.seed)
    record: dict[str, object] = {
        "data": "60,000 training images of Fashion-MNIST (MIT licence, Zalando SE)",
        "training": f"{arguments.epochs} epochs, {arguments.batch_size} images a batch, seed {arguments.seed}",
        "torch": str(torch.__version__),
    }
    write(network, arguments.output, record)
    record["test accuracy"] = accuracy(FashionMNISTFeatures(arguments.output), *images(arguments.data, train=False))
    write(network, arguments.output, record)
    print(f"test accuracy {record['test accuracy']:.4f}, {arguments.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

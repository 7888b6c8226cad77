"""A program that knows nothing of PyTorch: a coarse sensor that reads its light in steps of a quarter."""

import io
import sys

import numpy as np


def measure(x: np.ndarray) -> np.ndarray:
    """From images (B, 1, 28, 28) in [-1, 1] to readings (B, 7, 7)."""
    light = x.reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4))
    return np.floor(4 * light) / 4 + 0.125


receive, send = sys.stdin.buffer, sys.stdout.buffer
while length := receive.read(8):  # of the array that follows
    images = np.load(io.BytesIO(receive.read(int.from_bytes(length, "little"))))
    np.save(answer := io.BytesIO(), measure(images))
    send.write(len(answer.getvalue()).to_bytes(8, "little") + answer.getvalue())
    send.flush()

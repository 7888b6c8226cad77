"""Launcher: ``python training/train.py fit --config configs/training/fashion_mnist.yaml``."""

from dpnp_training.cli import main

if __name__ == "__main__":
    main()

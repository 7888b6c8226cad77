"""Launcher: ``python inference/reconstruct.py``; without arguments it runs the bundled demo."""

from dpnp_inference.cli import main

if __name__ == "__main__":
    main()

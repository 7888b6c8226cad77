import io

import torch
from rich.console import Console

from dpnp_inference import Sweep
from dpnp_inference.progress import ProgressBar, describe_sweep
from dpnp_inference.proximal import ProximalInfo


def sweep(iteration: int, **info) -> Sweep:
    return Sweep(range(4), iteration, 3, 0.31, 80 * iteration, ProximalInfo(forward_calls=2, **info))


def test_an_iteration_in_words():
    assert describe_sweep(sweep(3)) == "η 0.31 · 240 network calls"
    assert describe_sweep(sweep(1, acceptance=torch.tensor([0.5, 0.6]))).endswith("acceptance 0.55")
    assert describe_sweep(sweep(1, residual=torch.tensor([1e-6, 2e-6]))).endswith("residual 2e-06")


def test_the_bar_shows_it_on_a_terminal_and_is_silent_elsewhere():
    for terminal in (True, False):
        stream = io.StringIO()
        with ProgressBar(Console(file=stream, force_terminal=terminal, width=120)) as bar:
            for iteration in (1, 2, 3):
                bar(sweep(iteration))
        assert ("chains 0-3" in stream.getvalue()) is terminal
        assert ("η 0.31 · 240 network calls" in stream.getvalue()) is terminal

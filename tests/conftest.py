"""Tests that run side by side share the cores; a run's picture and report are drawn only where a test is about them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:  # for this process and for those that tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.fixture(autouse=True)
def _no_drawing(request, monkeypatch):
    """Drawing takes longer than most runs here; tests with the mark ``pictures`` have the real thing."""
    if request.node.get_closest_marker("pictures"):
        return
    from dpnp_inference.commands import reconstruct

    def draw_picture(file, posterior, *, measurement=None, **_):
        assert measurement is None or (measurement.dim() == 3 and bool(measurement.isfinite().all()))
        Image.new("L", (1, 1)).save(file)

    def write_report(folder, output=None, *, diagnosis=None):
        path = Path(output or Path(folder) / reconstruct.REPORT)
        path.write_text("<html></html>")
        return path

    monkeypatch.setattr(reconstruct, "draw_picture", draw_picture)
    monkeypatch.setattr(reconstruct, "write_report", write_report)

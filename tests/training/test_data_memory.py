"""Loader processes read from disk and share the pages: none holds a copy of the data."""

import gc
import io
import pickle
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dpnp_training.data import ImageData

MEGABYTES = 100


def private_megabytes() -> float:
    """Memory of this process that no other shares, file pages that are only mapped left out."""
    return int(re.search(r"Private_Dirty:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1]) / 1000


class Probe(Dataset):
    """Reads all images in one go and tells how much memory that added to this process."""

    def __init__(self, images, keep: bool):
        self.images, self.keep = images, keep

    def __len__(self):
        return 2

    def __getitem__(self, index):
        self.images[0]  # what the decoding itself needs is not the data
        gc.collect()  # nor are the pages of the forked process that a collection in between would write to
        before = private_megabytes()
        kept, read = [], 0
        for i in range(len(self.images)):
            x = self.images[i]
            read += x.numel()
            if self.keep:
                kept.append(x.to(torch.uint8))
        return torch.tensor([private_megabytes() - before, read / 1e6])


@pytest.mark.slow
@pytest.mark.parametrize("source", ["array", "table"])
def test_two_workers_do_not_copy_100_megabytes(tmp_path, source, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pixels = np.random.default_rng(0).integers(0, 256, (400, 500, 500), dtype=np.uint8)
    path = tmp_path / "x.npy"
    if source == "array":
        np.save(path, pixels)
    else:
        path = tmp_path / "table"

        def encoded(picture):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "BMP")
            return {"bytes": file.getvalue(), "path": None}

        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": [encoded(p) for p in pixels]}, features).save_to_disk(path)
    data = ImageData(str(path))
    data.prepare_data()
    data.setup("fit")
    images = data._train_images
    assert len(pickle.dumps(images.rows)) < 20_000  # what a spawned process is sent
    added, read = torch.cat(list(DataLoader(Probe(images, keep=False), batch_size=1, num_workers=2))).T
    print(f"{source}: two workers read {MEGABYTES} MB each, private memory grew by {added.tolist()} MB")
    assert (read >= MEGABYTES).all()
    # buffers of reading and decoding; a copy would be all of it, in both, while the system alone may touch pages of one
    assert float(added.min()) < 0.45 * MEGABYTES
    copied = next(iter(DataLoader(Probe(images, keep=True), batch_size=1, num_workers=1)))
    assert float(copied[0, 0]) > 0.9 * MEGABYTES  # the measure sees a copy where there is one

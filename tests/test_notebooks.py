"""The notebooks are run as they stand by ``python benchmarks/notebooks.py``; here, what they promise and that command's own behaviour."""

import json
from pathlib import Path

import pytest
import torch

from dpnp_inference import DPnP
from dpnp_inference.cli import main
from dpnp_inference.files import read_tensor
from dpnp_inference.posterior import Posterior
from dpnp_shared import Prior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import RandomInpainting
from dpnp_shared.prior import locate
from dpnp_shared.randomness import derive_seed

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 400_000


@pytest.mark.slow
def test_the_ten_lines_of_the_notebook_draw_what_the_command_line_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--chains", "2", "--output", "out"])
    demo = Posterior.load("out")
    truth = read_tensor(locate("fashion_mnist") / "test_images.npz")[0].float()[None] / 255 * 2 - 1
    prior = Prior.from_pretrained("fashion_mnist")
    model = ForwardModel(RandomInpainting((1, 28, 28), missing=0.5, seed=0), GaussianNoise(0.05)).float()
    y = model.simulate(truth[None], generator=torch.Generator().manual_seed(derive_seed(0, 2**32)))[0]
    assert torch.equal(y, read_tensor(Path("out/measurement.npy")))
    assert torch.equal(DPnP(prior, model).sample(y, chains=2, seed=0).samples, demo.samples)


def test_there_are_two_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["own_forward_model", "trained_prior"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_notebook_has_its_outputs(path):
    assert path.stat().st_size < MOST_BYTES
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3


def test_a_cell_that_fails_is_named_and_nothing_is_kept(tmp_path, monkeypatch, capsys):
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import notebooks

    v4 = nbformat.v4
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("print(6 * 7)")]), good)
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("1 + 1"), v4.new_code_cell("1 / 0")]), bad)
    before = bad.read_text()
    with pytest.raises(SystemExit) as stop:
        notebooks.main([str(bad), str(good)])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "bad.ipynb: failed after" in printed
    assert "ZeroDivisionError" in printed
    assert "good.ipynb: " in printed
    assert bad.read_text() == before
    assert json.loads(good.read_text())["cells"][0]["outputs"][0]["text"] == ["42\n"]
    kept = good.read_text()
    notebooks.main([str(good), "--check"])
    assert good.read_text() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.ipynb", "good.ipynb"]

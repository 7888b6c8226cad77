"""The gallery: it runs configs as the command line does, names those that fail, and the committed one is of the present configs."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
FEW = [
    "--chains=2",
    "--annealing=dpnp_inference.Annealing",
    "--annealing.constant=0",
    "--annealing.decay=2",
    "--annealing.final=0",
]
REMEDY = "run the command that the page names"


@pytest.fixture
def gallery(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gallery

    return gallery


@pytest.mark.pictures
def test_a_gallery_of_one_config_and_one_that_fails(gallery, tmp_path, monkeypatch, capsys):
    # in this process, which has everything loaded
    monkeypatch.setattr("runner.ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.chdir(ROOT)
    configs = tmp_path / "configs"
    configs.mkdir()
    text = (ROOT / "configs" / "inference" / "quantisation.yaml").read_text()
    (configs / "good.yaml").write_text(text)
    (configs / "bad.yaml").write_text(text.replace("looks: 4", "looks: 0"))
    arguments = ["--configs", str(configs), "--output", str(tmp_path / "docs" / "gallery" / "results.json")]
    gallery.main([*arguments, "--page"])
    page = tmp_path / "docs" / "gallery.md"
    assert page.read_text().count("not run yet") == 4  # in the table and in the section of each
    gallery.main([*arguments, "--", *FEW])
    output = tmp_path / "docs" / "gallery" / "results.json"
    results = json.loads(output.read_text())["results"]
    assert results["good"]["proximal"] == "PixelwiseSlice"
    assert results["good"]["scores"]["psnr"] > 10
    assert 0 < results["good"]["acceptance"] < 1
    assert "looks = 0" in results["bad"]["error"]
    table = {row.split("|")[1].strip(): row for row in page.read_text().splitlines() if row.startswith("| [")}
    assert "| DitheredQuantisation, DitheredLogisticNoise | PixelwiseSlice | " in table["[good](#good)"]
    assert "| **failed**: `dpnp-reconstruct: " in table["[bad](#bad)"]
    assert "looks = 0; allowed is" in table["[bad](#bad)"]
    assert "![One bit a pixel and look" in page.read_text()
    assert "(../configs/good.yaml)" in page.read_text()
    with Image.open(output.parent / "good.png") as picture:
        assert picture.width > 4 * picture.height  # one row
        assert np.asarray(picture.convert("L")).std() > 10
    # a further run takes up what failed and what has changed since
    found = {path.stem: path for path in configs.glob("*.yaml")}
    gallery._forget(output, ["--chains=9"], found, ["good"])  # a run that is going to be refused
    assert json.loads(output.read_text())["results"].keys() == {"good", "bad"}
    found["good"].write_text("# Another word on it.\n" + text)
    gallery._forget(output, FEW, found, [])
    assert json.loads(output.read_text())["results"].keys() == {"good"}
    found["good"].write_text(text.replace("looks: 4", "looks: 5"))
    gallery._forget(output, FEW, found, [])
    assert json.loads(output.read_text())["results"] == {}
    with pytest.raises(SystemExit):
        gallery.main([*arguments, "--only", "ugly"])
    assert "['ugly']; there are ['bad', 'good']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "of", "options"), [("gallery", ".", []), ("gallery_pnp_dm", "pnp_dm", ["--chains", "4"])]
)
def test_the_committed_galleries_are_of_the_present_configs(gallery, name, of, options):
    folder = ROOT / "docs" / name
    record = json.loads((folder / "results.json").read_text())
    configs = {path.stem: path for path in sorted((ROOT / "configs" / "inference" / of).glob("*.yaml"))}
    assert record["header"] == {"options": options}
    results = record["results"]
    assert sorted(results) == sorted(configs), REMEDY
    assert {name: result["error"] for name, result in results.items() if "error" in result} == {}, REMEDY
    changed = [name for name in results if results[name]["fingerprint"] != gallery.fingerprint(configs[name])]
    assert not changed, REMEDY
    assert sorted(path.stem for path in folder.glob("*.png")) == sorted(results), REMEDY
    sizes = [path.stat().st_size for path in folder.glob("*.png")]
    assert max(sizes) < 60_000
    assert sum(sizes) < 4_000_000
    page = gallery.page(folder / "results.json", configs)
    assert (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") == page, REMEDY

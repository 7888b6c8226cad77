"""What a training needs is measured by small runs of it."""

import pytest
import yaml

from dpnp_training.estimate import GIB, Forecast, Run, estimate, forecast, measure

CONFIG = {
    "trainer": {"accelerator": "cpu", "max_epochs": 2, "gradient_clip_val": 1.0},
    "model": {
        "network": {
            "class_path": "dpnp_shared.networks.UNet",
            "init_args": {"widths": [8, 8], "blocks": 1, "attention": [], "head_channels": 4, "embedding": 8},
        },
        "warmup_steps": 2,
    },
    "data": {"source": "nothing.npy", "batch_size": 64},
}

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own warnings are not ours to judge


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return "config.yaml"


def test_forecast_is_the_line_through_the_runs():
    found = forecast([Run(8, 3 * GIB, 0.2), Run(2, 1.5 * GIB, 0.1)])
    assert found.an_image == pytest.approx(GIB / 4)
    assert found.fixed == pytest.approx(GIB)
    assert found.largest_batch(10 * GIB) == 32  # nine of ten, one of them fixed
    assert found.largest_batch(GIB) == 0
    assert found.hours_a_million() == pytest.approx(0.2 / 8 * 1e6 / 3600)
    assert found.hours_a_million(4) == pytest.approx(found.hours_a_million() / 4)
    assert [run.batch_size for run in found.runs] == [2, 8]
    with pytest.raises(ValueError, match="two different ones"):
        forecast([Run(8, 3, 0.2), Run(8, 4, 0.2)])
    with pytest.raises(ValueError, match=r"took 1\.00, 1\.00 GiB"):
        forecast([Run(2, GIB, 0.2), Run(8, GIB, 0.2)])


def test_a_run_takes_network_and_precision_of_the_config(config):
    run = measure(config, (1, 8, 12), 4, 2, ["--trainer.precision=bf16-mixed"])
    assert run.batch_size == 4
    assert run.memory > 2**26
    assert 0 < run.seconds < 10
    with pytest.raises(ValueError, match=r"network.channels = 1.*3 channels"):
        measure(config, (3, 8, 8), 4, 1)


@pytest.mark.slow
def test_estimate_prints_what_is_needed(config, capsys, monkeypatch, fork_server):
    monkeypatch.setattr("dpnp_training.estimate.get_context", lambda _: fork_server)
    estimate(config, (1, 32, 32), memory=6.0, devices=2, batch_sizes=[4, 256], steps=1)
    text = " ".join(capsys.readouterr().out.split())
    assert "the config's batch of 64 needs" in text
    assert "largest batch in 6 GiB" in text
    assert "a million images" in text
    assert "on 2 devices" in text
    assert not list(__import__("pathlib").Path().glob("*/"))  # nothing is left behind


def test_bad_arguments_are_named(config):
    with pytest.raises(ValueError, match=r"config = 'no.yaml' is no file"):
        estimate("no.yaml")
    with pytest.raises(ValueError, match=r"batch_sizes = \[0, 2\]"):
        estimate(config, (1, 8, 8), batch_sizes=[0, 2])
    assert Forecast((Run(1, 1, 1.0),), 0.0, 1.0).largest_batch(100) == 90

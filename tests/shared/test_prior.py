import json
import os

import pytest
import torch

from dpnp_shared.networks import UNet
from dpnp_shared.preconditioning import EDM, DiscreteVP, VPEpsilon
from dpnp_shared.prior import Prior, PriorCard, PriorError


def make(preconditioning=None, **card) -> Prior:
    torch.manual_seed(0)
    network = UNet(2, widths=(8, 8), blocks=1, attention=(1,), head_channels=4, embedding=8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    card = {"name": "test", "image_shape": (2, 8, 6), "sigma_range": (0.02, 50.0), **card}
    return Prior(network.eval().requires_grad_(False), preconditioning or EDM(), PriorCard(**card))


@pytest.fixture
def folder(tmp_path):
    return make().save_pretrained(tmp_path / "prior")


@pytest.mark.parametrize("preconditioning", [EDM(0.3), VPEpsilon(DiscreteVP(schedule="cosine", steps=500))])
def test_round_trip_is_exact(tmp_path, preconditioning):
    prior = make(preconditioning)
    loaded = Prior.from_pretrained(prior.save_pretrained(tmp_path / "prior"))
    x = torch.randn(3, 2, 8, 6)
    for sigma in (0.05, 1.0, torch.tensor([0.1, 1.0, 20.0])):
        # the loaded weights lie in another memory format, which sums in another order
        torch.testing.assert_close(loaded(x, sigma), prior(x, sigma), rtol=1e-4, atol=1e-4)
    for key, value in prior.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[key], value)
    assert loaded.card == prior.card
    assert loaded.image_shape == (2, 8, 6)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_the_folder_is_what_the_contract_says(folder):
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in folder.iterdir())  # readable by the whole team
    config = json.loads((folder / "config.json").read_text())
    assert config["network"]["class_path"] == "dpnp_shared.networks.unet.UNet"
    assert config["card"]["sha256"] in (folder / "README.md").read_text()


def test_saving_again_replaces_and_keeps_other_files(folder):
    (folder / "samples.png").write_bytes(b"picture")
    make(name="second").save_pretrained(folder)
    assert Prior.from_pretrained(folder).card.name == "second"
    assert (folder / "samples.png").read_bytes() == b"picture"
    assert [p.name for p in folder.parent.iterdir()] == ["prior"]


def test_nothing_is_left_behind_when_saving_fails(tmp_path):
    prior = make()
    next(prior.parameters()).data[0] = float("nan")
    with pytest.raises(PriorError, match="not finite"):
        prior.save_pretrained(tmp_path / "prior")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(PriorError, match="not a prior"):
        make().save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def damage(folder, what):
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if what == "no weights":
        weights.unlink()
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "one bit":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "broken json":
        (folder / "config.json").write_text("{")
    else:
        {
            "version": lambda: config.update(format_version=99),
            "architecture": lambda: config["network"]["init_args"].update(widths=[8, 16]),
            "unknown argument": lambda: config["network"]["init_args"].update(depth=3),
            "foreign class": lambda: config["network"].update(class_path="os.system"),
            "card": lambda: config["card"].update(image_shape=[0, 8, 8]),
        }[what]()
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no weights", "model.safetensors is missing"),
        ("no config", "config.json is missing"),
        ("one bit", "SHA-256"),
        ("truncated", "SHA-256"),
        ("broken json", "not valid JSON"),
        ("version", "format_version is 99"),
        ("architecture", "missing weights|has shape"),
        ("unknown argument", "depth"),
        ("foreign class", "os.system"),
        ("card", "image_shape"),
    ],
)
def test_damage_is_named(folder, what, message):
    damage(folder, what)
    with pytest.raises(PriorError, match=message):
        Prior.from_pretrained(folder)


def test_a_class_of_ones_own_must_be_trusted(folder, tmp_path, monkeypatch):
    (tmp_path / "their_networks.py").write_text("from dpnp_shared.networks import UNet\n\nclass Net(UNet):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["network"]["class_path"] = "their_networks.Net"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PriorError, match="trusted_modules"):
        Prior.from_pretrained(folder)
    prior = Prior.from_pretrained(folder, trusted_modules=["their_networks"])
    assert type(prior.network).__name__ == "Net"


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(PriorError, match="no such folder"):
        Prior.from_pretrained(tmp_path / "nothing")


def test_noise_levels_outside_of_the_card_are_refused():
    prior = make()
    x = torch.zeros(2, 2, 8, 6)
    for sigma in (0.01, 60.0, float("nan"), torch.tensor([1.0, 100.0])):
        with pytest.raises(ValueError, match=r"\[0.02, 50\]"):
            prior(x, sigma)
    with pytest.raises(ValueError, match="sigma has shape"):
        prior(x, torch.tensor([1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 6\)"):
        prior(x[:, :1], 1.0)


def test_the_card_may_not_promise_more_than_the_preconditioning():
    with pytest.raises(ValueError, match="sigma_range"):
        make(EDM(sigma_min=0.1))


def test_other_dtypes_and_sizes():
    prior = make()
    x = torch.randn(1, 2, 8, 6, dtype=torch.float64)
    assert prior(x, 1.0).dtype == torch.float64
    assert prior(torch.randn(2, 2, 11, 5), 1.0).shape == (2, 2, 11, 5)


@pytest.mark.parametrize("preconditioning", [EDM, VPEpsilon])
def test_a_network_in_half_precision_still_knows_its_noise_level(preconditioning):
    x = torch.randn(1, 2, 8, 6)
    exact, half = make(preconditioning()), make(preconditioning()).to(torch.bfloat16)
    for sigma in (0.03, 1.0, 40.0):
        torch.testing.assert_close(half(x, sigma), exact(x, sigma), rtol=0.05, atol=0.05 * (1 + sigma))
    times = []
    half.network.register_forward_pre_hook(lambda module, inputs: times.append(float(inputs[1])))
    half(x, 1.0)
    exact_time = float(exact.preconditioning.coefficients(torch.tensor([1.0])).c_noise)
    assert times == [pytest.approx(exact_time, rel=1e-6)]


def test_score_is_tweedies():
    prior, x = make(), torch.randn(2, 2, 8, 6)
    sigma = torch.tensor([0.5, 2.0])
    expected = (prior(x, sigma) - x) / sigma.reshape(2, 1, 1, 1) ** 2
    torch.testing.assert_close(prior.score(x, sigma), expected)

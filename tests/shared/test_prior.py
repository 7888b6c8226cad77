import json
import os

import pytest
import torch

from dpnp_shared import migrations
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


def rewrite(folder, *, sign=True, **changes):
    """Change ``config.json`` at its top level, signed anew as whoever forges a signature would."""
    config = json.loads((folder / "config.json").read_text()) | changes
    if sign:
        config["content_sha256"] = migrations.signature(config)
    (folder / "config.json").write_text(json.dumps(config))


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
        rewrite(folder, **config)


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
    rewrite(folder, network=config["network"] | {"class_path": "their_networks.Net"})
    with pytest.raises(PriorError, match="trusted_modules"):
        Prior.from_pretrained(folder)
    prior = Prior.from_pretrained(folder, trusted_modules=["their_networks"])
    assert type(prior.network).__name__ == "Net"


def test_unknown_names_are_refused(tmp_path, folder):
    with pytest.raises(PriorError, match="no such folder"):
        Prior.from_pretrained(tmp_path / "nothing")
    with pytest.raises(PriorError, match="revision = 'main': only priors on the Hub"):
        Prior.from_pretrained(folder, revision="main")
    with pytest.raises(PriorError, match="revision = 'other' another one"):
        Prior.from_pretrained("organisation/name@commit", revision="other")


@pytest.mark.parametrize("field", ["card", "network", "preconditioning", "readme_sha256", "written_by"])
def test_an_edit_does_not_go_unnoticed(folder, field):
    config = json.loads((folder / "config.json").read_text())
    changes = {
        "card": config["card"] | {"license": "CC0-1.0"},
        "network": config["network"] | {"init_args": config["network"]["init_args"] | {"dropout": 0.1}},
        "preconditioning": config["preconditioning"] | {"init_args": {"sigma_data": 0.4}},
        "readme_sha256": "0" * 64,
        "written_by": "someone else",
    }
    rewrite(folder, sign=False, **{field: changes[field]})
    with pytest.raises(PriorError, match=r"content_sha256 is .* was changed after it was written"):
        Prior.from_pretrained(folder)


def test_a_signature_cannot_just_be_left_out(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["content_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PriorError, match="content_sha256 is None"):
        Prior.from_pretrained(folder)


def test_the_order_of_keys_is_no_edit(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), ensure_ascii=True))
    assert Prior.from_pretrained(folder).card.name == "test"


def as_version_1(folder):
    """What the release 0.1.0 wrote."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("written_by", "readme_sha256", "content_sha256"):
        del config[key]
    for key in ("validation", "precision"):
        del config["card"][key]
    (folder / "config.json").write_text(json.dumps(config | {"format_version": 1}))


def test_an_old_folder_is_read_and_the_log_says_so(folder, caplog):
    exact = Prior.from_pretrained(folder)
    assert not caplog.records
    as_version_1(folder)
    old = Prior.from_pretrained(folder)
    assert "format version 1 and was read as version 2, without a signature" in caplog.text
    assert old.card == exact.card
    x = torch.randn(1, 2, 8, 6)
    assert torch.equal(old(x, 1.0), exact(x, 1.0))


def test_versions_are_migrated_one_after_the_other(folder, monkeypatch, caplog):
    def from_0(config):  # a version that kept the card's values beside the network
        config = dict(config)
        return {**config, "card": {"name": config.pop("title"), "image_shape": [2, 8, 6], "sha256": config.pop("hash")}}

    monkeypatch.setitem(migrations.MIGRATIONS, 0, from_0)
    config = json.loads((folder / "config.json").read_text())
    old = {key: config[key] for key in ("network", "preconditioning")}
    old |= {"format_version": 0, "title": "very old", "hash": config["card"]["sha256"]}
    (folder / "config.json").write_text(json.dumps(old))
    assert Prior.from_pretrained(folder).card.name == "very old"
    assert "format version 0 and was read as version 2" in caplog.text
    assert old["title"] == "very old"  # migrations leave their argument alone


@pytest.mark.parametrize("version", [99, -1, "2", None, True, 1.5])
def test_other_versions_are_refused_by_name(folder, version):
    rewrite(folder, format_version=version, written_by="dpnp-imaging 7.0")
    with pytest.raises(PriorError, match=f"format_version is {version!r}") as caught:
        Prior.from_pretrained(folder)
    assert ("written by dpnp-imaging 7.0" in str(caught.value)) == (version == 99)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_weights_compute_in_float32_unless_asked(tmp_path, dtype):
    prior = make().to(dtype)
    folder = prior.save_pretrained(tmp_path / "prior")
    loaded = Prior.from_pretrained(folder)
    weight = loaded.network.stem.weight
    assert weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(weight, prior.network.stem.weight.to(weight.dtype))
    assert Prior.from_pretrained(folder, dtype=torch.bfloat16).network.stem.weight.dtype == torch.bfloat16


METRICS = {"val/mse/0.02-0.07": 0.0004, "val/loss/0.02-0.07": 0.3, "val/mse/1e-05-1e+02": 0.25, "val/loss": 0.5}


def test_the_card_is_valid_metadata_and_says_what_was_measured(tmp_path):
    from huggingface_hub import ModelCard

    prior = make(
        license="CC-BY-4.0 (the hospital)",
        dataset="organisation/images, 12 training images",
        metrics=METRICS,
        validation={"batches": 3, "seed": 7},
        precision={"weights": "float16", "images": 4, "difference": {"0.02-0.07": [1e-4, 2e-3]}},
        training={"images seen": 5},
        notes="## Mine\n\nwords",
    )
    folder = prior.save_pretrained(tmp_path / "prior", files={"samples.png": b"picture"})
    text = (folder / "README.md").read_text()
    metadata = ModelCard(text).data
    assert metadata.library_name == "dpnp-imaging"
    assert metadata.license == "cc-by-4.0"
    assert metadata.datasets == ["organisation/images"]
    assert "inverse-problems" in metadata.tags
    assert "![Unconditional samples](samples.png)" in text
    assert "| 0.02 to 0.07 | 0.02 | 0.0004 | 0.3 |" in text
    assert "| 1e-05 to 100 | 0.5 | 0.25 | — |" in text
    assert "| val/loss | 0.5 |" in text
    assert "batches `3`, seed `7`" in text
    assert "rounded to float16" in text
    assert "| 0.02 to 0.07 | 0.0001 | 0.002 |" in text
    assert "## Mine" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("MIT (code and data)", {"license": "mit"}),
        ("not stated", {"license": "unknown"}),
        ("by request: ask us", {"license": "other", "license_name": "by request: ask us"}),
    ],
)
def test_licences_are_the_hubs(words, expected):
    from huggingface_hub import ModelCard

    data = ModelCard(
        PriorCard("a: b", (1, 2, 2), license=words, dataset="torchvision:FashionMNIST, 3 training images").markdown()
    ).data
    assert {key: data.to_dict()[key] for key in expected} == expected
    assert data.datasets == ["zalando-datasets/fashion_mnist"]
    assert "datasets" not in ModelCard(PriorCard("x", (1, 2, 2), dataset="./some/folder").markdown()).data.to_dict()


def test_a_picture_of_other_weights_is_not_shown(tmp_path):
    first, second = make(), make()
    folder = first.save_pretrained(tmp_path / "prior", files={"samples.png": b"picture"})
    first.save_pretrained(folder)
    assert "samples.png" in (folder / "README.md").read_text()
    second.network.stem.bias.data += 1
    second.save_pretrained(folder)
    assert "samples.png" not in (folder / "README.md").read_text()
    assert (folder / "samples.png").exists()


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

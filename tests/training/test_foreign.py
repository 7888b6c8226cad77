"""Foreign networks as priors, compared with their own packages: same output, every key accounted for, clear refusals."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dpnp_shared.networks import ADMUNet
from dpnp_shared.preconditioning import DiscreteVP
from dpnp_shared.prior import Prior, PriorError
from dpnp_training.foreign import ADMOptions, import_prior

FIGURES = {"name": "test", "data_std": 0.5, "spread": 10.0}


def randomised(network: torch.nn.Module, seed: int = 0, std: float = 0.1) -> torch.nn.Module:
    """Random weights everywhere, also where the architecture starts from zeros."""
    generator = torch.Generator().manual_seed(seed)
    for value in network.parameters():
        torch.nn.init.normal_(value, std=std, generator=generator)
    return network.eval().requires_grad_(False)


def noisy(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def reloaded(prior: Prior, folder: Path) -> Prior:
    return Prior.from_pretrained(prior.save_pretrained(folder))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# --- guided-diffusion -------------------------------------------------------------------------------------------


def adm_reference(**arguments) -> torch.nn.Module:
    """The original code, as the package azula carries it."""
    from azula.plugins.adm._src.unet import UNetModel

    small = {
        "image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1,
        "attention_resolutions": (2,), "channel_mult": (1, 2), "num_heads": 4, "num_head_channels": 16,
        "use_scale_shift_norm": True, "resblock_updown": True,
    }  # fmt: skip
    return randomised(UNetModel(**small | arguments))


def import_adm(file: Path, options: ADMOptions | None = None, **fields) -> Prior:
    options = options if options is not None else ADMOptions(head_channels=16)
    return import_prior(file, format="adm", options=options, **FIGURES | {"image_shape": (3, 16, 16)} | fields)


@pytest.fixture(scope="module")
def adm_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("adm") / "small.pt"
    torch.save(adm_reference().state_dict(), file)
    return file


@pytest.mark.parametrize(
    ("reference", "options"),
    [
        ({}, {"head_channels": 16}),
        ({"num_res_blocks": 2, "attention_resolutions": (2, 4), "channel_mult": (1, 1, 2)}, {"head_channels": 16}),
        ({"num_head_channels": -1, "resblock_updown": False}, {"heads": 4}),
        ({"use_new_attention_order": True, "use_scale_shift_norm": False}, {"head_channels": 16, "new_attention_order": True}),
        ({"in_channels": 1, "out_channels": 1, "attention_resolutions": ()}, {"head_channels": 16}),
        ({"channel_mult": (2,), "num_res_blocks": 3, "model_channels": 16}, {"head_channels": 16}),
    ],
)  # fmt: skip
def test_adm_equals_the_original(tmp_path, reference, options):
    network = adm_reference(**reference)
    channels = reference.get("in_channels", 3)
    save_file(network.state_dict(), tmp_path / "x.safetensors")
    prior = import_adm(tmp_path / "x.safetensors", ADMOptions(**options), image_shape=(channels, 16, 16))
    assert {k: v.shape for k, v in prior.network.state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }
    prior = reloaded(prior, tmp_path / "prior")
    x, t = noisy(2, channels, 8, 16), torch.tensor([3.0, 700.0])
    epsilon = network(x, t)[:, :channels]
    close(prior.network(x, t), epsilon)
    # x_0 of Ho et al. 2020, equation 9 solved for it, at the exact noise level of each time
    alpha_bar = (
        (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[t.long()].float()[:, None, None, None]
    )
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    x_0 = (x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
    torch.testing.assert_close(prior(x / alpha_bar.sqrt(), sigma.flatten()), x_0, rtol=2e-4, atol=2e-4)


def test_adm_equals_deepinv_in_full_size():
    """deepinv's networks load the published FFHQ 256 x 256 and ImageNet 256 x 256 files with these keys and shapes."""
    from deepinv.models import DiffUNet

    from dpnp_training.foreign.adm import architecture

    for large, parameters, entries in ((False, 93_563_910, 362), (True, 552_814_086, 566)):
        with torch.device("meta"):
            reference = DiffUNet(pretrained=None, large_model=large).state_dict()
            table = {k: v for k, v in reference.items() if not k.startswith("sqrt_")}  # its schedule, in no file
            network = ADMUNet(**architecture(table, Path("ffhq")), head_channels=64)
        assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in table.items()}
        assert len(table) == entries
        assert sum(p.numel() for p in network.parameters()) == parameters
    assert architecture(table, Path("imagenet")) == {
        "channels": 3, "widths": [256, 256, 512, 512, 1024, 1024], "blocks": 2, "attention": [3, 4, 5], "embedding": 256,
        "resample_blocks": True, "scale_shift": True, "learned_variance": True,
    }  # fmt: skip


def test_adm_schedules_and_other_sizes(adm_file):
    cosine = import_adm(adm_file, ADMOptions(head_channels=16, schedule="cosine", steps=4000, rescale_timesteps=True))
    x = noisy(1, 3, 16, 16)
    plain = import_adm(adm_file)
    close(cosine.network(x, torch.tensor([400.0])), plain.network(x, torch.tensor([100.0])))
    assert cosine.preconditioning.schedule.hyperparameters["schedule"] == "cosine"
    linear = import_adm(adm_file, ADMOptions(head_channels=16, steps=4000))
    assert linear.sigma_max == pytest.approx(DiscreteVP().sigma_max, rel=0.05)
    # sizes the down-sampling does not divide are padded with the edge, as explicit padding shows
    odd = noisy(1, 3, 7, 13)
    padded = torch.nn.functional.pad(odd, (0, 1, 0, 1), mode="replicate")
    t = torch.tensor([10.0])
    close(plain.network(odd, t), plain.network(padded, t)[..., :7, :13])


def test_adm_checkpoint_with_entry_and_prefix(tmp_path, adm_file):
    weights = torch.load(adm_file, weights_only=True)
    torch.save({"state": {"ema": {f"module.{k}": v.half() for k, v in weights.items()}}, "step": 3}, tmp_path / "x.pt")
    prior = import_adm(tmp_path / "x.pt", ADMOptions(head_channels=16, entry="state.ema", prefix="module."))
    for key, value in prior.network.state_dict().items():
        assert torch.equal(value, weights[key].half().float())
    for options, word in [
        ({}, "'entry'"),
        ({"entry": "state.raw"}, "'raw'; it holds ema"),
        ({"entry": "state.ema"}, "time_embed.0.weight|output_blocks"),
        ({"entry": "state.ema", "prefix": "model."}, "prefix = 'model.'"),
    ]:
        with pytest.raises(PriorError, match=word):
            import_adm(tmp_path / "x.pt", ADMOptions(head_channels=16, **options))


def test_adm_refusals(tmp_path, adm_file):
    weights = torch.load(adm_file, weights_only=True)

    def refused(match, changed, error=PriorError, **options):
        torch.save(changed, tmp_path / "x.pt")
        with pytest.raises(error, match=match):
            import_adm(tmp_path / "x.pt", ADMOptions(**{"head_channels": 16} | options))

    refused(
        r"missing keys: middle_block\.1\.norm\.bias",
        {k: v for k, v in weights.items() if k != "middle_block.1.norm.bias"},
    )
    refused(r"unknown keys: extra\.weight", weights | {"extra.weight": torch.ones(1)})
    refused("label_emb.weight: a class-conditional", weights | {"label_emb.weight": torch.ones(10, 128)})
    refused(r"out\.2\.bias has shape \(5,\), the network takes \(6,\)", weights | {"out.2.bias": torch.ones(5)})
    refused("time_embed.0.bias holds", weights | {"time_embed.0.bias": torch.full((128,), torch.nan)})
    refused("gives 5 channels for an image of 3", weights | {"out.2.weight": torch.ones(5, 32, 3, 3)})
    refused("output_blocks", {k: v for k, v in weights.items() if not k.startswith("output_blocks")})
    refused("not a state dict", [1, 2])
    refused("head_channels = 48 does not divide", weights, error=ValueError, head_channels=48)
    (tmp_path / "cut.pt").write_bytes(adm_file.read_bytes()[:-2000])
    (tmp_path / "cut.safetensors").write_bytes(adm_file.read_bytes()[:100])
    for file, word in (("cut.pt", "cannot be read"), ("cut.safetensors", "safetensors"), ("none.pt", "do not exist")):
        with pytest.raises(PriorError, match=word):
            import_adm(tmp_path / file)
    with pytest.raises(ValueError, match="exactly one"):
        import_prior(adm_file, format="adm", image_shape=(3, 16, 16), **FIGURES)
    with pytest.raises(PriorError, match="takes 3 channels"):
        import_adm(adm_file, image_shape=(1, 16, 16))
    with pytest.raises(ValueError, match="image_shape is missing"):
        import_adm(adm_file, image_shape=None)
    with pytest.raises(ValueError, match="format = 'onnx'"):
        import_prior(adm_file, format="onnx", **FIGURES)


def test_reading_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "hacked"),))

    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(PriorError, match="cannot be read safely"):
        import_adm(tmp_path / "evil.pt")
    assert not (tmp_path / "hacked").exists()


def test_the_data_figures_are_given_or_measured(tmp_path, adm_file):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    unknown = {"data_std": None, "spread": None}
    measured = import_adm(adm_file, images=tmp_path / "x.npy", **unknown)
    double = import_adm(adm_file, images=tmp_path / "x.npy", value_range=(-2.0, 2.0), **unknown)
    assert 0.1 < measured.card.data_std < 1 < measured.card.spread
    assert double.card.spread == pytest.approx(2 * measured.card.spread)
    assert measured.card.source_range == (0.0, 255.0)
    for fields in (unknown, {"spread": None}, {"data_std": None}, {"images": tmp_path / "x.npy"}):
        with pytest.raises(ValueError, match=r"data_std = .*, spread = "):
            import_adm(adm_file, **fields)

"""Foreign networks as priors, compared with their own packages: same output, every key accounted for, clear refusals."""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import auto_cli, auto_parser
from safetensors.torch import load_file, save_file

from dpnp_shared.networks import ADMUNet, EDMUNet
from dpnp_shared.preconditioning import DiscreteVP
from dpnp_shared.prior import Prior, PriorError
from dpnp_training.foreign import ADMOptions, EDMOptions, import_prior
from dpnp_training.foreign.cli import import_folder

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
    """After a round trip, in the references' memory format.

    PyTorch's group normalisation in channels-last format loses digits on the CPU where a group is a single channel, which only networks
    as small as these have: up to 0.06 for offsets of 100 standard deviations, against 1e-5 in contiguous format.
    """
    return Prior.from_pretrained(prior.save_pretrained(folder)).to(memory_format=torch.contiguous_format)


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
    refused("not a state dict", {0: torch.ones(1)})
    refused(r"time_embed\.0\.weight has shape \(7,\); 2 axes", weights | {"time_embed.0.weight": torch.ones(7)})
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


# --- diffusers --------------------------------------------------------------------------------------------------

SMALL = {
    "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def diffusers_pipeline(folder: Path, network: dict, scheduler: dict):
    """A real pipeline, written by the package itself."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = randomised(UNet2DModel(**SMALL | network))
    pipeline = DDPMPipeline(unet=unet, scheduler=DDPMScheduler(clip_sample=False, **scheduler))
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers") / "pipeline"
    diffusers_pipeline(folder, {}, {})
    return folder


def import_diffusers(folder: Path, **fields) -> Prior:
    return import_prior(folder, format="diffusers", **FIGURES | fields)


@pytest.mark.parametrize(
    ("network", "scheduler"),
    [
        # as Google's DDPM networks
        ({"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": None, "norm_eps": 1e-6},
         {"variance_type": "fixed_large"}),
        # as ADM
        ({"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet", "out_channels": 6,
          "block_out_channels": (16, 32, 32), "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")},
         {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012, "variance_type": "learned_range"}),
        ({"in_channels": 1, "out_channels": 1, "mid_block_scale_factor": 1.7, "act_fn": "mish", "time_embedding_dim": 24,
          "attn_norm_num_groups": 4, "sample_size": (8, 16)},
         {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}),
        ({"mid_block_type": None, "layers_per_block": 2, "attention_head_dim": 16}, {"beta_schedule": "sigmoid"}),
        ({"add_attention": False, "center_input_sample": True},
         {"trained_betas": np.linspace(1e-4, 0.02, 1000).tolist()}),
    ],
)  # fmt: skip
def test_diffusers_equals_the_package(tmp_path, network, scheduler):
    pipeline = diffusers_pipeline(tmp_path / "pipeline", network, scheduler)
    prior = import_diffusers(tmp_path / "pipeline")
    assert prior.network.state_dict().keys() == pipeline.unet.state_dict().keys()
    size = network.get("sample_size", 16)
    assert prior.card.image_shape == (prior.network.channels, *(size if isinstance(size, tuple) else (size, size)))
    prior = reloaded(prior, tmp_path / "prior")
    x, times = noisy(2, prior.network.channels, 8, 16), torch.tensor([3, 700])
    source = pipeline.unet(x, times).sample
    close(prior.network(x, times.float()), source[:, : prior.network.channels])
    for i, t in enumerate(times):
        expected = pipeline.scheduler.step(source[i : i + 1], int(t), x[i : i + 1]).pred_original_sample
        alpha_bar = float(pipeline.scheduler.alphas_cumprod.double()[t])
        found = prior(x[i : i + 1] / alpha_bar**0.5, (1 / alpha_bar - 1) ** 0.5)
        # the package keeps its table in single precision
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_diffusers_old_flat_folder(tmp_path, diffusers_folder):
    """Flat folders with pickled weights and the attention's former names, as of the first releases."""
    flat = tmp_path / "flat"
    flat.mkdir()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(diffusers_folder / "unet" / "diffusion_pytorch_model.safetensors")
    renamed = {}
    for key, value in weights.items():
        for today, former in old.items():
            key = key.replace(f".{today}.", f".{former}.")
        renamed[key] = value
    assert sum("proj_attn" in key for key in renamed) == 8  # four layers with attention
    torch.save(renamed, flat / "diffusion_pytorch_model.bin")
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        (flat / Path(name).name).write_text((diffusers_folder / name).read_text())
    prior = import_diffusers(flat)
    for key, value in prior.network.state_dict().items():
        assert torch.equal(value, weights[key])


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "_class_name is 'UNet2DConditionModel'"),
        ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds is 10; allowed is None"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ("unet/config.json", {"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "'SkipDownBlock2D'; allowed are"),
        ("unet/config.json", {"norm_num_groups": 7}, "norm_num_groups = 7"),
        ("unet/config.json", {"colour": 7}, "colour"),
        ("unet/config.json", {"sample_size": [16]}, r"sample_size is \[16\]"),
        ("unet/config.json", {"layers_per_block": 2}, r"missing keys: down_blocks\.0\.resnets\.1"),
        ("unet/config.json", {"mid_block_type": None}, r"unknown keys: mid_block\.attentions\.0"),
        ("unet/config.json", {"resnet_time_scale_shift": "scale_shift"}, "attentions.0.group_norm"),
        ("unet/config.json", {"time_embedding_dim": 48}, "has shape"),
        ("scheduler/scheduler_config.json", {"_class_name": "ScoreSdeVeScheduler"}, "'ScoreSdeVeScheduler'; allowed are"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "'sample'; allowed are epsilon, v_prediction"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "laplace"}, "'laplace'; allowed are linear"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ("scheduler/scheduler_config.json", {"beta_end": 1.5}, r"numbers in \(0, 1\)"),
        ("scheduler/scheduler_config.json", {"beta_start": ...}, "beta_start is missing"),
        ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "also has vqvae"),
    ],
)  # fmt: skip
def test_diffusers_refusals(tmp_path, diffusers_folder, file, change, match):
    copy = tmp_path / "copy"
    shutil.copytree(diffusers_folder, copy)
    config = json.loads((copy / file).read_text()) | change
    (copy / file).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    with pytest.raises(PriorError, match=match):
        import_diffusers(copy)


def test_diffusers_incomplete_folders(tmp_path, diffusers_folder):
    weights = "unet/diffusion_pytorch_model.safetensors"
    for file, match in [
        ("unet/config.json", "config.json is missing"),
        ("scheduler/scheduler_config.json", "scheduler_config.json is missing"),
        (weights, "but config.json"),
    ]:
        copy = tmp_path / file.replace("/", "-")
        shutil.copytree(diffusers_folder, copy)
        (copy / file).unlink()
        with pytest.raises(PriorError, match=match):
            import_diffusers(copy)
        if file != weights:
            (copy / file).write_text("{")
            with pytest.raises(PriorError, match="not valid JSON"):
                import_diffusers(copy)
    with pytest.raises(PriorError, match="is not a folder"):
        import_diffusers(tmp_path / "nothing")
    with pytest.raises(ValueError, match="options"):
        import_diffusers(diffusers_folder, options=ADMOptions(heads=1))


# --- EDM --------------------------------------------------------------------------------------------------------


def edm_reference(kind: str, **arguments) -> torch.nn.Module:
    """NVlabs' architectures, as deepinv carries them."""
    from deepinv.models import ADMUNet, NCSNpp

    small = {
        "img_resolution": 16,
        "num_blocks": 1,
        "channel_mult": (1, 2),
        "attn_resolutions": (8,),
        "pretrained": None,
    }
    if kind == "adm":
        return randomised(ADMUNet(**small | {"model_channels": 64} | arguments))
    return randomised(NCSNpp(**small | {"model_channels": 32, "model_type": kind.removesuffix("++")} | arguments))


def import_edm(file: Path, preconditioning: str = "edm", **fields) -> Prior:
    return import_prior(file, format="edm", options=EDMOptions(preconditioning), **FIGURES | fields)


@pytest.mark.parametrize("kind", ["ddpm++", "ncsn++", "adm"])
@pytest.mark.parametrize(
    "arguments", [{}, {"num_blocks": 2, "channel_mult": (1, 2, 2), "attn_resolutions": (8, 4), "in_channels": 1, "out_channels": 1}]
)  # fmt: skip
def test_edm_equals_the_reference(tmp_path, kind, arguments):
    network = edm_reference(kind, **arguments)
    channels = arguments.get("in_channels", 3)
    torch.save({f"model.{key}": value for key, value in network.state_dict().items()}, tmp_path / "x.pt")
    prior = import_edm(tmp_path / "x.pt")
    assert prior.card.image_shape == (channels, 16, 16)
    left_out = set(network.state_dict()) - set(prior.network.state_dict())
    assert left_out == ({"map_augment.weight"} if kind != "adm" else set())
    assert ("left out" in prior.card.training) == bool(left_out)
    prior = reloaded(prior, tmp_path / "prior")
    x = noisy(2, channels, 16, 8)
    noise = torch.tensor([-1.0, 0.7])
    close(prior.network(x, noise), network.forward_unet(x.clone(), noise))
    network.pixel_std = 0.5
    for sigma in (0.01, 1.0, 70.0):
        close(prior(x, sigma), network(x.clone(), sigma))


def test_edm_other_preconditionings(tmp_path):
    network = edm_reference("ddpm++")
    torch.save(network.state_dict(), tmp_path / "x.pt")
    x, sigma = noisy(1, 3, 16, 16), 2.0
    # Karras et al. 2022, Table 1
    t = ((0.1**2 + 2 * 19.9 * np.log1p(sigma**2)) ** 0.5 - 0.1) / 19.9
    vp = x - sigma * network.forward_unet(x / (1 + sigma**2) ** 0.5, torch.tensor([999 * t], dtype=torch.float32))
    torch.testing.assert_close(import_edm(tmp_path / "x.pt", "vp")(x, sigma), vp, rtol=1e-3, atol=1e-4)
    ve = x + sigma * network.forward_unet(x.clone(), torch.tensor([np.log(sigma / 2)], dtype=torch.float32))
    close(import_edm(tmp_path / "x.pt", "ve")(x, sigma), ve)


def test_edm_equals_deepinv_in_full_size():
    """deepinv's networks load the published FFHQ and AFHQ 64 x 64 files with these keys and shapes."""
    from deepinv.models import NCSNpp

    from dpnp_training.foreign.edm import architecture

    for model_type in ("ddpm", "ncsn"):
        with torch.device("meta"):
            table = NCSNpp(model_type=model_type, pretrained=None).state_dict()
            network = EDMUNet(**architecture(table, Path("ffhq")))
        del table["map_augment.weight"]
        assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in table.items()}


def test_edm_refusals(tmp_path):
    weights = edm_reference("adm").state_dict()

    def refused(match, changed, **fields):
        torch.save(changed, tmp_path / "x.pt")
        with pytest.raises(PriorError, match=match):
            import_edm(tmp_path / "x.pt", **fields)

    refused("map_label.weight: a class-conditional", weights | {"map_label.weight": torch.ones(1)})
    refused(
        r"missing keys: dec\.8x8_in0\.norm0\.bias", {k: v for k, v in weights.items() if k != "dec.8x8_in0.norm0.bias"}
    )
    refused(r"unknown keys: extra\.weight", weights | {"extra.weight": torch.ones(1)})
    refused("has shape", weights | {"enc.8x8_down.conv0.resample_filter": torch.ones(1, 1, 4, 4)})
    refused("keys enc.NxN_conv.weight", {"weight": torch.ones(1)})
    refused("takes 3 channels", weights, image_shape=(1, 16, 16))
    (tmp_path / "x.pkl").write_bytes(b"")
    with pytest.raises(PriorError, match="source code in it"):
        import_edm(tmp_path / "x.pkl")
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="allowed are edm, vp, ve"):
        import_edm(tmp_path / "x.pt", "iddpm")
    for options in (None, ADMOptions(heads=1)):
        with pytest.raises(ValueError, match="options"):
            import_prior(tmp_path / "x.pt", format="edm", options=options, **FIGURES)


def test_any_image_size(tmp_path, adm_file, diffusers_folder):
    """Sizes that the down-sampling does not divide are padded with the edge, as explicit padding shows."""
    torch.save(edm_reference("ncsn++").state_dict(), tmp_path / "x.pt")
    odd, t = noisy(1, 3, 7, 13), torch.tensor([0.5])
    padded = torch.nn.functional.pad(odd, (0, 1, 0, 1), mode="replicate")
    for prior in (import_adm(adm_file), import_diffusers(diffusers_folder), import_edm(tmp_path / "x.pt")):
        close(prior.network(odd, t), prior.network(padded, t)[..., :7, :13])
        with pytest.raises(ValueError, match=r"takes \(B, 3, H, W\)"):
            prior.network(odd[:, :2], t)


# --- command line -----------------------------------------------------------------------------------------------


def test_command_line(tmp_path, adm_file, diffusers_folder, capsys):
    def run(*arguments: str) -> None:
        auto_cli({"import": import_folder}, as_positional=True, args=["import", *arguments])

    figures = ["--data_std=0.5", "--spread=10"]
    folder = tmp_path / "faces"
    run(
        "adm",
        str(adm_file),
        str(folder),
        "--image_shape=[3,16,16]",
        "--adm.head_channels=16",
        "--license=MIT",
        *figures,
    )
    assert f"prior written to {folder}" in capsys.readouterr().out
    card = Prior.from_pretrained(folder).card
    assert (card.name, card.license, card.spread) == ("faces", "MIT", 10.0)
    run("diffusers", str(diffusers_folder), str(tmp_path / "other"), "--name=mine", *figures)
    assert Prior.from_pretrained(tmp_path / "other").card.name == "mine"
    torch.save(edm_reference("ddpm++").state_dict(), tmp_path / "x.pt")
    run("edm", str(tmp_path / "x.pt"), str(tmp_path / "third"), "--edm.preconditioning=edm", *figures)
    for arguments, match in [
        (["adm", str(adm_file), "--image_shape=[3,16,16]", *figures], "exactly one"),
        (["adm", str(adm_file), "--image_shape=[3,16,16]", "--adm.heads=4"], "data_std"),
        (["diffusers", str(diffusers_folder), "--images=/nowhere/at/all"], "does not exist"),
        (["edm", str(tmp_path / "x.pt"), "--adm.heads=4", *figures], "do not belong"),
        (["edm", str(tmp_path / "x.pt"), "--adm.heads=4", "--edm.preconditioning=ve", *figures], "both"),
    ]:
        arguments.insert(2, str(tmp_path / "none"))
        with pytest.raises(PriorError, match=match):
            run(*arguments)
    assert not (tmp_path / "none").exists()


def test_the_commands_of_the_page_are_understood():
    page = (Path(__file__).parents[2] / "docs" / "foreign_priors.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("dpnp-prior import ")]
    parser = auto_parser({"import": import_folder}, as_positional=True)
    found = [parser.parse_args(command[1:]).get("import") for command in commands]
    assert [arguments.format for arguments in found] == ["adm", "diffusers", "edm"]
    assert found[0].image_shape == (3, 256, 256)
    assert found[0].adm.head_channels == 64
    assert found[2].edm.preconditioning == "edm"

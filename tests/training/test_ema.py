"""Moving averages: half-life in images, power-function profiles, their synthesis after training, and which one is exported."""

import logging
import math
import os
import shutil
from pathlib import Path

import lightning as L  # noqa: N812 - Lightning's own convention
import numpy as np
import pytest
import torch
import torch.distributed as dist
from ema_pytorch import PostHocEMA
from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma

from dpnp_shared.networks import UNet
from dpnp_shared.prior import Prior, PriorError
from dpnp_training import ImageData, ScoreMatching
from dpnp_training.ema import EMASettings, PowerFunctionEMA, Profiles, make_ema
from dpnp_training.ema_choice import choose
from dpnp_training.export import prior_from_checkpoint
from dpnp_training.losses import DenoisingScoreMatching
from dpnp_training.post_hoc import Averages, Snapshot, coefficients, snapshot_file, write_snapshot
from dpnp_training.prior_cli import export, main

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own warnings are not ours to judge


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weight(value=0.0):
    """A network of one number, in float64: averages can be followed to rounding."""
    network = torch.nn.Linear(1, 1, bias=False).double()
    network.weight.data.fill_(value)
    return network


def follow(ema, network, batches, path):
    """Let the average follow ``path(images)``; batches are images of one optimiser step."""
    images = 0
    for batch in batches:
        images += batch
        network.weight.data.fill_(path(images))
        ema.images_seen = images
        ema.update()
    return float(ema.ema_model.weight)


# --- half-life in images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[4] * 300, [16] * 75, [4, 16, 2, 8] * 40])
@pytest.mark.parametrize(("ramp_up", "every"), [(0.05, 1), (None, 1), (0.3, 3)])
def test_half_life_is_that_of_edm(batches, ramp_up, every):
    def path(images):
        return np.sin(images / 50)

    network = weight()
    ema = make_ema(network, EMASettings(half_life_images=100, ramp_up=ramp_up, update_every=every))
    found = follow(ema, network, batches, path)
    expected, seen, last = 0.0, 0, 0
    for step, batch in enumerate(batches):
        seen += batch
        if step % every:
            continue
        half_life = 100 if ramp_up is None else min(100, last * ramp_up)
        beta = 0.5 ** ((seen - last) / max(half_life, 1e-8)) if step else 0.0  # the first update copies
        expected = beta * expected + (1 - beta) * path(seen)
        last = seen
    assert found == pytest.approx(expected, rel=1e-12)
    assert not ema.ema_model.training
    assert not any(p.requires_grad for p in ema.ema_model.parameters())


def test_half_life_does_not_depend_on_the_batch():
    """A jump of the weights at image 10,000 counts by half one half-life later, in small batches and in large ones."""
    for batch in (8, 40, 200):
        network = weight()
        settings = EMASettings(half_life_images=1000, ramp_up=0.5)
        follow_to = [batch] * (11_000 // batch)
        value = follow(make_ema(network, settings), network, follow_to, lambda images: float(images > 10_000))
        assert value == pytest.approx(0.5, rel=1e-9)


# --- power-function profiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_profile_is_the_closed_form(sigma_rel):
    gamma = sigma_rel_to_gamma(sigma_rel)
    assert np.sqrt((gamma + 1) / (gamma + 2) ** 2 / (gamma + 3)) == pytest.approx(sigma_rel)  # equation 123
    batches = np.random.default_rng(0).integers(1, 20, 400).tolist()
    t = np.cumsum(batches).astype(float)
    weights = np.random.default_rng(1).standard_normal(len(t))
    network = weight()
    found = follow(PowerFunctionEMA(network, sigma_rel), network, batches, dict(zip(t, weights, strict=True)).get)
    # weights that are constant between steps, integrated over their profile
    mass = np.diff(np.concatenate([[0.0], (t / t[-1]) ** (gamma + 1)]))
    assert found == pytest.approx(mass @ weights, rel=1e-10)
    # weights that grow with time: the mean of the profile
    found = follow(PowerFunctionEMA(network, sigma_rel), network, [1] * 5000, lambda images: images / 5000)
    assert found == pytest.approx((gamma + 1) / (gamma + 2), abs=1 / 5000)


def test_profile_is_updated_now_and_then():
    network = weight()
    ema = PowerFunctionEMA(network, 0.1, update_every=5)
    found = follow(ema, network, [3] * 1001, lambda images: images / 3003)
    gamma = sigma_rel_to_gamma(0.1)
    assert int(ema.images) == 3003
    assert found == pytest.approx((gamma + 1) / (gamma + 2), abs=5 / 1001)
    for _ in range(4):  # not due yet
        ema.update()
    with pytest.raises(ValueError, match="images_seen = 3003; the last update was at 3003"):
        ema.update()


# --- synthesis ------------------------------------------------------------------------------------------------


def random_walk(steps, dimension):
    """Weights as of a training: a random walk that settles down."""
    noise = torch.randn(800, dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (noise * torch.linspace(1, 0.1, 800, dtype=torch.float64)[:, None]).cumsum(0)[:steps] / 10


def walk(settings, also=(), *, steps=800, batch=32, dimension=16, write=True):
    """Follow a random walk; returns the checkpoint, and the averages ``also`` that were tracked directly."""
    network = torch.nn.Linear(dimension, 1, bias=False).double()
    profiles = Profiles(network, settings)
    direct = [PowerFunctionEMA(network, sigma_rel) for sigma_rel in also]
    for step, value in enumerate(random_walk(steps, dimension), 1):
        network.weight.data.copy_(value)
        profiles.update(step * batch, Path("run/ema"), write=write)
        for average in direct:
            average.images_seen = step * batch
            average.update()
    state = {f"profiles.{key}": value for key, value in profiles.state_dict().items()}
    recorded = {"profiles": profiles.widths, "snapshots": [s._asdict() for s in profiles.snapshots]}
    return {"ema": recorded, "state_dict": state}, [average.ema_model.weight for average in direct]


def test_synthesis_gives_profiles_that_were_not_kept():
    widths = (0.03, 0.07, 0.15, 0.05)
    checkpoint, direct = walk(EMASettings(profiles=[0.05, 0.1], snapshot_every_n_steps=25), widths)
    averages = Averages(checkpoint, Path("run/checkpoints/last.ckpt"))
    assert len(averages) == 2 * 32  # 31 snapshots and the checkpoint, which the last snapshot repeats
    assert averages.left_out == []
    ema_05, ema_10 = (checkpoint["state_dict"][f"profiles.averages.{i}.ema_model.weight"] for i in (0, 1))
    scale = float((ema_05 - ema_10).norm())  # what the choice of a profile is about
    tolerances = (0.02, 0.005, 0.01, 1e-7)  # an error is the root of a difference of rounded numbers
    for sigma_rel, tracked, tolerance in zip(widths, direct, tolerances, strict=True):
        found = averages.synthesise(sigma_rel)["weight"]
        assert float((found - tracked).norm()) < tolerance * scale, sigma_rel
        assert averages.error(sigma_rel) < 2 * tolerance
    assert float((direct[1] - ema_05).norm()) > 0.1 * scale  # which neither of the two kept ones would give


def test_synthesis_equals_that_of_ema_pytorch():
    """The same averages at the same times, combined by ``PostHocEMA`` and by ours."""
    network = torch.nn.Linear(8, 1)
    theirs = PostHocEMA(
        network, sigma_rels=(0.05, 0.1), update_every=1, checkpoint_every_num_steps=20,
        checkpoint_folder="theirs", checkpoint_dtype=torch.float32,
    )  # fmt: skip
    snapshots = []
    for step, value in enumerate(random_walk(400, 8).float(), 1):
        network.weight.data.copy_(value)
        theirs.update()
        if step % 20 == 0:
            states = [average.ema_model.state_dict() for average in theirs.ema_models]
            snapshots.append(write_snapshot(Path("run/ema", snapshot_file(step)), [0.05, 0.1], states, step))
    state = {
        f"profiles.averages.{i}.ema_model.{name}": value
        for i, average in enumerate(theirs.ema_models)
        for name, value in average.ema_model.state_dict().items()
    }
    state["profiles.averages.0.images"] = torch.tensor(400)
    recorded = {"profiles": [0.05, 0.1], "snapshots": [s._asdict() for s in snapshots]}
    averages = Averages({"ema": recorded, "state_dict": state}, Path("run/checkpoints/last.ckpt"))
    for sigma_rel in (0.04, 0.07, 0.12):
        expected = theirs.synthesize_ema_model(sigma_rel=sigma_rel).ema_model.state_dict()
        found = averages.synthesise(sigma_rel)
        for name, value in expected.items():  # theirs does not bring the sum of the factors, 1 to 2e-4, to 1
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name], value, rtol=5e-4, atol=5e-4)


def test_factors_are_the_least_squares_of_the_profiles():
    images, widths, at, wanted = [400, 400, 700, 700, 1000, 1000], [0.05, 0.1] * 3, 1000, 0.08
    found, error = coefficients(images, widths, at, wanted)
    tau = (np.arange(200_000) + 0.5) / 200_000 * at

    def profile(t, sigma_rel):
        gamma = sigma_rel_to_gamma(sigma_rel)
        return (gamma + 1) / t * (tau / t) ** gamma * (tau <= t)

    basis = np.stack([profile(t, s) for t, s in zip(images, widths, strict=True)], axis=1)
    target = profile(at, wanted)
    expected = np.linalg.lstsq(basis, target, rcond=None)[0]
    expected /= expected.sum()
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert error == pytest.approx(np.linalg.norm(basis @ expected - target) / np.linalg.norm(target), rel=1e-3)
    assert coefficients(images, widths, at, 0.1) == (
        pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-9),
        pytest.approx(0, abs=1e-6),
    )
    with pytest.raises(ValueError, match=r"σ_rel = 0\.3; it must be in \(0, 0\.289\)"):
        coefficients(images, widths, at, 0.3)


def test_a_width_out_of_reach_is_refused():
    checkpoint, _ = walk(EMASettings(profiles=[0.05, 0.1]), steps=100)
    averages = Averages(checkpoint, Path("run/checkpoints/last.ckpt"))
    assert not Path("run").exists()  # no snapshots were asked for
    averages.synthesise(0.07)
    with pytest.raises(PriorError, match=r"σ_rel = 0\.2: the 2 averages .* 0 snapshots .* to 60% only, at most 10%"):
        averages.synthesise(0.2)


# --- snapshots ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process ended here: nothing catches it."""


def test_a_kill_between_write_and_rename_leaves_no_half_snapshot(monkeypatch):
    settings = EMASettings(profiles=[0.05, 0.1], snapshot_every_n_steps=25)
    checkpoint, _ = walk(settings, steps=100)
    whole = {path.name: path.read_bytes() for path in Path("run/ema").iterdir()}
    assert sorted(whole) == [snapshot_file(step) for step in (25, 50, 75, 100)]
    assert Path("run/ema", snapshot_file(25)).stat().st_mode & 0o777 == 0o644
    for path in Path("run/ema").iterdir():
        path.unlink()

    replace = os.replace

    def dies(source, target):
        if "00000075" in str(target):
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", dies)
        with pytest.raises(Killed):
            walk(settings, steps=100)
    part = Path(f"run/ema/{snapshot_file(75)}.part")
    assert part.is_file()
    assert not Path("run/ema", snapshot_file(75)).exists()
    part.write_bytes(part.read_bytes()[:100])  # and the disk had only seen its beginning
    before = Averages(checkpoint, Path("run/checkpoints/last.ckpt"))
    assert len(before) == 2 * 3  # two snapshots and the checkpoint
    assert before.left_out == [f"{Path('run/ema').resolve()}/{snapshot_file(75)} is missing"]
    walk(settings, steps=100)  # started again, it writes the same
    assert {path.name: path.read_bytes() for path in Path("run/ema").iterdir()} == whole


def test_only_snapshots_of_this_training_are_used():
    settings = EMASettings(profiles=[0.05, 0.1], snapshot_every_n_steps=25)
    checkpoint, _ = walk(settings, steps=110)
    kept = Averages(checkpoint, Path("run/checkpoints/last.ckpt"))
    assert len(kept) == 2 * 5
    expected = kept.synthesise(0.07)["weight"]
    walk(settings, steps=140)  # goes on in the same folder: later snapshots are not the checkpoint's
    again = Averages(checkpoint, Path("run/checkpoints/last.ckpt"))
    assert torch.equal(again.synthesise(0.07)["weight"], expected)
    file = Path("run/ema", snapshot_file(50))
    states = [{"weight": torch.full((1, 16), 1.0 + i)} for i in range(2)]
    write_snapshot(file, [0.05, 0.1], states, 50 * 32)
    changed = Averages(checkpoint, Path("run/checkpoints/last.ckpt"))
    assert len(changed) == 2 * 4
    assert changed.left_out == [f"{file.resolve()} is not the file that this checkpoint's training wrote"]


@pytest.mark.parametrize("trouble", ["full disk", "no folder"])
def test_trouble_with_the_disk_does_not_end_the_training(trouble, monkeypatch, caplog):
    def full(tensors, file, **_options):
        file.write_bytes(b"begun")
        raise OSError(28, "No space left on device")

    if trouble == "full disk":
        monkeypatch.setattr("dpnp_training.post_hoc.save_file", full)
    else:
        Path("run").write_text("a file")
    checkpoint, _ = walk(EMASettings(profiles=[0.05], snapshot_every_n_steps=50), steps=60)
    assert "step_00000050.safetensors of the moving averages could not be written, training goes on" in caplog.text
    assert checkpoint["ema"]["snapshots"] == []
    assert trouble == "no folder" or list(Path("run/ema").iterdir()) == []


def test_other_processes_average_and_do_not_write():
    settings = EMASettings(profiles=[0.05, 0.1], snapshot_every_n_steps=10)
    first, _ = walk(settings, steps=30)
    written = {path: path.stat().st_mtime_ns for path in Path("run/ema").iterdir()}
    second, _ = walk(settings, steps=30, write=False)
    assert {path: path.stat().st_mtime_ns for path in Path("run/ema").iterdir()} == written
    assert second["ema"]["snapshots"] == []
    for key, value in first["state_dict"].items():
        assert torch.equal(second["state_dict"][key], value)


def test_snapshots_of_sharded_averages_are_whole():
    """One process that shards as many would (fully_shard): the same averages, and a snapshot of plain tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    settings = EMASettings(profiles=[0.05, 0.1], snapshot_every_n_steps=10)
    plain, _ = walk(settings, steps=10)
    expected = Path("run/ema", snapshot_file(10)).read_bytes()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        network = torch.nn.Linear(16, 1, bias=False).double()
        profiles = Profiles(network, settings)
        for module in (network, *(average.ema_model for average in profiles.averages)):
            fully_shard(module, mesh=mesh)
        for step, value in enumerate(random_walk(10, 16), 1):
            network.weight.data.copy_(distribute_tensor(value[None], mesh, [Shard(0)]))
            profiles.update(step * 32, Path("sharded/ema"), write=True)
        assert isinstance(profiles.averages[0].ema_model.weight, DTensor)
    finally:
        dist.destroy_process_group()
    assert Path("sharded/ema", snapshot_file(10)).read_bytes() == expected
    assert [s._asdict() for s in profiles.snapshots] == plain["ema"]["snapshots"]


# --- in training ----------------------------------------------------------------------------------------------


class Save(L.Callback):
    """The last state of a training, as the product's callbacks keep it."""

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/checkpoints/last.ckpt")


def train(root, ema, *, steps=-1, epochs=None, accumulate=1, batch=4, channels=1, resume=None, **options):
    L.seed_everything(0)
    shape = (48, 8, 6) if channels == 1 else (48, 8, 6, channels)
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    network = UNet(channels=channels, widths=[8], blocks=1, attention=[], embedding=8)
    options = {"learning_rate": 1e-2, "warmup_steps": 0, "decay": "constant", "noise_bands": (0.05, 0.5, 5.0)} | options
    module = ScoreMatching(network, ema=ema, seed=3, **options)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=root, val_check_interval=4,
        check_val_every_n_epoch=None, accumulate_grad_batches=accumulate, num_sanity_val_steps=0, callbacks=[Save()],
    )  # fmt: skip
    trainer.fit(module, ImageData("x.npy", validation_fraction=0.25, batch_size=batch), ckpt_path=resume)
    return f"{root}/checkpoints/last.ckpt", trainer, module


def load(file):
    return torch.load(file, weights_only=True)


def test_resumed_training_keeps_all_averages_bit_for_bit():
    ema = EMASettings(half_life_images=20.0, profiles=[0.05, 0.1], snapshot_every_n_steps=5)
    straight = load(train("straight", ema, epochs=2)[0])
    first, *_ = train("resumed", ema, epochs=1)
    resumed = load(train("resumed", ema, epochs=2, resume=first)[0])
    assert straight["state_dict"].keys() == resumed["state_dict"].keys()
    for key, value in straight["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], value), key
    assert resumed["ema"] == straight["ema"]
    assert [Snapshot(**s).images for s in resumed["ema"]["snapshots"]] == [20, 40, 60]
    for name in (snapshot_file(step) for step in (5, 10, 15)):
        assert Path("resumed/ema", name).read_bytes() == Path("straight/ema", name).read_bytes()


def test_images_are_counted_over_accumulated_batches():
    ema = EMASettings(half_life_images=30.0, ramp_up=None, profiles=[0.05, 0.1])
    _, _, plain = train("plain", ema, steps=3, batch=12)
    _, _, accumulated = train("accumulated", ema, steps=3, batch=4, accumulate=3)
    for module in (plain, accumulated):
        assert int(module.ema.images) == int(module.profiles.averages[1].images) == module.images_seen == 36
        assert int(module.ema.step) == 3


def test_another_configuration_does_not_resume():
    file, *_ = train("run", EMASettings(profiles=[0.05]), steps=2)
    with pytest.raises(ValueError, match=r"model\.ema\.profiles = \[0\.1\]; the checkpoint's training has \[0\.05\]"):
        train("run", EMASettings(profiles=[0.1]), steps=3, resume=file)
    with pytest.raises(ValueError, match=r"does not have model\.ema\.half_life_images"):
        train("run", EMASettings(profiles=[0.05], half_life_images=10.0), steps=3, resume=file)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 3 * 4 / 48), ("sqrt", 0.5), ("none", 1.0)])
def test_learning_rate_follows_the_global_batch(rule, factor, capfd, caplog):
    with caplog.at_level(logging.INFO):
        _, trainer, _ = train(
            "run", None, steps=2, accumulate=3, scale_learning_rate=rule, reference_batch=48, learning_rate=0.01
        )
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * factor)
    said = "0.01 for 48 images a step" in caplog.text + capfd.readouterr().err
    assert said == (rule != "none")


# --- export ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training with profiles: its folder, the averages at its end, and the validation loss of the main one."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ema = EMASettings(beta=0.99, profiles=[0.05, 0.1], snapshot_every_n_steps=1)
        _, trainer, module = train("run", ema, steps=12)
        (figures,) = trainer.validate(module, trainer.datamodule, verbose=False)
    return folder, module, figures["val/loss"]


FILE = "run/checkpoints/last.ckpt"


@pytest.fixture
def run(trained):
    """A copy of it."""
    shutil.copytree(trained[0], ".", dirs_exist_ok=True)
    return trained[1:]


def test_export_of_the_main_average_and_of_a_width(run):
    module, loss = run
    export(FILE, "main", samples=0)
    average = Prior.from_pretrained("main")
    for name, value in average.network.state_dict().items():
        assert torch.equal(value, module.ema.ema_model.state_dict()[name])
    assert average.card.metrics["val/loss"] == pytest.approx(loss, rel=1e-5)

    Path("run/samples").mkdir()
    Path("run/samples/step_00000012.png").write_bytes(b"of the main average")
    main(["export", FILE, "narrow", "--samples", "1", "--ema", "0.05"])
    assert Path("narrow/samples.png").read_bytes().startswith(b"\x89PNG")  # not that of the main average
    narrow = Prior.from_pretrained("narrow")
    for name, value in narrow.network.state_dict().items():
        torch.testing.assert_close(value, module.profiles.averages[0].ema_model.state_dict()[name])
    assert narrow.card.metrics == {}  # those of the main average are not its own
    assert narrow.card.validation == {}
    assert narrow.card.training["moving average"].startswith("power function, σ_rel = 0.05, from 24 averages")


def test_the_best_average_is_exported(run, capsys):
    _, loss = run
    main(["export", FILE, "best", "--samples", "0", "--ema", "best"])
    out = capsys.readouterr().out
    best = Prior.from_pretrained("best")
    losses = best.card.training["validation loss by moving average"]
    assert losses["main"] == pytest.approx(loss, rel=1e-5)  # that of training: the same noise on the same images
    assert {"main", "0.05", "0.07", "0.1", "0.15"} <= losses.keys()
    assert list(losses) == sorted(losses, key=losses.get)
    assert best.card.metrics["val/loss"] == pytest.approx(losses[next(iter(losses))], rel=1e-5)
    lines = out.splitlines()
    assert "(exported)" in lines[lines.index("  average         loss       above the best") + 1]
    assert "left out: σ_rel = 0.02: too few snapshots" in lines
    # what the card says of the exported weights is measured again to the same figures
    main(["verify", "best", "--data", "x.npy"])
    assert "all of it holds" in capsys.readouterr().out


@pytest.mark.parametrize("channels", [1, 3])
def test_the_best_is_found_wherever_it_stands(channels):
    file, *_ = train("run", EMASettings(profiles=[0.05, 0.1]), steps=4, channels=channels)
    spoiled = {"ema.ema_model.": {0.1, 0.06}, "profiles.averages.0.ema_model.": {None, 0.1}}

    def choice_among(prefix, value):
        checkpoint = load(file)
        for name, weights in checkpoint["state_dict"].items():
            if name.startswith(prefix) and weights.is_floating_point():
                weights.fill_(value)
        torch.save(checkpoint, "run/checkpoints/spoiled.ckpt")
        return choose("run/checkpoints/spoiled.ckpt", widths=[0.1, 0.06])

    for prefix, whole in spoiled.items():
        choice = choice_among(prefix, 0.3)
        assert {candidate.sigma_rel for candidate in choice.candidates[:2]} == whole
        difference, error = choice.candidates[2].above(choice.candidates[0])
        assert difference > 5 * error > 0
        expected = choice.candidates[0].sigma_rel
        said = choice.prior.card.training["moving average"]
        assert said == "main" if expected is None else said.startswith(f"power function, σ_rel = {expected:g},")
    choice = choice_among("ema.ema_model.", math.nan)
    assert [candidate.sigma_rel is None for candidate in choice.candidates] == [False, False]
    assert choice.left_out == ["main: its loss is not finite"]
    with pytest.raises(PriorError, match="the validation loss of no average is finite"):
        choice_among(("ema.ema_model.", "profiles."), math.nan)


def test_bad_choices_are_refused(run):
    bare, *_ = train("bare", None, steps=1)
    for choice in ("best", "0.07"):
        with pytest.raises(PriorError, match=r"tracked no profiles \(model\.ema\.profiles\)"):
            export(bare, "out", ema=choice)
    early, *_ = train("early", EMASettings(profiles=[0.05, 0.1]), steps=1)
    with pytest.raises(SystemExit, match=r"ema = 'fast'; it may be main, best, or a relative width"):
        main(["export", FILE, "out", "--ema", "fast"])
    np.save("y.npy", np.zeros((48, 8, 6), dtype=np.uint8))
    for file, arguments, error, message in [
        (FILE, {"ema": "0.4"}, ValueError, r"σ_rel = 0\.4; it must be in \(0, 0\.289\)"),
        (FILE, {"ema": "nan"}, ValueError, "σ_rel = nan"),
        (FILE, {"ema": "0.01"}, PriorError, "24 averages at hand"),
        (FILE, {"ema_widths": [0.05]}, ValueError, "ema_widths and data are for ema = 'best'; ema = 'main'"),
        (early, {"ema": "best"}, PriorError, "does not say how its training was validated"),
        (FILE, {"ema": "best", "data": "nothing.npy"}, FileNotFoundError, "does not exist"),
        (FILE, {"ema": "best", "ema_widths": [0.01]}, PriorError, "24 averages at hand"),
        (FILE, {"ema": "best", "data": "y.npy"}, PriorError, "not the images that the training was validated"),
    ]:
        with pytest.raises(error, match=message):
            export(file, "out", **arguments)

    class Own(DenoisingScoreMatching):
        def weight(self, sigma):
            return sigma

    own, *_ = train("own", EMASettings(profiles=[0.05, 0.1]), steps=1, loss=Own())
    with pytest.raises(PriorError, match="weights of its own"):
        export(own, "out", ema="best")
    prior_from_checkpoint(own, sigma_rel=0.07)
    assert not Path("out").exists()


def test_missing_snapshots_are_said(run, caplog):
    Path("run/ema", snapshot_file(3)).unlink()
    export(FILE, "out", samples=0, ema="0.07")
    assert f"left out: {Path('run/ema').resolve()}/{snapshot_file(3)} is missing" in caplog.text
    assert "from 22 averages" in Prior.from_pretrained("out").card.training["moving average"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"half_life_images": 0}, "half_life_images = 0 must be positive"),
        ({"half_life_images": 10, "beta": 0.9}, r"half_life_images = 10 and beta = 0\.9; give one of them"),
        ({"half_life_images": 10, "ramp_up": 0}, "ramp_up = 0 must be positive"),
        ({"profiles": [0.3]}, r"profiles = \[0\.3\]; needed are different σ_rel in \(0, 0\.289\)"),
        ({"profiles": [0.1, 0.1]}, "different"),
        ({"profiles": [0.1], "snapshot_every_n_steps": 0}, "snapshot_every_n_steps = 0; at least update_every = 1"),
        ({"profiles": [0.1], "snapshot_every_n_steps": 9, "update_every": 10}, "at least update_every = 10"),
        ({"snapshot_every_n_steps": 5}, "snapshot_every_n_steps = 5 needs profiles"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EMASettings(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"scale_learning_rate": "cubic", "reference_batch": 8},
            "scale_learning_rate = 'cubic'; allowed are none, linear",
        ),
        ({"scale_learning_rate": "sqrt"}, "scale_learning_rate = 'sqrt' needs reference_batch"),
        ({"scale_learning_rate": "sqrt", "reference_batch": 0}, "reference_batch = 0; it must be positive"),
    ],
)
def test_bad_rules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScoreMatching(UNet(channels=1, widths=[8], blocks=1, attention=[], embedding=8), **arguments)

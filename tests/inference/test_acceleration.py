"""Compiled, in another memory format, in lower precision or in smaller batches: the draws are the same to the stated tolerance."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dpnp_inference import Annealing, DPnP, acceleration, cli
from dpnp_inference.acceleration import Batched, CompileError, Fitting, accelerate, images_that_fit, in_batches
from dpnp_inference.configuration import Configuration
from dpnp_inference.fingerprint import describe
from dpnp_shared.analytic import GaussianMixturePrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.networks import UNet
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import RandomInpainting
from dpnp_shared.preconditioning import EDM
from dpnp_shared.prior import Prior, PriorCard

SHAPE = (1, 8, 8)
MODEL = ForwardModel(RandomInpainting(SHAPE, missing=0.5), GaussianNoise(0.1))
Y = MODEL.simulate(torch.zeros(1, *SHAPE), generator=torch.Generator().manual_seed(1))[0]
SHORT = Annealing(constant=1, decay=3, final=1)
MIXTURE = GaussianMixturePrior(torch.eye(64)[:5] * 3, "equal", 0.1, SHAPE)


def make_prior() -> Prior:
    """An untrained U-Net whose output is not zero, in the memory format that priors are loaded in."""
    torch.manual_seed(0)
    network = UNet(1, widths=(8, 16), blocks=1, attention=(1,), head_channels=8, embedding=16)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    card = PriorCard("tiny", SHAPE, sigma_range=(0.002, 80.0), spread=2.0)
    return Prior(network, EDM(), card).eval().requires_grad_(False).to(memory_format=torch.channels_last)


class Tiny(torch.nn.Module):
    """Two convolutions, quickly compiled."""

    def __init__(self):
        super().__init__()
        self.hyperparameters = {}
        self.first, self.last = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, noise):
        return self.last((self.first(x) + noise[:, None, None, None]).tanh())


@pytest.fixture
def prior():
    torch._dynamo.reset()
    return make_prior()


@pytest.fixture
def tiny():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Prior(Tiny(), EDM(), PriorCard("tiny", SHAPE, sigma_range=(0.002, 80.0), spread=2.0)).requires_grad_(False)


def draw(prior, model=MODEL, chains=5, **arguments):
    return DPnP(prior, model, annealing=SHORT).sample(Y, chains=chains, seed=0, **arguments)


@pytest.mark.parametrize(
    ("chains", "batch_size", "population"),
    [(5, None, False), (5, 2, False), (5, "auto", False), (7, 4, True), (7, "auto", True)],
)
def test_a_compiled_network_draws_the_same_and_is_compiled_once(tiny, monkeypatch, chains, batch_size, population):
    sampler = DPnP(tiny, MODEL, annealing=SHORT, population=population)
    eager = sampler.sample(Y, chains=chains, seed=0)
    counter = CompileCounter()
    monkeypatch.setattr(acceleration, "compile_options", lambda how: {"backend": counter})
    accelerate(tiny, compile=True)
    compiled = sampler.sample(Y, chains=chains, seed=0, batch_size=batch_size)
    # the iterations have different numbers of calls at different σ, and the last batch has fewer chains
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled.samples, eager.samples, rtol=1e-4, atol=1e-4)


def test_a_compiled_prior_still_saves_and_loads(prior, tmp_path):
    accelerate(prior, compile="eager")
    prior.save_pretrained(tmp_path / "prior")
    loaded = Prior.from_pretrained(tmp_path / "prior")
    assert torch.equal(loaded(torch.ones(1, *SHAPE), 1.0), prior(torch.ones(1, *SHAPE), 1.0))


def test_what_cannot_be_compiled_is_named(tiny, monkeypatch):
    def broken(graph, inputs):
        raise OSError("no C++ compiler")

    monkeypatch.setattr(acceleration, "compile_options", lambda how: {"backend": broken})
    accelerate(tiny, compile=True)
    with pytest.raises(CompileError, match=r"compile = True.*no C\+\+ compiler.*Leave the option away"):
        draw(tiny)
    with pytest.raises(ValueError, match="compile = 'fastest'; allowed are true, false, a mode"):
        accelerate(tiny, compile="fastest")
    with pytest.raises(ValueError, match="compile = True; GaussianMixturePrior has no network"):
        accelerate(MIXTURE, compile=True)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_memory_format_changes_rounding_only(prior, channels_last):
    before = draw(prior)
    accelerate(prior, channels_last=channels_last)
    weight = prior.network.middle[0].conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    torch.testing.assert_close(draw(prior).samples, before.samples, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_stays_within_the_network(prior, tmp_path, precision):
    prior.save_pretrained(tmp_path / "prior")
    common = {"prior": str(tmp_path / "prior"), "operator": MODEL.operator, "noise": MODEL.noise, "annealing": SHORT}
    full, _ = Configuration(**common).sampler(demo=False)
    half, _ = Configuration(**common, precision=precision).sampler(demo=False)
    dtype = getattr(torch, precision)
    seen = set()
    half.prior.network.register_forward_pre_hook(lambda network, inputs: seen.add(inputs[0].dtype))
    samples = [sampler.sample(Y, chains=4, seed=0).samples for sampler in (full, half)]
    assert seen == {dtype}
    assert samples[1].dtype == half.blank().dtype == torch.float32
    # the kernels are those of float32: pixels that are measured hardly depend on the network
    error = (samples[1] - samples[0]).square().mean().sqrt()
    assert 0 < error < 8 * torch.finfo(dtype).eps


class Limited(GaussianMixturePrior):
    """Has memory for so many images; records the calls that it could answer."""

    def __init__(self, most):
        super().__init__(MIXTURE.means, MIXTURE.log_weights.exp(), 0.1, SHAPE)
        self.most, self.seen, self.failed = most, [], 0

    def forward(self, x, sigma):
        if len(x) > self.most:
            self.failed += 1
            raise torch.cuda.OutOfMemoryError(f"{len(x)} images")
        self.seen.append(len(x))
        return super().forward(x, sigma)


@pytest.mark.parametrize("most", [1, 5, 13, 16, 100])
def test_auto_ends_at_the_largest_batch_that_fits(most, monkeypatch):
    monkeypatch.setattr(acceleration, "images_that_fit", lambda *arguments: 10**6)
    prior = Limited(most)
    samples = draw(prior, chains=16, batch_size="auto").samples
    assert max(prior.seen[-8:]) == min(most, 16)
    assert prior.failed <= 5
    torch.testing.assert_close(samples, draw(MIXTURE, chains=16).samples, rtol=1e-5, atol=1e-5)
    # remembered
    prior.failed = 0
    draw(prior, chains=16, batch_size="auto")
    assert prior.failed == 0


def test_auto_finds_a_smaller_batch_when_memory_shrinks(monkeypatch):
    monkeypatch.setattr(acceleration, "images_that_fit", lambda *arguments: 10**6)
    prior = Limited(16)
    draw(prior, chains=16, batch_size="auto")
    prior.most = 3
    samples = draw(prior, chains=16, batch_size="auto").samples
    assert max(prior.seen[-8:]) == 3
    torch.testing.assert_close(samples, draw(MIXTURE, chains=16).samples, rtol=1e-5, atol=1e-5)


def test_an_image_that_does_not_fit_is_an_error():
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Fitting(Limited(0), 4)(torch.zeros(4, *SHAPE), 1.0)


def test_on_a_cpu_the_memory_of_a_few_images_tells_how_many_fit(monkeypatch):
    image = 16 * 2**20  # bytes

    class Hungry(GaussianMixturePrior):
        def forward(self, x, sigma):
            torch.ones(len(x), image, dtype=torch.uint8)
            return x

    prior = Hungry(MIXTURE.means, "equal", 0.1, SHAPE)
    monkeypatch.setattr(acceleration, "_free_memory", lambda: 100 * image)
    found = images_that_fit(prior, torch.zeros(1, *SHAPE), 1.0, 64)
    assert 35 <= found <= 60  # half of what 100 images take
    assert acceleration._free_memory() > 0


def test_free_memory_heeds_the_machine():
    assert 2**20 < acceleration._free_memory() < 2**50


def test_the_device_must_tell_its_memory():
    with pytest.raises(ValueError, match="batch_size = 'auto' is not for a device of type meta"):
        Fitting(MIXTURE, 2)(torch.zeros(2, *SHAPE, device="meta"), 1.0)


@pytest.mark.parametrize("sigma", [0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.linspace(0.1, 2, 5)])
@pytest.mark.parametrize("whole", [False, True])
def test_parts_give_what_the_whole_gives(sigma, whole):
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    for size in (1, 2, 4, 5, 9):
        prior = Limited(size)
        torch.testing.assert_close(Batched(prior, size, whole=whole)(x, sigma), MIXTURE(x, sigma))
        assert not whole or set(prior.seen) == {size}


@pytest.mark.parametrize(("batch_size", "times"), [(None, 1), (2, 3), (5, 1)])
def test_the_record_counts_calls_under_batches(batch_size, times):
    prior = Limited(5)
    whole = draw(Limited(5)).diagnostics["network_calls"]
    recorded = draw(prior, batch_size=batch_size).diagnostics["network_calls"]
    assert (
        recorded == times * whole == len(prior.seen) - times
    )  # the start looks up the prior's mean, by a call on one image


def test_batch_size_is_checked():
    assert in_batches(MIXTURE, 5, 5) is MIXTURE
    for wrong in (0, -1, "many", 2.5):
        with pytest.raises(ValueError, match=r"batch_size = .*; it must be at least 1, or 'auto'"):
            draw(MIXTURE, batch_size=wrong)


def test_the_command_line_has_the_options(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("dpnp_inference.configuration.accelerate", lambda prior, **options: calls.append(options))
    cli.main(
        f"--output {tmp_path}/run --chains 3 --compile reduce-overhead --channels_last false --batch_size auto "
        "--dds dpnp_inference.dds.DDSDDIM --dds.calls 1 "
        "--annealing dpnp_inference.annealing.Annealing --annealing.decay 1 --annealing.final 0".split()
    )
    assert calls == [{"compile": "reduce-overhead", "channels_last": False}]
    assert (tmp_path / "run" / "mean.npy").is_file()


def test_a_run_knows_whether_its_network_was_compiled(tiny):
    eager = describe(tiny)
    accelerate(tiny, compile="eager")
    assert describe(tiny) == describe(tiny) != eager

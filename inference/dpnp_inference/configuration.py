"""What every command of ``dpnp-reconstruct`` is given: a prior, a forward model and a way to sample."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch

from dpnp_inference.annealing import Annealing
from dpnp_inference.baselines import Baseline
from dpnp_inference.dds import DenoisingSampler
from dpnp_inference.dpnp import DPnP
from dpnp_inference.population import Population
from dpnp_inference.proximal import ProximalSampler
from dpnp_inference.replica_exchange import ReplicaExchange
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, Noise
from dpnp_shared.operators import Operator, RandomInpainting, as_operator
from dpnp_shared.prior import Prior, PriorCard, locate

BUNDLED = "fashion_mnist"
TEST_IMAGES = "test_images.npz"
OF_DPNP = ("dds", "proximal", "annealing", "population")  # options that other solvers do not have
Precision = Literal["float32", "float64", "bfloat16", "float16"]


class NamedProximal(Protocol):
    """A proximal sampler as a class path names it: the parser compares types one by one, and each sampler has a state of its own."""

    def init(self, forward_model: Any, y: Any, x: Any) -> Any:
        """See :class:`~dpnp_inference.proximal.ProximalSampler`, also for what follows."""
        ...

    def step(self, state: Any, x: Any, eta: Any, *, generator: Any) -> Any: ...  # noqa: D102

    def select(self, state: Any, index: Any) -> Any: ...  # noqa: D102


class Solver(Protocol):
    """A sampler other than DPnP as a class path names it, to be made when prior and forward model are there."""

    def __call__(self, prior: Denoiser, forward_model: ForwardModel, *, dtype: torch.dtype) -> Baseline:
        """The sampler; ``dtype`` is that of its images."""
        ...


@dataclass
class Configuration:
    """A prior, a forward model and a way to sample: what a reconstruction and its check have in common.

    Args:
        prior: folder of a prior, the name of a bundled one, or a Hub id; or an analytic prior by class_path and init_args.
        operator: noiseless forward map, by class_path and init_args, or path/to/file.py:Name for your own.
        noise: noise model, by class_path and init_args, or path/to/file.py:Name for your own.
        solver: DPnP, or another method by its name (DPS, PnPDM, …) or by class_path and init_args. The next four options are DPnP's alone;
            the others' settings are given as --solver.NAME, and --solver.help DPS lists those of DPS.
        dds: denoising sampler.
        proximal: proximal sampler; auto takes the most exact one that the forward model allows.
        annealing: coupling schedule; auto takes its ends from the prior and the noise.
        population: true for particles that are weighted and resampled, which gives separated modes their right weights;
            dpnp_inference.population.Population or dpnp_inference.replica_exchange.ReplicaExchange for settings of one's own.
        seed: of all randomness, not negative.
        batch_size: chains that run together; all by default.
        device: auto, cpu, cuda, cuda:1, mps, …
        precision: float32 and float64 for everything; bfloat16 and float16 for the network alone.
        output: folder to write.
        overwrite: replace an earlier run in that folder.
        trusted_modules: modules outside of this package whose network classes a prior may name.
    """

    prior: Denoiser | str = BUNDLED
    operator: Operator | Callable | None = None  # type: ignore[type-arg] # jsonargparse wants it bare
    noise: Noise | None = None
    solver: Literal["DPnP"] | Solver = "DPnP"
    dds: Literal["ddim", "ddpm"] | DenoisingSampler = "ddim"
    proximal: Literal["auto"] | NamedProximal = "auto"
    annealing: Literal["auto"] | Annealing = "auto"
    population: bool | Population | ReplicaExchange = False
    seed: int = 0
    batch_size: int | None = None
    device: str = "auto"
    precision: Precision = "float32"
    output: str | None = None
    overwrite: bool = False
    trusted_modules: list[str] | None = None

    def models(self, *, demo: bool) -> tuple[Denoiser, PriorCard, ForwardModel]:
        """Prior and forward model on their device, and the prior's card.

        Args:
            demo: whether the demo's forward model stands in where none is given.

        Raises:
            ValueError: there is no forward model, or half of one.
            PriorError: the prior cannot be loaded.
        """
        device = find_device(self.device)
        prior = self.prior
        if isinstance(prior, str):
            prior = Prior.from_pretrained(prior, trusted_modules=self.trusted_modules or ())
        prior.to(device=device)
        if next(prior.parameters(), None) is not None:  # closed forms keep their own precision
            prior.to(dtype=getattr(torch, self.precision))
        card = prior.card if isinstance(prior, Prior) else PriorCard(type(prior).__name__, prior.image_shape)
        operator, noise = self.operator, self.noise
        if demo and (operator is None) != (noise is None):
            raise ValueError("operator and noise: give both or neither")
        if demo and operator is None:
            operator, noise = RandomInpainting(card.image_shape, missing=0.5, seed=0), GaussianNoise(0.05)
        if operator is None or noise is None:
            raise ValueError("operator and noise are both needed with a measurement or an image of your own")
        forward_model = ForwardModel(as_operator(operator, card.image_shape), noise)
        return prior, card, forward_model.to(device=device, dtype=self.image_dtype)

    def sampler(self, *, demo: bool) -> tuple[DPnP | Baseline, PriorCard]:
        """The sampler on its device, and its prior's card; see :meth:`models`.

        Raises:
            ValueError: options that DPnP alone has, beside another solver; and as :meth:`models` and the solver say.
            TypeError: the solver is not for this forward model.
        """
        if isinstance(self.solver, str):
            prior, card, forward_model = self.models(demo=demo)
            dpnp = DPnP(
                prior,
                forward_model,
                dds=self.dds,
                proximal=cast('Literal["auto"] | ProximalSampler', self.proximal),
                annealing=self.annealing,
                population=self.population,
                dtype=self.image_dtype,
            )
            return dpnp, card
        given = [name for name in OF_DPNP if getattr(self, name) != getattr(Configuration, name)]
        if given:
            raise ValueError(
                f"{', '.join(given)}: of the solver DPnP alone; leave {'it' if len(given) == 1 else 'them'} out beside another solver, "
                "whose own settings are given as solver.NAME"
            )
        prior, card, forward_model = self.models(demo=demo)
        return self.solver(prior, forward_model, dtype=self.image_dtype), card

    @property
    def image_dtype(self) -> torch.dtype:
        """Of images and kernels."""
        return torch.float64 if self.precision == "float64" else torch.float32


def find_device(name: str) -> torch.device:
    """The device of a name; ``auto`` takes an accelerator if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def bundled_images(prior: Denoiser | str) -> Path:
    """Held-out test images that lie beside a bundled prior."""
    file = locate(prior) / TEST_IMAGES if isinstance(prior, str) else None
    if file is None or not file.is_file():
        name = prior if isinstance(prior, str) else type(prior).__name__
        raise ValueError(f"the prior {name!r} has no test images of its own; give image or measurement")
    return file


def title_of(sampler: DPnP | Baseline, card: PriorCard) -> str:
    """One line that says what a run is of, for its picture."""
    model = sampler.forward_model
    return f"{card.name}: {type(model.operator).__name__}, {type(model.noise).__name__}, by {type(sampler).__name__}"


def provenance(
    settings: Configuration, sampler: DPnP | Baseline, card: PriorCard, config: dict[str, Any], arguments: list[str]
) -> dict[str, Any]:
    """Where a result comes from."""
    source = settings.prior if isinstance(settings.prior, str) else type(settings.prior).__name__
    return {
        "command": shlex.join(["dpnp-reconstruct", *arguments]),
        "config": config,
        "solver": type(sampler).__name__,
        "operator": repr(sampler.forward_model.operator),
        "noise": repr(sampler.forward_model.noise),
        "seed": settings.seed,
        "prior": {"name": card.name, "source": source, "sha256": card.sha256},
        "versions": {
            "dpnp-imaging": version("dpnp-imaging"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": str(sampler.device),
    }

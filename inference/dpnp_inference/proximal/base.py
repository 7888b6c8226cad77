"""The contract of a proximal sampler: a kernel with explicit state, and what it reports."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.forward_model import ForwardModel


class ProximalInfo(NamedTuple):
    r"""What one draw did.

    Attributes:
        forward_calls: evaluations of the forward map (adjoints and gradients count as one each), on the whole batch; where
            chains need different numbers of them, their mean, rounded up.
        acceptance: fraction of accepted proposals of each chain ``(B,)``; ``None`` for samplers without proposals.
        residual: relative residual of the linear solve of each chain ``(B,)``; ``None`` where nothing is solved.
        non_finite: proposals of each chain ``(B,)`` that were rejected because the likelihood or its gradient was not
            finite; ``None`` for samplers without proposals.
        jump: squared distance of each chain ``(B,)`` from the draw before, as a part of what two independent draws from the Gaussian
            alone would have, :math:`2 \eta^2 d`; ``None`` for samplers whose draws do not depend on the one before.
    """

    forward_calls: int
    acceptance: Tensor | None = None
    residual: Tensor | None = None
    non_finite: Tensor | None = None
    jump: Tensor | None = None


class ProximalSampler(Protocol):
    """Draws from the likelihood times a Gaussian around ``x``."""

    @property
    def exact_splitting(self) -> bool:
        """Whether it takes the splitting's own noise out of the likelihood where it can (see :meth:`split_variance`)."""
        ...

    def init(self, forward_model: ForwardModel, y: Tensor, x: Tensor) -> Any:
        """State before the first draw.

        Args:
            forward_model: gives the likelihood.
            y: the measurement, without a batch dimension.
            x: starting images ``(B, C, H, W)``.

        Raises:
            TypeError: the forward model lacks what this sampler needs; says what.
        """
        ...

    def step(
        self, state: Any, x: Tensor, eta: float, *, generator: ChainGenerators
    ) -> tuple[Any, Tensor, ProximalInfo]:
        """One draw.

        Args:
            state: of the draw before.
            x: centre of the Gaussian ``(B, C, H, W)``.
            eta: its standard deviation, in image units.
            generator: one stream a chain.

        Returns:
            The new state, the draw ``z`` shaped like ``x``, and what it did.
        """
        ...

    def select(self, state: Any, index: Tensor) -> Any:
        """State of some of the chains, so that particles can be resampled and replicas swapped.

        Args:
            state: of a batch of chains.
            index: which of them ``(N,)``, in the new order, as whole numbers; a chain may be taken several times.

        Returns:
            The state of a batch of N chains.
        """
        ...

    def split_variance(self, state: Any) -> float:
        r"""Largest part of :math:`\eta^2`, in squared image units, that is taken out of the likelihood.

        With e this part, the law of x that draws at coupling η aim at has the likelihood of noise covariance
        :math:`R + \max(\eta^2 - e, 0)\, A A^T`, which is the model's own for :math:`\eta^2 \le e`. Samplers without exact
        splitting give 0, and infinity is what a forward map that is 0 everywhere allows.
        """
        ...


@runtime_checkable
class MarkovKernel(ProximalSampler, Protocol):
    """A proximal sampler whose draw goes on from the one before, so that it mixes slowly where the likelihood is sharp."""

    def retarget(self, state: Any, forward_model: ForwardModel) -> Any:
        """The same chains under another likelihood, where they adapt anew.

        Args:
            state: of the draw before.
            forward_model: gives the likelihood from now on.

        Returns:
            The state for the next draw.
        """
        ...


class TemperedForwardModel(ForwardModel):
    """A forward model whose likelihood is raised to a power.

    Args:
        forward_model: the model.
        power: β in [0, 1].
    """

    def __init__(self, forward_model: ForwardModel, power: float) -> None:
        super().__init__(forward_model.operator, forward_model.noise)
        self.power = power

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        """``β log p(y | x)``; see :meth:`ForwardModel.log_likelihood <dpnp_shared.forward_model.ForwardModel.log_likelihood>`."""
        return self.power * super().log_likelihood(x, y)

    def pixel_log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        """``β log p(y | x)`` of each pixel; see :class:`~dpnp_shared.forward_model.ForwardModel`."""
        return self.power * super().pixel_log_likelihood(x, y)

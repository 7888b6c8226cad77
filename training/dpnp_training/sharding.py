"""Fully sharded data parallelism: weights, their average, gradients and the optimiser's state divided among the processes."""

from __future__ import annotations

import warnings
from datetime import timedelta

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh

from dpnp_shared.prior import build

try:
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor
except ImportError:  # where they were before torch 2.6
    from torch.distributed._composable.fsdp import FSDPModule, fully_shard  # type: ignore[attr-defined]
    from torch.distributed._tensor import DTensor  # type: ignore[attr-defined]

NAME = "sharded"


class FullySharded(ModelParallelStrategy):
    """Data parallelism over all processes of all nodes with everything sharded (PyTorch's FSDP2, Rajbhandari et al. 2020, stage 3).

    ``--trainer.strategy sharded``. Checkpoints are one file with whole tensors, as those of any other strategy: a training may go on
    under another one.

    Args:
        process_group_backend: ``nccl`` on CUDA devices and ``gloo`` on CPUs by default.
        timeout: of a collective call.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Make all processes one data-parallel group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        # the output of a network that crops is a view; nothing here writes into it
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor", UserWarning)
        super().setup_environment()


StrategyRegistry.register(
    NAME, FullySharded, description="fully sharded data parallelism (FSDP2), dpnp_training.sharding"
)


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that would shard the network, but not its average.

    Raises:
        ValueError: the strategy is one of them.
    """
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, FullySharded):
        raise ValueError(
            f"trainer.strategy = {type(strategy).__name__} cannot keep the network's moving average sharded; "
            f"for fully sharded training take --trainer.strategy={NAME}"
        )


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network in place, block by block: only the block at work is whole, besides what belongs to no block.

    Blocks are the members of the network's outermost ``nn.ModuleList``.

    Args:
        network: whose parameters become shards.
        mesh: the processes, in one dimension.

    Raises:
        ValueError: a parameter is stored channels last.
    """
    if isinstance(network, FSDPModule):
        return
    if any(not parameter.is_contiguous() for parameter in network.parameters()):
        raise ValueError(
            f"model.channels_last = true does not go with trainer.strategy = {NAME}: PyTorch shards contiguous parameters only"
        )
    for block in blocks(network):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    # the root, too, is put away after its forward pass: the average has no backward pass that would do so
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def blocks(network: nn.Module) -> list[nn.Module]:
    """Members of the outermost module lists."""
    if isinstance(network, nn.ModuleList):
        return [b for member in network for b in (blocks(member) if isinstance(member, nn.ModuleList) else [member])]
    return [block for child in network.children() for block in blocks(child)]


@torch.no_grad()
def whole(network: nn.Module, description: dict[str, object]) -> nn.Module:
    """The network itself, or, if it is sharded, a whole copy of it on every process; then all processes must call this together.

    Args:
        network: sharded or not.
        description: of its class and arguments, as :func:`dpnp_shared.prior.describe` gave it before the sharding.
    """
    if not isinstance(network, FSDPModule):
        return network
    state = {
        key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in network.state_dict().items()
    }
    device = next(iter(state.values())).device
    module_name = str(description["class_path"]).rpartition(".")[0]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        copy = build(description, (module_name,)).to(device)
    copy.load_state_dict(state)
    return copy.eval().requires_grad_(False)


def local(x: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x

"""Ways to call a prior that cost less time or memory and give the same draws up to rounding; ``docs/speed.md`` says when to use which."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dpnp_shared.acceleration import check_compile, compile_options, use_channels_last
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.prior import Prior

log = logging.getLogger(__name__)

BatchSize = int | Literal["auto"] | None
FILL = 0.5  # of the free memory of a CPU that network calls may take; other processes and the kernels need theirs
LEAST_GROWTH = 64 * 2**20  # bytes; less growth of a process tells little about what an image takes


class CompileError(RuntimeError):
    """``torch.compile`` could not compile the network."""


def accelerate(prior: Denoiser, *, compile: bool | str = False, channels_last: bool = True) -> None:
    """Let a prior's network be called in another way, in place; names and values of its weights stay as they are.

    Args:
        prior: trained for any option but the default ones.
        compile: ``True`` for ``torch.compile``'s default backend, one of its modes, or another backend. Nothing is compiled before
            the first call.
        channels_last: keep weights and activations with the channels innermost.

    Raises:
        ValueError: ``compile`` is not among what there is, or the prior has no network.
    """
    check_compile(compile)
    if not isinstance(prior, Prior):
        if compile is not False:
            raise ValueError(f"compile = {compile!r}; {type(prior).__name__} has no network that could be compiled")
        return
    if channels_last:
        use_channels_last(prior.network)
    else:
        prior.network.to(memory_format=torch.contiguous_format)
    if compile is not False:
        prior.network.forward = CompiledForward(prior.network.forward, compile)


class CompiledForward:
    """A network's ``forward``, compiled at its first call.

    Its input is the scaled image and the number that stands for σ, a tensor: another σ compiles nothing anew.

    Args:
        forward: to be compiled.
        how: as in :func:`accelerate`.
    """

    def __init__(self, forward: Callable[..., Any], how: bool | str) -> None:
        self.forward, self.how = forward, how
        self._compiled = torch.compile(forward, **compile_options(how))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What ``forward`` gives.

        Raises:
            CompileError: compilation failed.
        """
        try:
            return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = str(error).strip().splitlines()
            raise CompileError(
                f"compile = {self.how!r}: torch.compile failed on this network: {' '.join(cause[:2])}. Leave the option away, or try "
                "compile = 'aot_eager', which needs no compiler"
            ) from error


def is_compiled(prior: Denoiser) -> bool:
    """Whether :func:`accelerate` has compiled the prior's network."""
    return isinstance(prior, Prior) and isinstance(prior.network.forward, CompiledForward)


def chains_together(batch_size: BatchSize, chains: int) -> int:
    """How many chains run together: ``auto`` splits network calls only.

    Args:
        batch_size: the user's.
        chains: how many there are.

    Raises:
        ValueError: ``batch_size`` is neither ``None``, ``auto``, nor a whole number of at least 1.
    """
    if batch_size is None or batch_size == "auto":
        return chains
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size = {batch_size!r}; it must be at least 1, or 'auto'")
    return min(batch_size, chains)


def in_batches(prior: Denoiser, batch_size: BatchSize, chains: int) -> Denoiser:
    """The prior, called on no more images at a time than it is to be.

    Args:
        prior: the prior.
        batch_size: the user's, see :func:`chains_together`.
        chains: that run together.

    Returns:
        The prior itself where nothing needs to be split.
    """
    if batch_size == "auto":
        return Fitting(prior, chains)
    if is_compiled(prior):  # a batch of another size would be compiled anew
        return Batched(prior, batch_size or chains, whole=True)
    return prior if batch_size is None or batch_size >= chains else Batched(prior, batch_size)


class Batched(Denoiser):
    """A prior that is called on a few images at a time.

    Args:
        prior: the prior.
        batch_size: the most images in a call of it.
        whole: call it on exactly so many: what is missing in the last call is filled up with its last image.
    """

    def __init__(self, prior: Denoiser, batch_size: int, *, whole: bool = False) -> None:
        super().__init__()
        self.prior, self.batch_size, self.whole = prior, batch_size, whole
        self.image_shape, self.spread = prior.image_shape, prior.spread
        self.sigma_min, self.sigma_max = prior.sigma_min, prior.sigma_max

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """See :meth:`Denoiser.forward <dpnp_shared.denoiser.Denoiser.forward>`."""
        images = len(x)
        one_each = isinstance(sigma, Tensor) and sigma.ndim > 0 and len(sigma) > 1
        missing = -images % self.batch_size if self.whole else 0
        if missing:
            x = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])
            sigma = torch.cat([sigma, sigma[-1:].expand(missing)]) if one_each else sigma  # type: ignore[list-item,index]
        if len(x) <= self.batch_size:
            denoised: Tensor = self.prior(x, sigma)
            return denoised[:images]
        parts = torch.split(x, self.batch_size)
        sigmas = torch.split(sigma, self.batch_size) if one_each else [sigma] * len(parts)  # type: ignore[arg-type]
        return torch.cat([self.prior(part, s) for part, s in zip(parts, sigmas, strict=True)])[:images]


class Fitting(Batched):
    """A prior that is called on as many images at a time as fit the memory.

    On CUDA devices this is found by trying: a call that runs out of memory is repeated with fewer images, and the largest number that
    goes is closed in on by bisection, in the first few calls. On CPUs under Linux one call of a few images is measured, and half of
    the free memory is used. What was found is remembered for the prior and the size of its images.

    Args:
        prior: the prior.
        images: in most of the calls, and the most in one.
    """

    found: ClassVar[WeakKeyDictionary[Denoiser, dict[tuple[Any, ...], list[int]]]] = WeakKeyDictionary()

    def __init__(self, prior: Denoiser, images: int) -> None:
        super().__init__(prior, images, whole=is_compiled(prior))
        self.images = images

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """See :meth:`Denoiser.forward <dpnp_shared.denoiser.Denoiser.forward>`.

        Raises:
            torch.OutOfMemoryError: a single image does not fit.
            ValueError: the device's memory is not known.
        """
        # the most images that went, and the least that did not (0: not known)
        limits = self.found.setdefault(self.prior, {}).setdefault((x.shape[1:], x.dtype, x.device), [0, 0])
        if limits == [0, 0] and x.device.type == "cpu":
            fit = images_that_fit(self.prior, x[:1], sigma, self.images)
            limits[:] = [fit, fit + 1]
        elif x.device.type not in ("cpu", "cuda"):
            raise ValueError(f"batch_size = 'auto' is not for a device of type {x.device.type}; give a number")
        while True:
            goes, fails = limits
            size = self.images if self.whole else min(self.images, len(x))
            if fails:  # try half-way, unless another size would be compiled anew
                size = min(size, goes if self.whole and goes else max(1, (goes + fails) // 2))
            self.batch_size = size
            try:
                denoised = super().forward(x, sigma)
            except torch.cuda.OutOfMemoryError:  # its name before torch 2.5
                if size == 1:
                    raise
                limits[:] = [goes if goes < size else 0, size]
                log.info("%d images in a network call do not fit the memory", size)
                if x.device.type == "cuda":
                    torch.cuda.empty_cache()
            else:
                limits[0] = max(goes, size)
                return denoised


def images_that_fit(prior: Denoiser, x: Tensor, sigma: float | Tensor, most: int) -> int:
    """How many images a network call may have on this CPU, from the memory that calls on a few of them take.

    Args:
        prior: is called on 1, 2, 4, … images until the process grows measurably.
        x: one image ``(1, C, H, W)``.
        sigma: as in :meth:`Denoiser.forward <dpnp_shared.denoiser.Denoiser.forward>`; the first counts.
        most: it is called on no more than so many.

    Raises:
        ValueError: this is not Linux, where a process can look up its own peak.
    """
    sigma = sigma.flatten()[0] if isinstance(sigma, Tensor) else sigma
    images, more, growth = 0, 0, 0
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak back to the present size
        peak = _status("VmRSS")
        while growth < LEAST_GROWTH and images < most:
            before, peak_before = images, peak
            images = min(max(1, 2 * images), most)
            with not_compiled(prior):
                prior(x.expand(images, *x.shape[1:]).contiguous(), sigma)
            peak = _status("VmHWM")
            more, growth = images - before, peak - peak_before
        return max(1, int(FILL * _free_memory() * more / max(growth, LEAST_GROWTH)))
    except OSError as error:
        raise ValueError("batch_size = 'auto' needs Linux on a CPU, to look up memory; give a number") from error


@contextmanager
def not_compiled(prior: Denoiser) -> Iterator[None]:
    """A prior that :func:`accelerate` has compiled runs as it was before: for single calls on another number of images."""
    if not is_compiled(prior):
        yield
        return
    network = cast("Prior", prior).network
    compiled = network.forward
    network.forward = cast("CompiledForward", compiled).forward
    try:
        yield
    finally:
        network.forward = compiled


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _free_memory() -> int:
    """Bytes that this process may still take: the machine's, and those of its control groups (version 2)."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = [next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))]
    root = Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        group = root / line.removeprefix("0::/") if line.startswith("0::/") else root
        for folder in (group, *group.parents):
            limit, used = folder / "memory.max", folder / "memory.current"
            if (
                folder.is_relative_to(root)
                and limit.is_file()
                and used.is_file()
                and (most := limit.read_text().strip()) != "max"
            ):
                free.append(int(most) - int(used.read_text()))
    return max(0, min(free))

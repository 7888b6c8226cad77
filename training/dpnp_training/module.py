"""The training task: a score network learned by denoising score matching."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from torch import Tensor, nn

from dpnp_shared.acceleration import check_compile, use_channels_last
from dpnp_shared.preconditioning import EDM, Preconditioning
from dpnp_shared.prior import Prior, PriorCard, denoise, describe
from dpnp_shared.randomness import derive_seed
from dpnp_shared.task import TaskCard, TrainedTaskDenoiser
from dpnp_training.acceleration import align, compile_network, contiguous, make_adamw
from dpnp_training.augment import informed
from dpnp_training.data import DataDescription, ImageData
from dpnp_training.ema import EMASettings, make_ema, make_profiles, restore, saved
from dpnp_training.losses import DenoisingScoreMatching, error_in_band
from dpnp_training.post_hoc import FOLDER
from dpnp_training.scaling import Rule, check_rule, scaled_learning_rate
from dpnp_training.sharding import FullySharded, blocks, check_strategy, shard, whole
from dpnp_training.share import Share
from dpnp_training.ucos import MeasurementTask, TaskObjective
from dpnp_training.verify import record_of

FIELD_NOTE = (
    "The noise of this prior is a random field, `{field}`, and not white: it is a prior over functions, for "
    "`dpnp_inference.function_space.FunctionSpaceLangevin` on any grid. Samplers for white noise refuse it."
)


class ScoreMatching(L.LightningModule):
    """Trains ``D(x; σ)`` and keeps the moving average of its network, which is what becomes the prior.

    Args:
        network: the score network; must name its constructor's arguments in ``hyperparameters``.
        preconditioning: from network to denoiser; EDM by default.
        loss: the objective; EDM's by default.
        ema: settings of the moving average.
        learning_rate: of AdamW, after the warm-up.
        weight_decay: of AdamW.
        warmup_steps: optimiser steps over which the learning rate rises linearly from 0.
        decay: learning rate after the warm-up: ``cosine`` to 0 at the last step, or ``constant``.
        noise_bands: edges of the bands of σ in which the validation loss is reported.
        seed: of the training noise; noise of an image depends on nothing but seed, step and the image's place in the whole batch.
        compile: let ``torch.compile`` take the network's calls in training: ``true``, one of its modes, or another backend.
        channels_last: keep the network's weights and activations with the channels innermost, which suits convolutions on most devices.
        fused: AdamW in one kernel; ``auto`` does so on CUDA devices.
        scale_learning_rate: how ``learning_rate`` grows with the global batch (images of one optimiser step): in proportion, with its
            square root, or not at all.
        reference_batch: global batch for which ``learning_rate`` is meant.
        task: train the task-dependent denoiser of this measurement (UCoS) instead of a prior.

    Raises:
        ValueError: an argument out of range, or augmentation together with a task.
        TypeError: a task that is not linear Gaussian, or without EDM preconditioning.
    """

    def __init__(
        self,
        network: nn.Module,
        preconditioning: Preconditioning | None = None,
        loss: DenoisingScoreMatching | None = None,
        ema: EMASettings | None = None,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 500,
        decay: Literal["cosine", "constant"] = "cosine",
        noise_bands: Sequence[float] = (0.02, 0.07, 0.2, 0.6, 2.0, 6.0, 20.0),
        seed: int = 0,
        compile: bool | str = False,
        channels_last: bool = False,
        fused: bool | Literal["auto"] = "auto",
        scale_learning_rate: Rule = "none",
        reference_batch: int | None = None,
        task: MeasurementTask | None = None,
    ) -> None:
        super().__init__()
        if not learning_rate > 0 or weight_decay < 0 or warmup_steps < 0:
            raise ValueError(
                f"learning_rate = {learning_rate} must be positive, weight_decay = {weight_decay} and "
                f"warmup_steps = {warmup_steps} at least 0"
            )
        if len(noise_bands) < 2 or any(not 0 < a < b for a, b in itertools.pairwise(noise_bands)):
            raise ValueError(f"noise_bands = {list(noise_bands)}; needed are at least two increasing positive levels")
        check_compile(compile)
        if channels_last:
            use_channels_last(network)
        check_rule(scale_learning_rate, reference_batch)
        self.network = network
        self.preconditioning = preconditioning if preconditioning is not None else EDM()
        self.loss = loss if loss is not None else DenoisingScoreMatching()
        if task is not None and self.loss.augmentation is not None:
            raise ValueError("loss.augmentation: a measurement task is trained on images as they are; leave it out")
        self.task = None if task is None else TaskObjective(task, self.preconditioning)
        self.ema = make_ema(network, ema if ema is not None else EMASettings())
        self.profiles = make_profiles(network, ema if ema is not None else EMASettings())
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.decay = warmup_steps, decay
        self.bands = list(itertools.pairwise(noise_bands))
        self.seed = seed
        self.scale_learning_rate, self.reference_batch = scale_learning_rate, reference_batch
        self.images_seen = 0
        self.configuration: str | None = None  # JSON of what a resumed run must share with this one
        self.data: DataDescription | None = None
        self.metrics: dict[str, float] = {}
        self.validation: dict[str, Any] = {}
        self.compiler, self.fused = compile, fused
        # refuses a network that could not be exported now, not after days of training
        self.described = {"network": describe(network), "preconditioning": describe(self.preconditioning)}

    # --- training -------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the strategy, and the data against the network."""
        check_strategy(self.trainer.strategy)
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and hasattr(datamodule, "description"):
            self.data = datamodule.description
        channels = getattr(self.network, "channels", None)
        if self.data is not None and channels not in (None, self.data.image_shape[0]):
            raise ValueError(
                f"model.network.channels = {channels}, but the images have {self.data.image_shape[0]} channels "
                f"(shape {self.data.image_shape})"
            )
        if self.data is not None and self.task is not None and self.task.task.image_shape != self.data.image_shape:
            raise ValueError(
                f"model.task.operator takes images {self.task.task.image_shape}, but the data's are {self.data.image_shape}"
            )

    def configure_model(self) -> None:
        """Shard the network and its averages where the strategy asks for it, and compile what is called in training."""
        strategy = self.trainer.strategy
        parts: list[nn.Module] = []
        if isinstance(strategy, FullySharded):
            for module in [m for m in self.modules() if type(m) is type(self.network)]:
                shard(module, strategy.device_mesh["data_parallel"])
            parts = blocks(self.network)
        compile_network(self.network, self.compiler, parts)

    def generator(self, *stream: int) -> torch.Generator:
        """A generator on this device whose numbers depend on the seed and ``stream`` only; the same on all processes."""
        return torch.Generator(self.device).manual_seed(derive_seed(self.seed, *stream))

    def share(self, count: int, part: int = 0, parts: int = 1) -> Share:
        """Which images of a whole batch this process has at hand.

        Args:
            count: how many.
            part: which of the accumulated batches.
            parts: how many of them make up the whole batch.
        """
        world = self.trainer.world_size
        first = part * count * world + self.global_rank
        return Share(count, count * world * parts, first, world, self.preconditioning.noise_field)

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Bring what was loaded from a checkpoint into the memory format of this training."""
        for optimizer in self.trainer.optimizers:
            align(optimizer)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Make dropout, too, a function of seed, rank, epoch and batch, so that an interruption does not change it."""
        torch.manual_seed(derive_seed(self.seed, 2, self.global_rank, self.current_epoch, batch_idx))

    def training_step(self, x_0: Tensor, batch_idx: int) -> Tensor:
        """Loss of one batch of clean images ``(B, C, H, W)``."""
        parts = self.trainer.accumulate_grad_batches
        share = self.share(x_0.shape[0], batch_idx % parts, parts)
        step = self.current_epoch, batch_idx // parts
        loss = self.loss(
            self._denoiser(self.network, x_0, self.generator(3, *step), share),
            x_0,
            generator=self.generator(0, *step),
            share=share,
        )
        self.images_seen += x_0.shape[0] * self.trainer.world_size
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def _denoiser(
        self, network: nn.Module, x_0: Tensor, generator: torch.Generator, share: Share
    ) -> Callable[..., Tensor]:
        """``D(x; σ)`` of a network; with a task that of the posteriors of these images, measured with noise from the generator."""
        if self.task is not None:
            return self.task.denoiser(network, x_0, generator=generator, share=share)
        return lambda x, sigma, *vector: denoise(informed(network, *vector), self.preconditioning, x, sigma)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One optimiser step, then one of the moving averages."""
        super().optimizer_step(*args, **kwargs)
        self.ema.images_seen = self.images_seen
        self.ema.update()
        if self.profiles is not None:
            folder = Path(self.trainer.default_root_dir) / FOLDER
            self.profiles.update(self.images_seen, folder, write=self.trainer.is_global_zero)

    def on_train_epoch_start(self) -> None:
        """Lightning puts the whole module into training mode; the average stays in evaluation mode."""
        self.ema.ema_model.eval()

    def configure_optimizers(self) -> Any:
        """AdamW, warm-up, then the chosen decay, per optimiser step."""
        rate = scaled_learning_rate(self.learning_rate, self.scale_learning_rate, self.reference_batch, self.trainer)
        optimizer = make_adamw(
            self.network.parameters(),
            learning_rate=rate,
            weight_decay=self.weight_decay,
            fused=self.fused,
            device=self.device,
        )
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            if self.decay == "constant" or not math.isfinite(total):
                return 1.0
            progress = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
            return (1 + math.cos(math.pi * min(1.0, progress))) / 2

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- validation -----------------------------------------------------------------------------------------

    def denoise_ema(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """``D(x; σ)`` of the averaged network: ``x`` (B, C, H, W), ``sigma`` float or (B,).

        Raises:
            TypeError: a measurement task is trained, which has no such denoiser.
        """
        if self.task is not None:
            raise TypeError(
                "a task-dependent denoiser has no D(x; σ) without a measurement; take the callbacks that look at samples out"
            )
        return denoise(self.ema.ema_model, self.preconditioning, x, sigma)

    def validation_step(self, x_0: Tensor, batch_idx: int) -> None:
        """Weighted loss and root-mean-square error of the averaged network, in each noise band.

        The noise is the same at every validation, so that curves can be compared; σ is uniform in log σ within a band.
        """
        n = x_0.shape[0]
        losses, share = [], self.share(x_0.shape[0])
        for band, (low, high) in enumerate(self.bands):
            denoiser = self._denoiser(self.ema.ema_model, x_0, self.generator(4, batch_idx, band), share)
            sigma, error = error_in_band(
                denoiser, x_0, (low, high), generator=self.generator(1, batch_idx, band), share=share
            )
            loss = (self.loss.weight(sigma) * error).mean()
            losses.append(loss)
            name = f"{low:g}-{high:g}"
            self.log(f"val/loss/{name}", loss, batch_size=n, sync_dist=True)
            self.log(f"val/mse/{name}", error.mean(), batch_size=n, sync_dist=True)
        self.log("val/loss", torch.stack(losses).mean(), batch_size=n, sync_dist=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Keep the figures for the card."""
        if not self.trainer.sanity_checking:
            self.metrics = {
                key: float(value) for key, value in self.trainer.callback_metrics.items() if key.startswith("val/")
            }
            data = getattr(self.trainer, "datamodule", None)
            if isinstance(data, ImageData) and self.task is None:  # `dpnp-prior verify` measures priors
                self.validation = dataclasses.asdict(
                    record_of(
                        data,
                        batches=int(self.trainer.num_val_batches[0]),
                        processes=self.trainer.world_size,
                        seed=self.seed,
                        device=self.device.type,
                    )
                )

    # --- the prior ------------------------------------------------------------------------------------------

    def card(self) -> PriorCard:
        """The card of the prior as trained so far.

        Raises:
            RuntimeError: no data set has been seen, so its figures are unknown.
        """
        if self.data is None:
            raise RuntimeError(
                "the card needs the data's figures: run this module with a data module that has a 'description'"
            )
        sigma_range = (self.preconditioning.sigma_min, self.preconditioning.sigma_max)
        training = {
            "images seen": self.images_seen,
            "optimiser steps": self.global_step,
            "torch": str(torch.__version__),
        }
        card = PriorCard(
            **dataclasses.asdict(self.data),
            sigma_range=sigma_range,
            training=training,
            metrics=self.metrics,
            validation=self.validation,
            notes="" if (field := self.preconditioning.noise_field) is None else FIELD_NOTE.format(field=field),
        )
        return card if self.task is None else self.task.card(card)

    def to_prior(self) -> Prior:
        """The averaged network as a prior.

        It shares the module's tensors, unless they are sharded: then it is a whole copy, and all processes must call this together.

        Raises:
            TypeError: a measurement task is trained; see :meth:`to_portable`.
        """
        portable = self.to_portable()
        if not isinstance(portable, Prior):
            raise TypeError("a task-dependent denoiser is no prior")
        return portable

    def to_portable(self) -> Prior | TrainedTaskDenoiser:
        """What the training is for: a prior, or with a task its denoiser; as :meth:`to_prior`."""
        network, card = whole(self.ema.ema_model, self.described["network"]), self.card()
        if self.task is not None and isinstance(card, TaskCard):
            return self.task.export(network, card)
        return Prior(network, self.preconditioning, card)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an export needs, as plain values: no class is named that loading would have to import."""
        checkpoint.update(
            {key: contiguous(checkpoint[key]) for key in ("state_dict", "optimizer_states") if key in checkpoint}
        )
        checkpoint.update(images_seen=self.images_seen, metrics=self.metrics, validation=self.validation)
        if self.configuration is not None:
            checkpoint["configuration"] = self.configuration
        checkpoint["ema"] = saved(self.ema, self.profiles, self.loss)
        if self.data is not None:
            checkpoint["prior"] = {**self.described, "card": dataclasses.asdict(self.card())}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting images, and keep the last validation's figures."""
        self.images_seen = checkpoint.get("images_seen", 0)
        self.metrics, self.validation = checkpoint.get("metrics", {}), checkpoint.get("validation", {})
        restore(checkpoint.get("ema", {}), self.ema, self.profiles)

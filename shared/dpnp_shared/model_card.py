"""The README of a prior's folder: what a model hub shows, and what people read before they trust a prior."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

if TYPE_CHECKING:
    from dpnp_shared.prior import PriorCard

LICENSES = (
    "mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0",
    "agpl-3.0", "mpl-2.0", "odc-by", "odbl", "pddl", "unlicense",
)  # fmt: skip
"""Licences that the Hub knows by name; any other is ``other`` with its own words."""

DATASETS = {
    "torchvision:MNIST": "ylecun/mnist",
    "torchvision:FashionMNIST": "zalando-datasets/fashion_mnist",
    "torchvision:CIFAR10": "uoft-cs/cifar10",
    "torchvision:CIFAR100": "uoft-cs/cifar100",
}
"""Hub ids of data that is usually named otherwise."""

BAND = re.compile(r"^val/(mse|loss)/(?P<low>[\d.e+-]+?)-(?P<high>[\d.]+(?:e[+-]?\d+)?)$")


class Words(NamedTuple):
    """The text of a card around its figures: first paragraph, how to use it, the Hub's name of the task, and what other sizes do."""

    intro: str
    usage: str
    pipeline: str
    sizes: str


def noise_bands(metrics: dict[str, float]) -> dict[tuple[float, float], dict[str, float]]:
    """Validation figures by band of σ: ``{(low, high): {"mse": …, "loss": …}}``, in rising order.

    Args:
        metrics: the card's; names as ``val/mse/0.02-0.07``.
    """
    bands: dict[tuple[float, float], dict[str, float]] = {}
    for name, value in metrics.items():
        match = BAND.match(name)
        if match:
            bands.setdefault((float(match["low"]), float(match["high"])), {})[match[1]] = value
    return dict(sorted(bands.items()))


def front_matter(card: PriorCard, pipeline: str) -> dict[str, Any]:
    """The Hub's metadata of a model: library, tags, licence and data sets."""
    first = re.split(r"[\s,;(]", card.license.strip(), maxsplit=1)[0].lower()
    matter: dict[str, Any] = {
        "library_name": "dpnp-imaging",
        "pipeline_tag": pipeline,
        "tags": ["diffusion", "score-based", "inverse-problems", "prior"],
    }
    if first in LICENSES:
        matter["license"] = first
    elif card.license.strip() in ("", "not stated"):
        matter["license"] = "unknown"
    else:
        matter |= {"license": "other", "license_name": card.license.strip()}
    source = re.sub(r", \d+ training images$", "", card.dataset)
    source = DATASETS.get(source, source)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        matter["datasets"] = [source]
    return matter


def markdown(
    card: PriorCard,
    *,
    weights: str,
    picture: str | None = None,
    words: Words | None = None,
    rows: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole README.

    Args:
        card: what to say.
        weights: name of the weights' file.
        picture: name of a picture of samples in the same folder.
        words: the text around the figures, by default that of a prior.
        rows: further rows of the table of provenance.
    """
    words = words if words is not None else PRIOR
    parts = [
        "---\n" + yaml.safe_dump(front_matter(card, words.pipeline), sort_keys=False, allow_unicode=True) + "---",
        f"# {card.name}",
        words.intro,
    ]
    if picture is not None and picture not in card.notes:
        parts.append(f"![Unconditional samples]({picture})")
    parts += ["## Range and limits", _range(card, words.sizes), "## Measured", _measured(card)]
    parts += ["## Provenance", _table([
        *rows,
        ("data", card.dataset),
        ("licence", card.license),
        *((key, f"`{value}`") for key, value in card.training.items()),
        ("weights", f"`{weights}`, SHA-256 `{card.sha256}`"),
    ])]  # fmt: skip
    parts += ["## Use", words.usage]
    return "\n\n".join([*parts, *([card.notes.strip()] if card.notes.strip() else [])]) + "\n"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _range(card: PriorCard, sizes: str) -> str:
    c, h, w = card.image_shape
    (low, high), (first, last) = card.value_range, card.source_range
    facts = _table([
        ("images", f"{c} x {h} x {w} (C x H x W), values in [{low:g}, {high:g}]"),
        ("mapped from", f"[{first:g}, {last:g}] in the data"),
        ("noise levels", f"σ from {card.sigma_range[0]:g} to {card.sigma_range[1]:g}, in the same units"),
        ("spread", f"{card.spread:.4g} along the widest direction, {card.data_std:.4g} a pixel"),
    ])  # fmt: skip
    return (
        f"{facts}\n\nIt knows the images of its data set and no others: a posterior is as good as the assumption that the imaged object "
        f"resembles them. Noise levels outside of the range are refused. Heights and widths other than {h} x {w} {sizes}. "
        f"Draws are not clipped to [{low:g}, {high:g}]."
    )


def _measured(card: PriorCard) -> str:
    bands = noise_bands(card.metrics)
    parts = []
    if bands:
        rows = ["| σ | RMS denoising error | mean squared error | weighted loss |", "|---|---|---|---|"]
        for (low, high), values in bands.items():
            mse, loss = values.get("mse"), values.get("loss")
            errors = ["—", "—"] if mse is None else [f"{math.sqrt(mse):.4g}", f"{mse:.4g}"]
            rows.append(" | ".join([f"| {low:g} to {high:g}", *errors, "—" if loss is None else f"{loss:.4g}"]) + " |")
        parts.append("Denoising error on validation images, σ uniform in log σ within each band:\n\n" + "\n".join(rows))
        if card.validation:
            measured_on = ", ".join(f"{key} `{value}`" for key, value in card.validation.items())
            parts.append(f"Measured with {measured_on}; `dpnp-prior verify PRIOR --data SOURCE` measures it again.")
    others = [(name, f"{value:.4g}") for name, value in card.metrics.items() if not BAND.match(name)]
    if others:
        parts.append(_table(others))
    if card.precision:
        loss = card.precision["difference"]
        rows = ["| σ | relative to D(x; σ) | relative to its error |", "|---|---|---|"]
        rows += [f"| {band.replace('-', ' to ')} | {a:.2g} | {b:.2g} |" for band, (a, b) in loss.items()]
        parts.append(
            f"The weights were rounded to {card.precision['weights']}. RMS change of D(x; σ) by it, on {card.precision['images']} "
            "generated images:\n\n" + "\n".join(rows)
        )
    return "\n\n".join(parts) if parts else "No figure was recorded."


USAGE = """```bash
dpnp-reconstruct --prior PRIOR --measurement y.npy --operator camera.py:Camera --noise dpnp_shared.noise.GaussianNoise --noise.sigma 0.05
```

```python
from dpnp_inference import DPnP
from dpnp_shared import Prior

prior = Prior.from_pretrained("PRIOR")
posterior = DPnP(prior, forward_model).sample(y, chains=20, seed=0)
```

`PRIOR` is the path of this folder, or `organisation/name@commit` for one on the Hub. Nothing in the folder is executed when it is loaded;
its hashes are checked first."""

PRIOR = Words(
    intro="An unconditional score network: the denoiser `D(x; σ)` of images like those it was trained on, for posterior sampling with DPnP "
    "(`dpnp-imaging`).",
    usage=USAGE,
    pipeline="unconditional-image-generation",
    sizes="run where the network allows it, and were not seen in training",
)

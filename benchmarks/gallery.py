"""Every shipped config, run as the command line runs it, on one page with a picture each.

    python benchmarks/gallery.py

writes the page ``docs/gallery.md``, the pictures ``docs/gallery/NAME.png`` and the figures ``docs/gallery/results.json``. What is there
already, of the present config, is kept, so that an interrupted run goes on; ``--only NAME ...`` does some again and ``--all`` does all. A
config that fails stays on the page as failed, and the next run tries it again. ``--page`` runs nothing and writes the page from the
figures that are kept. Options of all reconstructions follow after ``--``:

    python benchmarks/gallery.py --output outputs/gallery/results.json --only inpainting -- --chains 4 --device cpu
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from PIL import Image
from runner import parser, run_cells
from torch import Tensor

from dpnp_inference.cli import main as dpnp_reconstruct
from dpnp_inference.configuration import BUNDLED
from dpnp_inference.files import read_tensor
from dpnp_inference.posterior import Posterior
from dpnp_inference.report import draw_picture
from dpnp_inference.userfile import resolve_user_files
from dpnp_shared.operators import Operator, as_operator
from dpnp_shared.prior import Prior

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "inference"
OUTPUT = ROOT / "docs" / "gallery" / "results.json"
HEAD = """# Gallery

What every config in `{configs}` gives, as it stands: one test image of the bundled prior unless the config says otherwise, one
simulated measurement, one run. Each picture shows the truth, the measurement, the mean and the standard deviation of the posterior, and
two of its draws. This page is written by

    {command}

PSNR is that of the mean. Coverage is the fraction of pixels whose truth lies within their interval, with the intervals' level; of one
image it scatters widely (`dpnp-reconstruct check` measures it over many). Fit is the reduced chi-square of the draws, 1 where they
explain the measurement as draws from the posterior do, with the standard deviation that chance gives it; above 1.5 the verdict of a run
is *misfit* ([rules](diagnostics.md)). Acceptance is that of the proximal sampler's proposals at the last coupling. Seconds are those of
the sampling, on a shared CPU of two cores.
"""
COLUMNS = (
    "config",
    "operator, noise",
    "proximal sampler",
    "PSNR (dB)",
    "coverage (level)",
    "fit (± chance)",
    "acceptance",
    "network calls",
    "seconds",
)


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    command = parser(__doc__, "gallery")
    command.set_defaults(output=OUTPUT, jobs=1)
    command.add_argument("--configs", type=Path, default=CONFIGS, help="folder of the configs")
    command.add_argument("--only", nargs="+", metavar="NAME", help="run these again, and no others")
    command.add_argument("--all", action="store_true", help="run all again")
    command.add_argument("--page", action="store_true", help="run nothing, write the page")
    settings = command.parse_args(given[:end])
    configs = {path.stem: path.resolve() for path in sorted(settings.configs.glob("*.yaml"))}
    unknown = sorted(set(settings.only or ()) - set(configs))
    if unknown or not configs:
        command.error(f"no such configs in {settings.configs}: {unknown}; there are {sorted(configs)}")
    settings.output = settings.output.resolve()
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    if not settings.page:
        chosen = settings.only or list(configs)
        options = given[end + 1 :]
        if not settings.verify:
            _forget(settings.output, options, configs, chosen if settings.all or settings.only else [])
        cells = {name: (str(configs[name]), options, str(settings.output.parent)) for name in chosen}
        run_cells(reconstruct, cells, settings, header={"options": options}, start=os.chdir, start_arguments=(ROOT,))
    settings.output.parent.with_suffix(".md").write_text(page(settings.output, configs), encoding="utf-8")


def reconstruct(config: str, options: list[str], folder: str) -> dict[str, Any]:
    """Run a config and draw its picture.

    Args:
        config: its file.
        options: further ones of ``dpnp-reconstruct``.
        folder: where the picture goes.

    Returns:
        The figures, or the ``error``.
    """
    result: dict[str, Any] = {"fingerprint": fingerprint(Path(config))}
    with tempfile.TemporaryDirectory() as parent, contextlib.redirect_stdout(io.StringIO()):
        run = Path(parent) / "run"
        try:
            dpnp_reconstruct(["--config", config, "--output", str(run), *options])
            _draw(run, Path(config), Path(folder))
            return result | _figures(run)
        except (SystemExit, Exception) as error:  # whatever it is, it goes on the page
            return result | {"error": str(error) or type(error).__name__}


def fingerprint(config: Path) -> str:
    """Of what a config says, comment lines apart."""
    lines = [line for line in config.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def page(output: Path, configs: dict[str, Path]) -> str:
    """The page, from the figures that are kept.

    Args:
        output: their file.
        configs: of which configs, by name.
    """
    record = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    results, options = record.get("results", {}), record.get("header", {}).get("options", [])
    rows, sections = [], []
    for name, config in configs.items():
        description = config.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        link = Path(os.path.relpath(config, output.parents[1])).as_posix()
        result = results.get(name, {})
        if "scores" in result:
            cells = _cells(result)
            picture = f"![{description}]({output.parent.name}/{name}.png)"
        else:
            picture = f"**failed**: `{_reason(result)}`" if result else "not run yet"
            cells = [picture, *[""] * (len(COLUMNS) - 2)]
        rows.append("| " + " | ".join([f"[{name}](#{name})", *cells]) + " |")
        sections.append(f"## {name}\n\n{description} ([config]({link}))\n\n{picture}\n")
    table = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *rows]
    extra = f"\nAll with the options `{' '.join(options)}`.\n" if options else ""
    of, at = (os.path.relpath(path, ROOT) for path in (next(iter(configs.values())).parent, output))
    command = "python benchmarks/gallery.py"
    if (ROOT / of, ROOT / at) != (CONFIGS, OUTPUT):
        command += f" --configs {of} --output {at}"
    command = " ".join([command, *(["--", *options] if options else [])])
    return "\n".join([HEAD.format(configs=of, command=command) + extra, *table, "", *sections])


def _cells(result: dict[str, Any]) -> list[str]:
    """A row of the table after the config's name."""
    scores = result["scores"]
    coverage = f"{scores['coverage']:.0%} ({scores['level']:.0%})" if "coverage" in scores else "–"
    if "coverage_unseen" in scores:
        coverage += f", unseen pixels {scores['coverage_unseen']:.0%}"
    psnr = f"{scores['psnr']:.1f}" if "psnr" in scores else "–"
    acceptance = "–" if result["acceptance"] is None else f"{result['acceptance']:.0%}"
    seconds = f"{result['seconds']:.0f}"
    fit = result.get("fit")
    explained = f"{fit['chi_square']:.2f} (± {fit['chance']:.2f})" if fit and fit["chi_square"] is not None else "–"
    return [
        result["model"],
        result["proximal"],
        psnr,
        coverage,
        explained,
        acceptance,
        str(result["network_calls"]),
        seconds,
    ]


def _reason(result: dict[str, Any]) -> str:
    """Why a config failed, in one line that may stand in a table."""
    text = " ".join(result["error"].split()).replace("`", "'").replace("|", "/")
    return text if len(text) <= 300 else f"{text[:300]} …"


def _figures(run: Path) -> dict[str, Any]:
    """What the table needs of a run's folder."""
    record, diagnostics = (json.loads((run / name).read_text()) for name in ("run.json", "diagnostics.json"))
    sweeps = [sweep for batch in diagnostics["iterations"] for sweep in batch]
    last = min(sweep["eta"] for sweep in sweeps)
    accepted = [sweep["acceptance"] for sweep in sweeps if sweep["eta"] == last and "acceptance" in sweep]
    return {
        "model": ", ".join(record[part].split("(")[0] for part in ("operator", "noise")),
        # of another solver its name, with what it has in place of a proximal sampler
        "proximal": " ".join(
            part.split("(")[0]
            for part in (record["solver"], diagnostics.get("likelihood"), diagnostics.get("proximal"))
            if part is not None and part != "DPnP"
        ),
        "scores": record["scores"],
        "fit": diagnostics.get("fit"),
        "acceptance": sum(accepted) / len(accepted) if accepted else None,
        "network_calls": record["network_calls"],
        "seconds": record["seconds"],
    }


def _draw(run: Path, config: Path, folder: Path) -> None:
    """Draw a run."""
    content = resolve_user_files(yaml.safe_load(config.read_text(encoding="utf-8")))
    builder = ArgumentParser()
    builder.add_argument("--operator", type=Operator | Callable)
    operator = as_operator(builder.instantiate(builder.parse_object({"operator": content["operator"]})).operator)
    prior = content.get("prior", BUNDLED)
    value_range = Prior.from_pretrained(prior).card.value_range if isinstance(prior, str) else (-1.0, 1.0)
    measurement: Tensor | None = operator.display(read_tensor(run / "measurement.npy"))
    target, posterior = folder / f"{config.stem}.png", Posterior.load(run)
    truth = read_tensor(run / "truth.npy") if (run / "truth.npy").is_file() else None
    draw_picture(
        target, posterior, value_range=value_range, measurement=measurement, truth=truth, samples=2, compact=True
    )
    with Image.open(target) as picture:  # without transparency, so that a page of many stays small
        opaque = picture.convert("RGB")
    opaque.save(target, optimize=True)


def _forget(output: Path, options: list[str], configs: dict[str, Path], names: Sequence[str]) -> None:
    """Drop the results that are to be had again: of ``names``, of changed configs, without a picture, and failed ones."""
    record = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    if record.get("header") != {"options": options}:  # nothing is there, or the run is going to be refused
        return
    record["results"] = {
        name: result
        for name, result in record["results"].items()
        if name in configs
        and name not in names
        and "scores" in result
        and result["fingerprint"] == fingerprint(configs[name])
        and (output.parent / f"{name}.png").is_file()
    }
    output.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

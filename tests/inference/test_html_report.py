"""The report of a run: what is in it, for all kinds of images and measurements, and that a browser shows and plays it."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.by import By

from dpnp_inference import html_report
from dpnp_inference.cli import main
from dpnp_inference.commands.reconstruct import judge
from dpnp_inference.finished_run import RunFolderError, read_run
from dpnp_inference.html_report import MOST_DRAWS, coverage_table, exactness, write_report
from dpnp_inference.metrics import coverage
from dpnp_inference.posterior import Posterior
from dpnp_inference.report import shown_range

pytestmark = pytest.mark.pictures

HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>'$\\frac"


def make_run(
    folder: Path,
    *,
    shape: tuple[int, int, int] = (1, 16, 12),
    chains: int = 24,
    draws: int = 1,
    measurement: torch.Tensor | None = None,
    display: torch.Tensor | None = None,
    truth: bool = True,
    name: str = "test prior",
    scale: float = 1.0,
    **diagnostics: object,
) -> Path:
    """The folder of a run as the command writes it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(shape, generator=generator) - 0.5
    spread = torch.rand(shape, generator=generator) * 0.3
    samples = scale * (mean + spread * torch.randn((chains, draws, *shape), generator=generator))
    rows = [
        {"eta": eta, "network_calls": 5, "forward_calls": 2, "seconds": 0.1, "acceptance": 0.5, "acceptance_min": 0.3}
        for eta in (2.0, 0.5, 0.1)
    ]
    record = {
        "proximal": "MALA(steps=1)",
        "dds": "DDSDDIM()",
        "schedule": [2.0, 0.5, 0.1],
        "chains": chains,
        "draws": draws,
        "network_calls": 15,
        "forward_calls": 6,
        "seconds": 0.3,
        "iterations": [rows],
        "warnings": [],
        **diagnostics,
    }
    Posterior(samples, record).save(folder)
    np.save(folder / "measurement.npy", (mean if measurement is None else measurement).numpy())
    if display is not None:
        np.save(folder / "display.npy", display.numpy())
    if truth:
        np.save(folder / "truth.npy", (mean + spread * torch.randn(shape, generator=generator)).numpy())
    run = {
        "command": "dpnp-reconstruct --seed 3 --output 'a b'",
        "config": {"prior": "p", "seed": 3, "image": None, "measurement": "y.npy", "index": 0},
        "operator": "Blur(3)",
        "noise": "GaussianNoise(0.1)",
        "seed": 3,
        "prior": {
            "name": name,
            "source": "p",
            "sha256": "abc123",
            "value_range": [-1.0, 1.0],
            "source_range": [-1000.0, 1000.0],
        },
        "versions": {"dpnp-imaging": "1", "torch": "2", "python": "3"},
        "device": "cpu",
        "scores": {"psnr": 20.0, "coverage": 0.9, "level": 0.92},
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def text_of(page: str) -> str:
    """What a reader sees."""
    body = re.sub(r"<(script|style|svg).*?</\1>", " ", page, flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)))


def test_the_command_writes_the_page_from_the_folder_alone(tmp_path, capsys):
    fit = {"chi_square": 1.2, "chance": 0.1, "draws": 16, "impossible": 0}
    run = make_run(tmp_path / "run", warnings=["it hardly moves"], fit=fit)
    main(["report", str(run)])
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    seen = text_of(page)
    for expected in (
        "test prior: Blur, GaussianNoise",
        "it hardly moves",
        "Fit: reduced chi-square of the draws 1.2, 1 ± 0.1 expected.",
        "PSNR of the mean 20.00 dB",
        "dpnp-reconstruct --seed 3 --output 'a b'",
        "abc123",
        "seed: 3",
        "run longer: these draws do not yet give what their number promises.",
        "torch 2",
        "exact in the limit MALA leaves its law unchanged",
        "24 chains × 1",
        "acceptance",
    ):
        assert expected in seen, expected
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert all("alt=" in tag for tag in re.findall(r"<img[^>]*>", page))
    assert len(re.findall(r'<div class="plot" role="img" aria-label="[^"]{20,}', page)) == 4
    main(["report", str(run), "--output", str(tmp_path / "deep" / "other.html")])
    assert (tmp_path / "deep" / "other.html").read_text() == page
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["other.html"]


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("colour", {"shape": (3, 20, 30)}),
        ("two channels", {"shape": (2, 8, 8)}),
        ("single draw", {"chains": 1, "draws": 1}),
        ("no truth", {"truth": False}),
        ("chains of many draws", {"chains": 4, "draws": 12}),
        ("a vector", {"measurement": torch.arange(7000.0)}),
        ("a number", {"measurement": torch.tensor(3.0)}),
        ("complex vector", {"measurement": torch.arange(50) * (1 + 2j)}),
        ("sinogram", {"measurement": torch.rand(1, 30, 90)}),
        ("coils", {"measurement": torch.rand(8, 16, 16) * (1 + 2j), "display": torch.rand(1, 16, 16)}),
        ("counts", {"measurement": 200 * torch.rand(1, 16, 12), "display": 200 * torch.rand(1, 16, 12)}),
        ("table of small rows", {"measurement": torch.rand(40, 2, 3)}),
        ("a large image", {"shape": (1, 300, 600), "chains": 3}),
        ("nothing recorded", {"iterations": [], "schedule": []}),
    ],
)
def test_every_kind_of_run_has_a_page(tmp_path, case, options):
    page = write_report(make_run(tmp_path / "run", **options)).read_text()
    seen = text_of(page)
    assert ("posterior std" in seen) is (case != "single draw")
    assert ("Against the truth" in seen) is (case not in ("single draw", "no truth"))
    assert ("there is no standard deviation" in seen) is (case == "single draw")
    if case == "two channels":
        assert "mean of 2 channels" in seen
    if case == "a large image":
        assert "shown at 1/2 of its size of 300 × 600" in seen
    assert ("black is" in seen) is (case == "counts")
    if case == "a vector":
        assert "every 4th is shown" in page
    if case.startswith("complex"):
        assert "imaginary part" in page
    if case == "coils":
        assert "measurement; phase; part 4 of 8" in seen


def test_no_more_draws_and_bytes_than_a_page_should_have(tmp_path, monkeypatch):
    page = write_report(make_run(tmp_path / "many", chains=100)).read_text()
    assert f"{MOST_DRAWS} of 100 draws, evenly chosen" in text_of(page)
    assert page.count('aria-pressed="false"') == MOST_DRAWS
    monkeypatch.setattr(html_report, "MOST_BYTES", 60_000)
    page = write_report(make_run(tmp_path / "large", shape=(3, 50, 60), chains=30)).read_text()
    shown = re.findall(r'aria-pressed="false"><img class="crisp" src="([^"]*)"', page)
    assert f"{len(shown)} of 30 draws, evenly chosen" in text_of(page)
    assert 40_000 < sum(map(len, shown)) <= 60_000


def test_coverage_is_that_of_the_order_statistic_intervals(tmp_path):
    run = read_run(make_run(tmp_path / "run", chains=39))
    rows = {round(row["nominal"], 6): row for row in coverage_table(run.posterior, run.truth)}
    for level in (0.5, 0.8, 0.9, 0.95):
        covered, exact = coverage(run.posterior, run.truth, level)
        assert rows[round(exact, 6)]["pixels"] == pytest.approx(covered)
    std = run.posterior.std
    uncertain = std >= 0.1 * std.square().mean().sqrt()
    assert not bool(uncertain.all())
    assert rows[0.9]["uncertain"] == pytest.approx(coverage(run.posterior, run.truth, 0.9, uncertain)[0])
    levels = [row["nominal"] for row in coverage_table(run.posterior, run.truth)]
    assert levels == sorted(levels)


def test_evidence_of_populations(tmp_path):
    levels = [{"eta": 1.0, "ess": 0.5, "founders": 9}, {"eta": 0.1, "ess": 0.9, "founders": 7}]
    populations = [{"log_evidence": -3.0 - i, "bias": "none: exact splitting", "levels": levels} for i in range(2)]
    run = make_run(tmp_path / "run", populations=populations, log_evidence=-3.45, log_evidence_se=0.3)
    seen = text_of(write_report(run).read_text())
    assert "log p(y) = -3.45 ± 0.30 (between 2 populations)" in seen
    assert "2 -4.00 2 7 none: exact splitting" in seen


def test_what_is_exact():
    prior = {"prior": {"source": "p"}}
    closed = {"proximal": "ClosedForm()", "schedule": [1.0, 0.1], "exact_splitting": True}
    found = {part: (how, why) for part, how, why in exactness(prior, closed)}
    assert [found[part][0] for part in ("prior", "denoising step", "proximal step", "splitting")] == [
        "approximate",
        "approximate",
        "exact",
        "exact",
    ]
    analytic = {"prior": {"source": "GaussianMixturePrior"}}
    solved = {"proximal": "PerturbAndSolve()", "schedule": [0.1], "iterations": [[{"eta": 0.1, "residual": 2e-5}]]}
    found = {part: (how, why) for part, how, why in exactness(analytic, solved)}
    assert found["prior"][0] == "exact"
    assert "2e-05" in found["proximal step"][1]
    assert found["splitting"][0] == "approximate"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "run.json is missing"),
        (lambda run: (run / "run.json").write_text("{"), "run.json is damaged"),
        (lambda run: (run / "run.json").write_text("[]"), "not the record of a reconstruction"),
        (lambda run: (run / "samples.safetensors").write_bytes(b"12345678"), "draws in .* are damaged"),
        (lambda run: (run / "samples.safetensors").unlink(), "samples.safetensors is missing"),
        (lambda run: (run / "diagnostics.json").write_text("{"), "damaged"),
        (lambda run: (run / "measurement.npy").unlink(), "measurement.npy is missing"),
        (lambda run: (run / "measurement.npy").write_bytes(b"x"), "measurement.npy is damaged"),
        (lambda run: np.save(run / "truth.npy", np.zeros((1, 3, 3))), r"truth.npy has shape \(1, 3, 3\)"),
    ],
)
def test_damaged_folders_give_one_error_and_no_page(tmp_path, spoil, message):
    run = make_run(tmp_path / "run")
    spoil(run)
    with pytest.raises(RunFolderError, match=message):
        write_report(run)
    with pytest.raises(SystemExit, match="dpnp-reconstruct: "):
        main(["report", str(run)])
    assert not list(run.glob("*.html"))


def test_no_folder_and_a_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(RunFolderError, match="is not a folder"):
        write_report(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError, match="is a folder; give a file"):
        write_report(make_run(tmp_path / "run"), tmp_path)


@pytest.fixture(scope="module")
def browser():
    program, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if program is None or driver is None:
        pytest.skip("there is no chromium with its driver (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1000,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def wait_for(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not change"
        time.sleep(0.02)


def test_a_browser_shows_and_plays_it_without_errors_or_requests(tmp_path, browser):
    page = write_report(make_run(tmp_path / "a run #1", name=HOSTILE, warnings=[HOSTILE]))
    browser.get(page.as_uri())
    assert browser.title.startswith("<img src=x")  # as text
    script = "const s = document.getElementById('slider'); s.value = arguments[0]; s.dispatchEvent(new Event('input'));"
    picture, label = (browser.find_element(By.ID, name) for name in ("draw", "draw-label"))
    first = picture.get_attribute("src")
    browser.execute_script(script, 7)
    assert picture.get_attribute("src") != first
    assert label.text == "chain 8, draw 1 (8 of 24)"
    assert picture.get_attribute("alt") == "draw 1 of chain 8; 16 × 12 pixels"
    browser.execute_script(script, 0)
    play = browser.find_element(By.ID, "play")
    play.click()
    wait_for(lambda: label.text.startswith("chain 3,"))
    play.click()
    stopped = label.text
    time.sleep(0.4)
    assert label.text == stopped
    browser.find_elements(By.CSS_SELECTOR, "#strip button")[4].click()
    assert label.text.startswith("chain 5,")
    sizes = browser.execute_script("return [...document.images].map(i => [i.naturalWidth, i.alt.length])")
    assert all(width > 0 and alt > 0 for width, alt in sizes)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
    ink = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        ink[scheme] = [
            browser.execute_script(
                "const c = getComputedStyle(document.querySelector(arguments[0])); return c[arguments[1]]", where, what
            )
            for where, what in (("body", "backgroundColor"), ("body", "color"), (".plot svg text", "fill"))
        ]
        paper, text, axis = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in ink[scheme])
        assert abs(paper - text) > 500
        assert abs(paper - axis) > 500
    assert ink["light"] != ink["dark"]
    assert browser.execute_script("return document.title") != "hacked"
    errors = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert errors == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {page.as_uri()}


def test_coverage_needs_two_draws(tmp_path):
    posterior = read_run(make_run(tmp_path / "run", chains=1)).posterior
    assert coverage_table(posterior, posterior.mean) == []
    constant = coverage_table(Posterior(torch.zeros(9, 1, 1, 2, 2)), torch.zeros(1, 2, 2))
    assert [row["pixels"] for row in constant] == [1.0] * 4
    assert all(math.isnan(row["uncertain"]) for row in constant)


def test_draws_survive_a_report_that_fails(tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise ZeroDivisionError("no")

    monkeypatch.setattr("dpnp_inference.commands.reconstruct.write_report", fail)
    run = make_run(tmp_path / "run")
    diagnosis = judge(Posterior.load(run), run, report=True)
    assert diagnosis is not None
    assert "the draws are written, but could not be shown in a report: ZeroDivisionError: no" in caplog.text
    assert not (run / "report.html").exists()


def test_fields_are_shown_in_a_range_of_their_own(tmp_path):
    for draws in (torch.linspace(-1.15, 1.15, 100), torch.cat([torch.zeros(99), torch.tensor([50.0])])):
        assert shown_range(draws, (-1.0, 1.0)) == (-1.0, 1.0)
    low, high = shown_range(3 * torch.randn(10000, generator=torch.Generator().manual_seed(0)), (-1.0, 1.0))
    assert -10.5 < low < -8
    assert 8 < high < 10.5
    words = "go far beyond the prior's value range: black is"
    assert words in text_of(write_report(make_run(tmp_path / "field", scale=10.0)).read_text())
    assert words not in text_of(write_report(make_run(tmp_path / "image")).read_text())

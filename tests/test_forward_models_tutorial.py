"""The files in docs/forward_models.md are the ones in docs/examples, its commands run, and checks find what it says."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from dpnp_inference import check_model, gibbs
from dpnp_inference.cli import main
from dpnp_inference.files import read_tensor

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "forward_models.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`([\w/]+\.(?:py|yaml))`:\n\n```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [shlex.split(block.replace("\\\n", "")) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)]
PRINTED = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
FAST = ["--chains=2", "--device=cpu"]
SHORT = [
    "--dds=dpnp_inference.DDSDDIM",
    "--dds.calls=2",
    "--annealing=dpnp_inference.Annealing",
    "--annealing.constant=0",
    "--annealing.decay=2",
    "--annealing.final=0",
]


@pytest.fixture(autouse=True)
def _in_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(check_model, "draw_images", held_out_images)
    monkeypatch.setattr(gibbs, "START_CALLS", 3)
    for name, content in FILES.items():
        if not name.startswith("docs/"):
            (tmp_path / name).write_text(content)


def test_the_page_shows_the_files_that_there_are():
    shown = {name: content for name, content in FILES.items() if name.startswith("docs/")}
    assert {*shown} == {
        f"docs/examples/{file.name}" for file in (ROOT / "docs" / "examples").iterdir() if file.is_file()
    }
    for name, content in shown.items():
        assert (ROOT / name).read_text(encoding="utf-8") == content


@pytest.mark.parametrize("number", range(len(PRINTED)))
def test_checks_find_what_the_page_says(number, tmp_path, capsys):
    checks = [command for command in COMMANDS if command[1] == "check-model"]
    assert len(checks) == len(PRINTED)
    arguments = [
        str(tmp_path / word) if word.split(":")[0] in FILES and "/" not in word else word for word in checks[number][1:]
    ]
    expected = findings(PRINTED[number])
    assert expected
    status = 0
    try:
        main([*arguments, *FAST, *few_steps(arguments)])
    except SystemExit as stop:
        status = stop.code
    assert findings(capsys.readouterr().out) == expected
    assert status == int("PROBLEM" in {status for status, _ in expected})


def few_steps(command: list[str]) -> list[str]:
    """Less work for the sampler that the page chooses."""
    return ["--proximal.steps=3"] if any("sensor.yaml" in word for word in command) else []


def held_out_images(prior, shape, n, *, seed, dtype):
    """In place of draws, which take a while."""
    images = read_tensor(ROOT / "priors" / "fashion_mnist" / "test_images.npz")
    return (images[:n].to(dtype) / 127.5 - 1).reshape(-1, *shape)


def findings(printed: str) -> list[tuple[str, str]]:
    """Status and name of each finding."""
    found = re.findall(r"^(OK|NOTE|PROBLEM) +(\w+(?: \w+)?)(?:  |$)", printed, re.MULTILINE)
    return [(status, name) for status, name in found]


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if command[1] != "check-model"], ids=lambda command: command[-1]
)
def test_reconstructions_run(command, tmp_path):
    main([*command[1:], *FAST, *SHORT, *few_steps(command), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "picture.png").is_file()

"""What setup.cfg, constraints.txt and the Makefile promise, against the tree."""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def lines(section: str, key: str) -> list[str]:
    return SETUP[section][key].split()


def distribution(requirement: str) -> str:
    """`Hydra_core==1.3.*` is `hydra-core`."""
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def test_every_package_is_in_the_wheel() -> None:
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "asystem").rglob("*.py")}
    assert set(lines("options", "packages")) == found | {"asystem.configs", "asystem.recipes"}


def test_every_direct_dependency_is_pinned_once() -> None:
    wanted = lines("options", "install_requires")
    for extra in SETUP["options.extras_require"]:
        wanted += lines("options.extras_require", extra)
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    assert sorted(map(distribution, pins)) == sorted(map(distribution, wanted))


@pytest.mark.parametrize("command", ["make quickstart", "make test", "make check", "make clean"])
def test_the_readme_names_the_commands_that_there_are(command: str) -> None:
    target = command.removeprefix("make ")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert command in (ROOT / "README.md").read_text()


def test_ci_runs_only_commands_of_the_readme() -> None:
    commands = re.findall(r"^make \w+$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert commands == ["make check", "make test"]

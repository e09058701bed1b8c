"""The house: imports point down only, and some libraries have one home."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import asystem

PACKAGE = Path(asystem.__file__).parent
FLOORS = {
    "cli": 6, "compose": 6, "__main__": 6,
    "controller": 5,
    "workers": 4,
    "generation": 3, "training": 3, "state": 3, "memory": 3,
    "models": 2, "spmd": 2,
    "rollout": 1, "algorithms": 1, "rewards": 1, "data": 1, "tracking": 1,
    "types": 0, "config": 0, "checks": 0, "errors": 0, "stats": 0, "plugin": 0, "__init__": 0,
}  # fmt: skip
HOMES = {"ray": {"spmd"}, "wandb": {"tracking"}, "hydra": {"cli", "compose"}, "omegaconf": {"cli", "compose"}}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """All modules that a file imports, lazily too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_a_floor() -> None:
    assert {room(path) for path in FILES} - {"configs", "recipes"} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "asystem" and len(parts) > 1 and parts[1] in FLOORS and parts[1] != here:
            floor = FLOORS[parts[1]]
            assert floor < FLOORS[here] or floor == 0 == FLOORS[here] or FLOORS[here] == 6, f"{here} imports {name}"
        if parts[0] in HOMES:
            assert here in HOMES[parts[0]], f"{parts[0]} is imported outside {HOMES[parts[0]]}"


def test_rollout_knows_neither_torch_nor_ray() -> None:
    for path in (PACKAGE / "rollout").glob("*.py"):
        assert not {"torch", "ray", "numpy"} & {name.split(".")[0] for name in imports(path)}


def test_the_loop_is_read_in_one_sitting() -> None:
    lines = (PACKAGE / "controller" / "loop.py").read_text().splitlines()
    assert len(lines) <= 150, f"loop.py has {len(lines)} lines"

"""A group has the type of its worker: mypy rejects through the group what it would reject on the worker."""

from pathlib import Path

from mypy import api

ROOT = Path(__file__).parents[3]
PROGRAM = """
from asystem.spmd.group import replicas, spawn
from asystem.spmd.remote import Collect, Dispatch, Worker, remote

class Trainer(Worker):
    @remote(Dispatch.SPLIT, Collect.SUM)
    async def update(self, rows: list[int], rate: float) -> float:
        return rate

    @remote(Dispatch.BROADCAST, Collect.ALL)
    async def place(self) -> int:
        return self.rank

async def main(runtime: object) -> None:
    trainers = spawn(Trainer, name="trainers", ranks=2, runtime=runtime)
    reveal_type(trainers)
    reveal_type(await trainers.update([1, 2], rate=0.1))
    reveal_type(await replicas(trainers)[0].place())
    await trainers.update([1, 2], rate="high")
    await trainers.updaet([1, 2], 0.1)
"""


def test_calls_through_a_group_are_checked(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    files = [str(ROOT / "asystem" / "spmd" / name) for name in ("remote.py", "group.py")]
    options = ["--config-file=", "--follow-imports=skip", f"--cache-dir={tmp_path}"]
    text, errors, _ = api.run([*options, *files, str(tmp_path / "program.py")])
    lines = [line for line in text.replace("builtins.", "").splitlines() if "program.py" in line]
    assert [line.split(": ", 1)[1] for line in lines] == [
        'note: Revealed type is "program.Trainer"',
        'note: Revealed type is "float"',
        'note: Revealed type is "list[int]"',
        'error: Argument "rate" to "update" of "Trainer" has incompatible type "str"; expected "float"  [arg-type]',
        'error: "Trainer" has no attribute "updaet"; maybe "update"?  [attr-defined]',
    ], text + errors

"""KV kept or recomputed when weights change under unfinished rollouts: the mismatch that each causes, and its cost.

    python benchmarks/kv_on_update.py [--every 16] [--turns 3] [--recipe-steps 40] [--threads 2] [--write]

A 0.8 M-parameter model learns the bytes of this repository's documents; then policy-gradient steps (AdamW, rewarded for
spaces, 64 rollouts each) make a row of weights W0, W1, ... An engine generates 64 rollouts of 128 tokens and takes over
the next weights after every 16 decode steps, as asynchronous training has it. Each token's log-probability as sampled
is compared with one forward pass of the trainer's path over its whole sequence: under the weights of the token's own
version (what keeping KV costs alone), and under the last weights (what training sees). The quickstart recipe, run
with either setting, shows the same in its own metrics.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from record import Row, cpu_name, row, show, write
from torch import Tensor

from asystem.config import GenerationConfig, KVOnUpdate, ModelConfig
from asystem.generation import Engine, EngineRequest
from asystem.models import Decoder, PackedAttention, init_weights, spec_from_config
from asystem.types import SamplingParams, Trajectory

ROOT = Path(__file__).resolve().parent.parent
PROMPT, NEW, PROMPTS, GROUP = 24, 128, 8, 8
RATES = (4e-4, 1e-5)  # the quickstart's, and one nearer to those of large models
Weights = dict[str, Tensor]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--every", type=int, default=16, help="decode steps between two updates")
    parser.add_argument("--turns", type=int, default=3, help="timed runs of each; the best counts")
    parser.add_argument("--recipe-steps", type=int, default=40, help="of the quickstart; 0 = leave it out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/kv-on-update-cpu.json")
    return parser.parse_args()


def logprobs(model: Decoder, sequences: list[np.ndarray]) -> Tensor:
    """[T, V]: of what follows each token of sequences packed one after another."""
    tokens = torch.from_numpy(np.concatenate(sequences)).long()
    starts = torch.tensor([0, *itertools.accumulate(map(len, sequences))], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    attend = PackedAttention(starts, max(map(len, sequences)))
    return model.logits(model(tokens, positions, attend)).log_softmax(-1)


def pretrain(model: Decoder, text: np.ndarray, steps: int) -> float:
    """Next-byte prediction; returns the last loss in nats."""
    optimizer, rng, loss = torch.optim.AdamW(model.parameters(), lr=2e-3), np.random.default_rng(0), torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        windows = [text[i : i + PROMPT + NEW] for i in rng.integers(0, len(text) - PROMPT - NEW, 16)]
        kept = logprobs(model, windows).view(16, PROMPT + NEW, -1)[:, :-1]
        targets = torch.from_numpy(np.stack(windows)).long()[:, 1:, None]
        loss = -kept.gather(-1, targets).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(loss.detach())


def requests(text: np.ndarray, first: int) -> list[EngineRequest]:
    rng = np.random.default_rng(first)
    prompts = [text[i : i + PROMPT] for i in rng.integers(0, len(text) - PROMPT, PROMPTS)]
    params = SamplingParams(NEW, ignore_eos=True)
    return [EngineRequest(first + i, i // GROUP, 0, prompts[i // GROUP], params) for i in range(PROMPTS * GROUP)]


def make_engine(model: Decoder, kv: KVOnUpdate = KVOnUpdate.keep) -> Engine:
    config = GenerationConfig(max_running=PROMPTS * GROUP, kv_on_update=kv)
    return Engine(model, config, stop_ids=[], seed=0, max_length=PROMPT + NEW)


def copied(model: Decoder) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.state_dict().items()}


def policy_gradient(model: Decoder, text: np.ndarray, rate: float, count: int) -> Iterator[Weights]:
    """The weights before and after each of `count` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99))
    yield copied(model)
    for step in range(count):
        engine = make_engine(model)
        engine.submit(requests(text, 10_000 * (step + 1)))
        rollouts = engine.decode().finished
        rewards = torch.tensor([float((t.tokens == ord(" ")).mean()) for t in rollouts])
        groups = torch.tensor([t.group for t in rollouts])
        means = torch.stack([rewards[groups == g].mean() for g in groups])
        stds = torch.stack([rewards[groups == g].std() for g in groups])
        advantages = (rewards - means) / (stds + 1e-6)
        sequences = [np.concatenate([t.prompt_tokens, t.tokens]) for t in rollouts]
        kept = logprobs(model, sequences).view(len(rollouts), PROMPT + NEW, -1)[:, PROMPT - 1 : -1]
        chosen = kept.gather(-1, torch.from_numpy(np.stack([t.tokens for t in rollouts])).long()[..., None])[..., 0]
        optimizer.zero_grad()
        (-(advantages[:, None] * chosen).mean()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield copied(model)


def generate(
    model: Decoder, weights: list[Weights], kv: KVOnUpdate, text: np.ndarray, every: int
) -> tuple[list[Trajectory], float, int]:
    """Rollouts over all updates, their tokens a second, and the tokens that were prefilled."""
    model.load_state_dict(weights[0])
    engine, finished, prefilled = make_engine(model, kv), [], 0
    engine.submit(requests(text, 0))
    start, version = time.perf_counter(), 0
    while engine.num_unfinished:
        decoded = engine.decode(max_steps=every)
        finished += decoded.finished
        prefilled += decoded.prefilled
        if engine.num_unfinished and version + 1 < len(weights):
            version += 1
            model.load_state_dict(weights[version])
            engine.weights_updated(version)
    return finished, PROMPTS * GROUP * NEW / (time.perf_counter() - start), prefilled


@torch.no_grad()
def differences(model: Decoder, weights: list[Weights], rollouts: list[Trajectory]) -> dict[str, np.ndarray]:
    """|log-probability as sampled - that of a whole forward| of the tokens after the first update: under their own
    weights and under the last ones; and how far the last update alone has moved them (`step`)."""
    sequences = [np.concatenate([t.prompt_tokens, t.tokens]) for t in rollouts]
    chosen = torch.from_numpy(np.stack([t.tokens for t in rollouts])).long()[..., None]
    under = []
    for each in weights:
        model.load_state_dict(each)
        kept = logprobs(model, sequences).view(len(rollouts), PROMPT + NEW, -1)[:, PROMPT - 1 : -1]
        under.append(kept.gather(-1, chosen)[..., 0].numpy())
    sampled, versions = (np.stack([getattr(t, name) for t in rollouts]) for name in ("logprobs", "versions"))
    everything = np.stack(under)
    own = np.take_along_axis(everything, versions[None].astype(np.int64), 0)[0]
    return {
        "its own": np.abs(sampled - own)[versions > 0],
        "the last": np.abs(sampled - everything[-1])[versions > 0],
        "step": np.abs(everything[-1] - everything[-2])[versions > 0],
    }


def engine_rows(args: argparse.Namespace) -> list[Row]:
    text = np.frombuffer(b"\n".join(p.read_bytes() for p in sorted(ROOT.glob("docs/*.md"))), np.uint8).astype(np.int32)
    model = Decoder(spec_from_config(ModelConfig()))
    init_weights(model, seed=0)
    loss = pretrain(model, text, 400)
    start, rows = copied(model), [row("loss of the model before", loss, "nats a byte", better="lower")]
    for rate in RATES:
        model.load_state_dict(start)
        weights = list(policy_gradient(model, text, rate, (NEW - 1) // args.every))
        rates = dict.fromkeys(KVOnUpdate, 0.0)
        runs: dict[KVOnUpdate, list[Trajectory]] = {}
        prefilled = {}
        for _ in range(args.turns + 1):  # the first warms up
            for kv in KVOnUpdate:
                runs[kv], speed, prefilled[kv] = generate(model, weights, kv, text, args.every)
                rates[kv] = max(rates[kv], speed)
        for kv in KVOnUpdate:
            name, found = f"{kv.value}, lr {rate:g}", differences(model, weights, runs[kv])
            for which in ("its own", "the last"):
                label = f"{name}: log-prob difference to {which} weights"
                rows.append(row(f"{label}, mean", float(found[which].mean()), "nats", better="lower"))
                rows.append(row(f"{label}, max", float(found[which].max()), "nats", better="lower"))
            note = f"{prefilled[kv]:,} tokens prefilled; an update every {args.every} steps, {len(weights) - 1} in all"
            rows.append(row(f"{name}: rate", rates[kv], "tokens/s", better="higher", note=note))
        rows.append(
            row(
                f"one update, lr {rate:g}: change of a token's log-prob, mean",
                float(found["step"].mean()),
                "nats",
                better="lower",
            )
        )
        show(rows[-11:])
    return rows


def recipe_rows(args: argparse.Namespace) -> list[Row]:
    """The quickstart, in one process, with either setting: its mismatch as its own trainer measures it."""
    from asystem.compose import load_config
    from asystem.controller.run import train

    rows = []
    for kv in KVOnUpdate:
        with tempfile.TemporaryDirectory() as folder:
            overrides = (
                f"run_dir={folder}/run", "runtime=inline", "tracking=none", "tracking.console=false",
                f"steps={args.recipe_steps}", f"generation.kv_on_update={kv.value}", "evaluation.every=0",
            )  # fmt: skip
            train(load_config(["recipe=quickstart", *overrides]))
            lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()][1:]
        for name, unit in (("mismatch/logprob_diff_mean", "nats"), ("mismatch/logprob_diff_max", "nats"),
                           ("icepop/masked_fraction", "1")):  # fmt: skip
            value = float(np.mean([line[name] for line in lines]))
            rows.append(
                row(
                    f"quickstart, {kv.value}: {name}",
                    value,
                    unit,
                    better="lower",
                    note=f"mean of {args.recipe_steps} steps",
                )
            )
    show(rows)
    return rows


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    rows = engine_rows(args)
    if args.recipe_steps:
        rows += recipe_rows(args)
    if args.write:
        device = f"{cpu_name()}, {args.threads} threads"
        print(f"written to {write('kv-on-update', device, rows, name='cpu')}")


if __name__ == "__main__":
    main()

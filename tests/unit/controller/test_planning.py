"""`asystem plan`: its numbers are the engines' own, its choice is the quickest that fits, and it says why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from asystem.cli import main
from asystem.compose import load_config
from asystem.config import Config, PlacementKind, Recompute, RuntimeKind, Sleep
from asystem.controller.planning import (
    Choice,
    Estimator,
    Plan,
    Workload,
    make_plan,
    plan_run,
    predict,
    resolve,
    settings,
)
from asystem.controller.planning.predict import HOST_BLOCK, evened, training_seconds
from asystem.data.packing import plan_bins
from asystem.errors import CapacityError, ConfigError
from asystem.generation.memory import plan_memory
from asystem.memory import GIB, card_named, machine_of
from asystem.models import ModelSpec, spec_from_config
from asystem.training import train_memory


def w1(model: str, *overrides: str) -> Config:
    lengths = ("data.max_prompt_tokens=128", "rollout.max_new_tokens=512", "rollout.capacity=256")
    return load_config(["recipe=quickstart", f"model={model}", "rollout=sync", *lengths, *overrides])


def plan(config: Config, gpus: int, memory: float) -> Plan:
    return make_plan(config, spec_from_config(config.model), machine_of(gpus, memory))


def test_roles_are_what_the_engines_plan_for_themselves() -> None:
    config = w1("qwen3_0_6b")
    spec = spec_from_config(config.model)
    choice = Choice(PlacementKind.hybrid, 1, 1, Recompute.full, False, False, 8192)
    estimate = Estimator(config, spec, machine_of(1, card="H200")).of(choice)
    train = train_memory(spec, replace(config.training, recompute=Recompute.full), dtype=torch.bfloat16)
    alone = plan_memory(spec, config.generation, max_length=640, dtype=torch.bfloat16)
    generation, training = estimate.phases["generation"], estimate.phases["training"]
    assert generation["weights"] == training["weights"] == train.weights == 2 * spec.num_parameters
    assert generation["kv"] == alone.kv == 256 * 640 * 28 * 2 * 1024 * 2
    assert generation["workspace"] == alone.workspace
    assert (training["masters"], training["moments"]) == (4 * spec.num_parameters, 8 * spec.num_parameters)
    held = alone.workspace - alone.passing
    assert sum(training.values()) == train.total + alone.kv + held + training["context"]
    assert estimate.kv_tokens == 256 * 640 and estimate.short == 0


def test_asleep_a_phase_stands_beside_the_weights_alone() -> None:
    config = w1("qwen3_0_6b")
    estimator = Estimator(config, spec_from_config(config.model), machine_of(1, 16))
    awake = Choice(PlacementKind.hybrid, 1, 1, Recompute.full, False, False, 4096)
    asleep = estimator.of(replace(awake, sleep=True))
    assert "kv" not in asleep.phases["training"] and "moments" not in asleep.phases["generation"]
    assert asleep.moving == 12 * estimator.spec.num_parameters
    room = estimator.limit - sum(size for role, size in asleep.phases["generation"].items() if role != "kv")
    assert asleep.kv_tokens == room // estimator.generation().block * 16
    assert asleep.kv_tokens > 2 * estimator.of(awake).kv_tokens > 0


def test_one_large_card_needs_no_complication() -> None:
    chosen = plan(w1("qwen3_0_6b"), 1, 139).best
    assert (chosen.choice.layout, chosen.choice.recompute) == ("hybrid on 1", Recompute.none)
    assert not chosen.choice.offload and not chosen.choice.sleep
    assert chosen.seconds["publication"] == chosen.seconds["sleep"] == 0
    assert chosen.step == pytest.approx(chosen.seconds["generation"] + chosen.seconds["training"])
    assert 2 < chosen.step < 6, "W1 on an H200"


def test_states_go_to_the_host_where_they_do_not_fit() -> None:
    found = plan(w1("qwen3_1_7b"), 1, 24)
    assert found.best.choice.offload and max(map(_total, found.best.memory.phases.values())) <= 0.9 * 24 * GIB
    refused = next(text for text in found.reasons if text.startswith("not offload_optimizer=false"))
    assert "does not fit: training needs" in refused and "of 21.60" in refused


def test_two_cards_overlap_when_generation_may_run_ahead() -> None:
    lockstep, ahead = (plan(w1("qwen3_0_6b", f"rollout.max_staleness={eta}"), 2, 79) for eta in (0, 1))
    assert lockstep.best.choice.layout == "hybrid on 2" and ahead.best.choice.layout == "hybrid on 2"
    split = [next(c for knob, value, c in p.others if value == "split 1 + 1") for p in (lockstep, ahead)]
    assert split[1].step < split[0].step
    phases = split[1].seconds
    assert split[1].step == pytest.approx(max(phases["generation"], phases["training"]) + phases["publication"])
    assert 0 < lockstep.best.seconds["publication"] < split[0].seconds["publication"], "half is gathered over NVLink"


def test_a_trained_model_that_is_cut_gets_whole_groups_of_ranks() -> None:
    cut = w1("qwen3_0_6b", "training.ranks=2", "training.tensor_parallel=2")
    found = plan(cut, 4, 79)
    layouts = {found.best.choice.layout, *(candidate.choice.layout for _, _, candidate in found.others)}
    assert layouts == {"split 2 + 2"}, "3 + 1 and 1 + 3 have half a group, hybrid ranks whole models"
    with pytest.raises(CapacityError, match=r"2 device\(s\) are too few for training.tensor_parallel=2 x"):
        plan(cut, 2, 79)


def test_what_does_not_fit_is_said_with_numbers_and_a_remedy_that_was_tried() -> None:
    with pytest.raises(CapacityError) as raised:
        plan(w1("qwen3_8b", "model.tokenizer=bytes"), 1, 24)
    text = str(raised.value)
    assert "hybrid on 1" in text and "gradients" in text and "allows 21.60" in text
    assert text.endswith("training.lora.rank=16 training.lora.base=nf4 would fit")
    remedied = w1("qwen3_8b", "training.lora.rank=16", "training.lora.base=nf4")
    assert plan(remedied, 1, 24).best.fits


def test_what_training_cuts_over_ranks_is_not_shared() -> None:
    config = w1("qwen3_0_6b", "training.ranks=2", "training.tensor_parallel=2")
    found = plan(config, 4, 24)
    assert {found.best.choice.layout, *(value for knob, value, _ in found.others if knob == "placement")} == {
        "split 2 + 2"
    }
    found.apply(config).check()
    streamed = w1("qwen3_0_6b", "device=auto", "training.offload_optimizer=true", "training.offload_parameters=true",
                  "training.recompute=full")  # fmt: skip
    chosen = plan(streamed, 2, 24).best.choice
    assert chosen.layout == "split 1 + 1" and chosen.recompute is not Recompute.none


def test_one_process_has_one_rank() -> None:
    config = w1("qwen3_0_6b")
    config.runtime.kind = RuntimeKind.inline
    assert plan(config, 8, 79).best.choice.training_ranks == 1


def test_a_plan_is_a_configuration_that_is_not_refused() -> None:
    config = w1("qwen3_4b", "training=lora", "placement=auto")
    found = plan(config, 1, 24)
    chosen = found.apply(config)
    chosen.check()
    assert (config.device, chosen.device, settings(config, found)["device"]) == ("cpu", "auto", "auto")
    assert chosen.placement.kind is PlacementKind.hybrid and chosen.placement.sleep is not Sleep.auto
    assert chosen.generation.kv_tokens == found.best.choice.kv_tokens >= 640
    assert config.placement.kind is PlacementKind.auto, "the original is left alone"


def test_pinned_plans_choose_sleep_and_pool_alone() -> None:
    config = w1("qwen3_0_6b", "placement=hybrid", "training.micro_batch_tokens=2048")
    found = make_plan(config, spec_from_config(config.model), machine_of(1, 16), pinned=True)
    assert (found.best.choice.micro, found.best.choice.recompute) == (2048, Recompute.none)
    assert found.best.choice.sleep, "without it a few rollouts decode at once"


def test_this_machine_runs_its_own_plan() -> None:
    config = load_config(["recipe=quickstart", "placement=auto", "device=cpu", "rollout=sync"])
    chosen, reasons = resolve(config)
    assert chosen.placement.kind is PlacementKind.hybrid and "s a step predicted" in reasons[0]
    assert chosen.training.micro_batch_tokens == config.training.micro_batch_tokens, "sizes are a GPU's concern"
    untouched, none = resolve(load_config(["recipe=quickstart", "device=cpu"]))
    assert untouched.placement.kind is PlacementKind.split and none == []


def test_mean_lengths_shrink_a_step() -> None:
    config, machine = w1("qwen3_0_6b"), machine_of(1, card="H100")
    long, short = plan_run(config, machine), plan_run(config, machine, prompt=64, new=128)
    assert short.work == Workload(256, 8, 64, 128)
    assert short.best.step < long.best.step / 2
    assert Workload.of(load_config(["recipe=quickstart"])).rollouts == 250, "a window of Φ tokens"


@pytest.mark.parametrize(
    ("rollouts", "micro", "ranks", "updates", "expected"),
    [
        (256, 32_768, 1, 1, (6, 27_520)),  # 51 sequences of 640 fit, so that 5 micro-batches lack room for the last one
        (256, 8192, 1, 1, (22, 7680)),
        (64, 32_768, 1, 1, (2, 20_480)),
        (64, 32_768, 2, 1, (1, 20_480)),
        (256, 32_768, 1, 2, (6, 27_520)),  # each update has 3 of 128 sequences
        (64, 512, 1, 1, (64, 640)),  # longer than the limit: each stands alone
    ],
)
def test_micro_batches_are_those_of_packing(
    rollouts: int, micro: int, ranks: int, updates: int, expected: tuple[int, int]
) -> None:
    config = w1("qwen3_0_6b", f"training.minibatches={updates}")
    assert evened(Workload(rollouts, 8, 128, 512), config, ranks, micro) == expected
    bins = plan_bins([640] * (rollouts // ranks // updates), micro)
    assert (updates * len(bins), 640 * max(map(len, bins))) == expected


def test_a_size_is_what_its_micro_batches_fill() -> None:
    """64 rollouts of 640 tokens under a limit of 32,768 are two micro-batches of 20,480, so that is the limit."""
    config, machine = w1("qwen3_0_6b", "rollout.capacity=64"), machine_of(1, card="H200")
    assert plan_run(config, machine).best.choice.micro == 20_480
    half = plan_run(config, machine, prompt=64, new=256).best.choice.micro
    assert half == 64 * 320 + 320, "one micro-batch, and room for rollouts longer than the mean"


def seconds_of(config: Config, micro: int, recompute: Recompute) -> float:
    """Of training's passes on an H200, without its update."""
    spec, card = spec_from_config(config.model), machine_of(1, card="H200").card
    return training_seconds(
        spec, card, Workload.of(config), config, ranks=1, micro=micro, recompute=recompute, zero=3, state_bytes=0,
        host_bytes=0,
    )  # fmt: skip


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the H200 on which the figures below were taken, whatever a block takes of the host by now."""
    monkeypatch.setattr(predict, "HOST_BLOCK", 3.7e-3)
    monkeypatch.setattr(predict, "HOST_BLOCK_LORA", 5.2e-3)


def test_small_micro_batches_take_the_hosts_time_for_their_blocks(host: None) -> None:
    """An H200 took 2.31 s for W1 at 8k a micro-batch, and 4.1 for 4B with adapters at 2k."""
    config = w1("qwen3_0_6b")
    products = 591.4e12 / (0.45 * 989e12)
    assert seconds_of(config, 32_768, Recompute.none) == pytest.approx(products + 6 * 0.03, rel=0.001)
    assert seconds_of(config, 16_384, Recompute.none) == pytest.approx(products + 11 * 0.03, rel=0.001)
    assert seconds_of(config, 8192, Recompute.none) == pytest.approx(22 * 28 * 3.7e-3)
    adapters = w1("qwen3_4b", "training=lora", "rollout.capacity=64")
    small = seconds_of(adapters, 2048, Recompute.none)
    assert small == pytest.approx(22 * 36 * 5.2e-3)
    assert seconds_of(adapters, 20_480, Recompute.full) < 0.6 * small, "two, for which the host has time"


def test_lower_stages_send_less_and_hold_more() -> None:
    """Over PCIe: 22 micro-batches of 0.6B gather 2 bytes a parameter twice each, and scatter 4."""
    config, card = w1("qwen3_0_6b", "training.micro_batch_tokens=4096"), machine_of(1, card="4090").card
    spec = spec_from_config(config.model)
    sent = {3: 22 * 8, 2: 2 + 22 * 4, 1: 2 + 4}
    for zero, each in sent.items():
        found = training_seconds(
            spec, replace(card, flops=1e18), Workload.of(config), config, ranks=2, micro=4096,
            recompute=Recompute.none, zero=zero, state_bytes=0, host_bytes=0,
        )  # fmt: skip
        assert found == pytest.approx(max(each * 596.05e6 / 2 / card.link + 22 * 0.03, 22 * 28 * HOST_BLOCK), rel=0.01)
    wide, narrow = plan(config, 2, 24).best.choice, plan(w1("qwen3_4b"), 2, 48).best.choice
    assert (wide.training_ranks, wide.zero) == (2, 1)
    assert (narrow.training_ranks, narrow.zero) == (2, 3), "gradients of 4B are 16 GB, weights 8"
    fixed = plan(w1("qwen3_0_6b", "training.zero=3"), 2, 24)
    assert fixed.best.choice.zero == 3
    assert fixed.apply(config).training.zero == "3"


def test_recompute_buys_micro_batches_that_the_host_keeps_up_with(host: None) -> None:
    adapters = w1("qwen3_4b", "training=lora", "training.lora.rank=16", "rollout.capacity=64")
    h200 = machine_of(1, card="H200")
    capped = replace(h200, card=replace(h200.card, memory=24 * GIB))
    found = make_plan(adapters, spec_from_config(adapters.model), capped)
    assert (found.best.choice.recompute, found.best.choice.micro) == (Recompute.full, 20_480)
    without = next(c for knob, value, c in found.others if (knob, value) == ("recompute", "none"))
    assert without.choice.micro == 1920 and without.seconds["training"] > 1.5 * found.best.seconds["training"]
    slower = plan(adapters, 1, 24).best.choice
    assert (slower.recompute, slower.micro) == (Recompute.none, 1920), "a 4090's products take longer than its host"


def test_the_command_prints_json_and_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=quickstart", "--gpus", "2", "--memory", "24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["devices"] == 2 and found["machine"]["memory"] == 24 * GIB
    for roles in found["memory"].values():
        assert roles["total"] == sum(size for role, size in roles.items() if role != "total")
    assert main(["plan", "recipe=quickstart", "--card", "4090"]) == 0
    shown = capsys.readouterr().out
    assert "GiB a device, of 21.60" in shown and "not placement=split 1 + 1" in shown
    assert main(["plan", "recipe=quickstart", "--gpu", "2"]) == 2
    assert "asystem plan takes --gpus N" in capsys.readouterr().err


def test_machines_are_named_or_refused() -> None:
    assert card_named("NVIDIA H200", 140 * GIB).bandwidth == 4.8e12
    other = card_named("NVIDIA RTX 6000", 30 * GIB)
    assert (other.name, other.memory, other.bandwidth) == ("NVIDIA RTX 6000", 30 * GIB, 1.79e12)
    for bad in ((0, 24.0, None), (1, None, None), (1, None, "H20"), (1, -1.0, None)):
        with pytest.raises(ConfigError, match="--"):
            machine_of(*bad)


def _total(roles: dict[str, int]) -> int:
    return sum(roles.values())


def test_sleep_is_for_one_process() -> None:
    with pytest.raises(ConfigError, match=r"placement\.sleep=always .* use placement=hybrid"):
        load_config(["recipe=quickstart", "placement.sleep=always"])
    assert isinstance(spec_from_config(load_config(["recipe=quickstart"]).model), ModelSpec)

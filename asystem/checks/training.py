"""Training of all three commands, its memory, and adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from asystem.checks.rules import Rule, above, at_least

if TYPE_CHECKING:
    from asystem.config import Config


def finetune(config: Config) -> Iterator[Rule]:
    finetune, model = config.finetune, config.model
    yield (
        finetune.epochs is not None and not finetune.epochs > 0,
        f"finetune.epochs={finetune.epochs} must be above 0, or null for as many steps as `steps` says",
    )
    yield at_least("finetune.batch_size", finetune.batch_size, 1)
    yield at_least("finetune.max_tokens", finetune.max_tokens, 2)
    yield (
        model.path is None and finetune.max_tokens > model.max_positions,
        f"finetune.max_tokens={finetune.max_tokens} exceeds model.max_positions={model.max_positions}: lower it",
    )
    yield at_least("finetune.held_out", finetune.held_out, 0)
    yield (
        finetune.held_out > 0 and config.data.evaluation is not None,
        f"finetune.held_out={finetune.held_out} and data.evaluation={config.data.evaluation} both name held-out rows: "
        "leave one out",
    )
    yield (
        finetune.export and model.path is None and config.training.lora.rank > 0,
        "training.lora trains adapters to random weights, which cannot be exported: set model.path to a model folder, "
        "or finetune.export=false",
    )
    yield above("dpo.beta", config.dpo.beta, 0)
    yield (
        not 0 <= config.dpo.label_smoothing < 0.5,
        f"dpo.label_smoothing={config.dpo.label_smoothing:g} must be at least 0 and below 0.5",
    )
    yield (
        config.dpo.label_smoothing > 0 and config.dpo.loss.value == "ipo",
        "dpo.label_smoothing is for dpo.loss=sigmoid; IPO has no such term: leave it at 0",
    )


def training(config: Config) -> Iterator[Rule]:
    training, warmup = config.training, config.training.warmup
    yield above("training.lr", training.lr, 0)
    yield at_least("training.micro_batch_tokens", training.micro_batch_tokens, 1)
    yield at_least("training.minibatches", training.minibatches, 1)
    yield (
        len(training.betas) != 2 or not all(0 <= beta < 1 for beta in training.betas),
        f"training.betas={list(training.betas)} must be two numbers in [0, 1)",
    )
    yield at_least("training.weight_decay", training.weight_decay, 0)
    yield above("training.eps", training.eps, 0)
    yield above("training.clip_norm", training.clip_norm, 0)
    yield at_least("training.lr_warmup_steps", training.lr_warmup_steps, 0)
    yield at_least("training.max_bad_steps", training.max_bad_steps, 1)
    for key in ("balance_coefficient", "router_z_coefficient", "expert_bias_rate"):
        yield at_least(f"training.{key}", getattr(training, key), 0)
    yield (
        training.expert_bias_rate > 0 and training.lora.rank > 0,
        f"training.expert_bias_rate={training.expert_bias_rate:g} moves weights that training.lora.rank="
        f"{training.lora.rank} freezes: set one of them to 0",
    )
    yield (
        training.expert_bias_rate > 0 and training.master.value == "bfloat16_stochastic",
        f"training.expert_bias_rate={training.expert_bias_rate:g} is too small a step for biases in bfloat16: use "
        "training.master=float32",
    )
    yield at_least("training.warmup.steps", warmup.steps, 0)
    yield at_least("training.warmup.batch_size", warmup.batch_size, 1)
    yield above("training.warmup.lr", warmup.lr, 0)
    yield (
        training.dtype not in ("auto", "float32", "bfloat16"),
        f'training.dtype="{training.dtype}": choose auto, float32 or bfloat16',
    )
    yield (
        training.head_dtype not in ("auto", "float32"),
        f'training.head_dtype="{training.head_dtype}": choose auto or float32',
    )


def memory(config: Config) -> Iterator[Rule]:
    training = config.training
    yield training.zero not in ("auto", "1", "2", "3"), f'training.zero="{training.zero}": choose auto, 1, 2 or 3'
    is_half = training.dtype == "bfloat16" or (training.dtype == "auto" and config.device != "cpu")
    yield (
        training.master.value == "bfloat16_stochastic" and not is_half,
        f"training.master=bfloat16_stochastic keeps weights in bfloat16, and training.dtype={training.dtype} on device="
        f"{config.device} is float32: set training.dtype=bfloat16, or training.master=float32",
    )
    yield (
        training.offload_optimizer and config.device == "cpu",
        "training.offload_optimizer moves states from the GPU to the host's memory, where device=cpu has them already; "
        "leave it out",
    )
    yield (
        training.offload_optimizer and training.ranks > 1,
        f"training.offload_optimizer works on one rank, and training.ranks={training.ranks} share the states already: "
        "leave one of them out",
    )


def streaming(config: Config) -> Iterator[Rule]:
    training = config.training
    if not training.offload_parameters:
        return
    yield (
        config.device == "cpu",
        "training.offload_parameters streams weights to a GPU, and device=cpu has them already; leave it out",
    )
    yield (
        training.ranks > 1,
        f"training.offload_parameters works on one rank, and training.ranks={training.ranks} share the weights: leave "
        "one of them out",
    )
    yield (
        not training.offload_optimizer,
        "training.offload_parameters leaves masters and moments, six times as large, on the GPU: set "
        "training.offload_optimizer=true",
    )
    yield (
        training.recompute.value == "none",
        "training.offload_parameters keeps no weight from forward to backward: set training.recompute to selective or "
        "full",
    )
    yield (
        config.placement.kind.value == "hybrid",
        "training.offload_parameters has no weights on the GPU that generation could share: use placement=split",
    )


def lora(config: Config) -> Iterator[Rule]:
    lora = config.training.lora
    yield at_least("training.lora.rank", lora.rank, 0)
    yield above("training.lora.alpha", lora.alpha, 0)
    yield not 0 <= lora.dropout < 1, f"training.lora.dropout={lora.dropout:g} must lie in [0, 1)"
    yield lora.base not in ("auto", "int8", "nf4"), f'training.lora.base="{lora.base}": choose auto, int8 or nf4'
    yield (
        lora.base != "auto" and lora.rank == 0,
        f"training.lora.base={lora.base} keeps matrices that do not train: set training.lora.rank above 0",
    )
    yield (
        lora.base != "auto" and config.training.ranks > 1,
        f"training.lora.base={lora.base} works on one rank, and training.ranks={config.training.ranks} share the base "
        "already: leave one of them out",
    )
    yield lora.rank > 0 and not lora.targets, "training.lora.targets is empty: nothing would train"
    yield (
        lora.adapter is not None and lora.rank == 0,
        f"training.lora.adapter={lora.adapter} needs adapters to train: set training.lora.rank above 0",
    )

"""What a configuration may not say: one table of rules a section, all looked at before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from asystem.errors import ConfigError, nearest

if TYPE_CHECKING:
    from asystem.config import Config

Rule = tuple[bool, str]
"""(is it broken?, what is wrong with which numbers, and the remedy)."""

ADVANTAGES = ("grpo", "rloo", "reinforce", "reinforce++", "reinforce++baseline", "gae")
BATCH_ADVANTAGES = ("reinforce", "reinforce++", "gae")
SURROGATES = ("ppo", "gspo", "cispo", "reinforce")
CORRECTIONS = ("none", "tis", "icepop", "kpop", "mis", "geometric")
TOKEN_CORRECTIONS = ("tis", "icepop", "kpop")

CURRICULA = ("none", "unsolved", "pass_rate")

DENSE_FAMILIES = ("llama", "qwen2", "qwen3")
MOE_FAMILIES = ("qwen3_moe", "olmoe", "bailing_moe_v2")

RAY_LEAST_STORE = 75 * 2**20  # bytes; Ray refuses a smaller object store


def check(config: Config) -> None:
    """Raises the first broken rule.

    Raises:
        ConfigError: in one line.
    """
    is_rl = config.command.value == "train"
    program = (_positions, _algorithm, _rollout, _liveness) if is_rl else (_finetune,)
    training = (_training, _memory, _streaming, _lora, _parallel)
    for section in (_run, _model, *program, *training, _placement, _weights, _precision, _others):
        for broken, message in section(config):
            if broken:
                raise ConfigError(message)


def _at_least(name: str, value: float, least: float) -> Rule:
    return not value >= least, f"{name}={_plain(value)} is below {_plain(least)}"


def _above(name: str, value: float, bound: float) -> Rule:
    return not value > bound, f"{name}={_plain(value)} must be above {_plain(bound)}"


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _run(config: Config) -> Iterator[Rule]:
    yield _at_least("steps", config.steps, 1)
    yield _at_least("seed", config.seed, 0)
    yield config.device not in ("auto", "cpu", "cuda"), f'device="{config.device}": choose auto, cpu or cuda'
    yield _above("runtime.deadline_seconds", config.runtime.deadline_seconds, 0)
    yield _above("runtime.start_seconds", config.runtime.start_seconds, 0)
    yield _at_least("runtime.threads_per_rank", config.runtime.threads_per_rank, 1)
    yield _at_least("runtime.object_store_bytes", config.runtime.object_store_bytes, RAY_LEAST_STORE)


def _model(config: Config) -> Iterator[Rule]:
    model = config.model
    if model.path is not None:
        return
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        yield _at_least(f"model.{name}", getattr(model, name), 1)
    yield (
        model.num_heads % model.num_kv_heads != 0,
        f"model.num_heads={model.num_heads} is no multiple of model.num_kv_heads={model.num_kv_heads}",
    )
    yield _at_least("model.head_dim", model.head_dim, 2)
    yield model.head_dim % 2 != 0, f"model.head_dim={model.head_dim} is odd; rotary embedding pairs its halves"
    yield _above("model.rope_theta", model.rope_theta, 0)
    known = (*DENSE_FAMILIES, *MOE_FAMILIES)
    yield model.family not in known, f'model.family="{model.family}" is unknown{nearest(model.family, known)}'
    yield (
        model.experts.count > 0 and model.family not in MOE_FAMILIES,
        f"model.experts.count={model.experts.count} needs a family with experts, and model.family={model.family}: use "
        f"one of {', '.join(MOE_FAMILIES)}",
    )
    yield (
        model.experts.count == 0 and model.family in MOE_FAMILIES,
        f"model.family={model.family} has experts, and model.experts.count=0: set how many",
    )


def _positions(config: Config) -> Iterator[Rule]:
    model, longest = config.model, config.data.max_prompt_tokens + config.rollout.max_new_tokens
    yield (
        model.path is None and longest > model.max_positions,
        f"data.max_prompt_tokens={config.data.max_prompt_tokens} + rollout.max_new_tokens="
        f"{config.rollout.max_new_tokens} exceed model.max_positions={model.max_positions}: raise it to {longest}",
    )


def _algorithm(config: Config) -> Iterator[Rule]:
    algorithm = config.algorithm
    least = 1 if algorithm.advantage in BATCH_ADVANTAGES else 2
    yield (
        algorithm.group_size < least,
        f"algorithm.group_size={algorithm.group_size} is below {least}: group advantages compare the samples of a "
        "prompt and need at least 2; advantage=reinforce, reinforce++ and gae compare those of a batch",
    )
    for key, known in (("advantage", ADVANTAGES), ("surrogate", SURROGATES), ("correction", CORRECTIONS)):
        name = getattr(algorithm, key)
        yield ".py:" not in name and name not in known, f'algorithm.{key}="{name}" is unknown{nearest(name, known)}'
    yield (
        not 0 < algorithm.icepop_alpha < algorithm.icepop_beta,
        f"IcePop's band [{algorithm.icepop_alpha:g}, {algorithm.icepop_beta:g}] needs 0 < icepop_alpha < icepop_beta; "
        "Ring-1T used [0.5, 5]",
    )
    band = algorithm.geometric_band
    yield (
        len(band) != 2 or not 0 < band[0] <= 1 <= band[1],
        f"algorithm.geometric_band={list(band)} must be two numbers around 1, the ratio of engines that agree",
    )
    for key in ("tis_cap", "kpop_phi", "mis_cap", "clip_high"):
        yield _above(f"algorithm.{key}", getattr(algorithm, key), 0)
    yield not 0 < algorithm.clip_low < 1, f"algorithm.clip_low={algorithm.clip_low:g} must lie between 0 and 1"
    yield (
        algorithm.dual_clip is not None and algorithm.dual_clip <= 1 + algorithm.clip_high,
        f"algorithm.dual_clip={algorithm.dual_clip} must be above 1 + clip_high = {1 + algorithm.clip_high:g}, or null",
    )
    yield not 0 < algorithm.gamma <= 1, f"algorithm.gamma={algorithm.gamma:g} must lie in (0, 1]"
    yield not 0 <= algorithm.gae_lambda <= 1, f"algorithm.gae_lambda={algorithm.gae_lambda:g} must lie between 0 and 1"
    yield (
        algorithm.value_clip is not None and not algorithm.value_clip > 0,
        f"algorithm.value_clip={algorithm.value_clip} must be above 0, or null",
    )
    yield (
        algorithm.group_filter is not None and ".py:" not in algorithm.group_filter,
        f'algorithm.group_filter="{algorithm.group_filter}" is no function of the recipe: name it file.py:function, or '
        "null",
    )
    yield _at_least("algorithm.dynamic_sampling", algorithm.dynamic_sampling, 0)
    yield _at_least("algorithm.dynamic_windows", algorithm.dynamic_windows, 1)
    yield _at_least("algorithm.kl_coefficient", algorithm.kl_coefficient, 0)
    yield _at_least("algorithm.entropy_coefficient", algorithm.entropy_coefficient, 0)
    yield (
        not 0 <= algorithm.overlong_buffer <= config.rollout.max_new_tokens,
        f"algorithm.overlong_buffer={algorithm.overlong_buffer} must lie between 0 and rollout.max_new_tokens="
        f"{config.rollout.max_new_tokens}",
    )
    yield (
        algorithm.normalizer.value == "budget" and config.rollout.token_budget is None,
        "algorithm.normalizer=budget divides by rollout.token_budget, which is null; set it, or use response or token",
    )
    yield from _combinations(config)


def _combinations(config: Config) -> Iterator[Rule]:
    """What would be ignored, or count twice."""
    algorithm = config.algorithm
    yield (
        algorithm.advantage == "gae" and not algorithm.value_coefficient > 0,
        f"algorithm.advantage=gae takes its baseline from a value head, which algorithm.value_coefficient="
        f"{algorithm.value_coefficient:g} does not train: set it above 0, or use a baseline without a head",
    )
    yield (
        algorithm.advantage == "gae" and algorithm.drop_equal_groups,
        "algorithm.drop_equal_groups leaves out groups of equal rewards, which tell a value head as much as others: "
        "with advantage=gae use drop_equal_groups=false",
    )
    yield (
        algorithm.kl_coefficient == 0 and algorithm.kl_estimator.value != "k3",
        f"algorithm.kl_estimator={algorithm.kl_estimator.value} measures a distance that algorithm.kl_coefficient=0 "
        "leaves out, and no reference is held for it: set kl_coefficient above 0, or leave the estimator out",
    )
    yield (
        algorithm.dynamic_sampling > 0 and not algorithm.drop_equal_groups and algorithm.group_filter is None,
        f"algorithm.dynamic_sampling={algorithm.dynamic_sampling} asks for groups in place of those without signal, "
        "which algorithm.drop_equal_groups=false trains all the same: set it to true",
    )
    most = algorithm.dynamic_windows * (config.rollout.capacity // max(1, algorithm.group_size))
    yield (
        algorithm.dynamic_sampling > most,
        f"algorithm.dynamic_sampling={algorithm.dynamic_sampling} groups are more than algorithm.dynamic_windows="
        f"{algorithm.dynamic_windows} windows of rollout.capacity={config.rollout.capacity} rollouts have: lower it to "
        f"{most}, or raise one of those",
    )
    yield (
        algorithm.surrogate == "gspo" and algorithm.correction in TOKEN_CORRECTIONS,
        f"algorithm.surrogate=gspo has one ratio a response, and algorithm.correction={algorithm.correction} masks or "
        "weighs single tokens of it; use correction=none, mis or geometric",
    )
    yield (
        algorithm.anchor.value == "behavior" and algorithm.correction != "none",
        f"algorithm.anchor=behavior has p_train/p_infer in the surrogate's ratio already, and algorithm.correction="
        f"{algorithm.correction} would count it twice; use correction=none or anchor=proximal",
    )
    yield (
        algorithm.routing_replay and not config.generation.return_routing,
        "algorithm.routing_replay=true trains with the experts that generation chose, which it does not bring along: "
        "set generation.return_routing=true",
    )
    yield (
        algorithm.surrogate == "reinforce" and config.training.minibatches > 1,
        f"algorithm.surrogate=reinforce has no ratio that tells training.minibatches={config.training.minibatches} "
        "updates of a batch apart; use minibatches=1 or another surrogate",
    )


def _rollout(config: Config) -> Iterator[Rule]:
    rollout, group = config.rollout, config.algorithm.group_size
    yield (
        rollout.max_staleness < 0,
        f"rollout.max_staleness={rollout.max_staleness} (η) is below 0; 0 is lockstep, 1 overlaps one batch",
    )
    yield (
        rollout.token_budget is not None and rollout.token_budget <= 0,
        f"rollout.token_budget={rollout.token_budget} (Φ) must be above 0, or null to wait for all rollouts",
    )
    yield rollout.retention < 0, f"rollout.retention={rollout.retention} (σ) is below 0"
    yield (
        rollout.capacity < group,
        f"rollout.capacity={rollout.capacity} (Ω) is below one group of {group}; set it to a multiple of {group}",
    )
    below = rollout.capacity - rollout.capacity % group
    yield (
        rollout.capacity % group != 0,
        f"rollout.capacity={rollout.capacity} (Ω) is no multiple of algorithm.group_size={group}; "
        f"use {below} or {below + group}",
    )
    yield _at_least("rollout.max_new_tokens", rollout.max_new_tokens, 1)
    yield _at_least("rollout.slice_steps", rollout.slice_steps, 1)
    yield (
        rollout.temperature <= 0,
        (f"rollout.temperature={rollout.temperature:g}: rollouts are sampled, so it must be above 0"),
    )
    yield not 0 < rollout.top_p <= 1, f"rollout.top_p={rollout.top_p:g} must lie in (0, 1]"
    yield _at_least("rollout.top_k", rollout.top_k, 0)
    yield (
        rollout.lengths.median is not None and not rollout.lengths.median > 0,
        f"rollout.lengths.median={rollout.lengths.median} must be above 0, or null to let end tokens end responses",
    )
    yield _at_least("rollout.lengths.sigma", rollout.lengths.sigma, 0)
    yield (
        rollout.top_p < 1 or rollout.top_k > 0,
        f"rollout.top_p={rollout.top_p:g}, top_k={rollout.top_k}: training scores tokens under the whole distribution, "
        "so truncated sampling would bias every ratio; use top_p=1 and top_k=0",
    )


def _liveness(config: Config) -> Iterator[Rule]:
    """A group must be able to finish within σ + 1 windows, or it would be purged for ever (see `rollout.pool`)."""
    rollout, group = config.rollout, config.algorithm.group_size
    if rollout.token_budget is None:
        return
    needed, granted = group * rollout.max_new_tokens, rollout.token_budget * (rollout.retention + 1)
    yield (
        needed > granted,
        f"a group of {group} × {rollout.max_new_tokens} new tokens cannot finish within "
        f"rollout.retention+1={rollout.retention + 1} windows of rollout.token_budget={rollout.token_budget}: it would "
        f"be purged for ever; raise token_budget to {-(-needed // (rollout.retention + 1))} or retention to "
        f"{-(-needed // rollout.token_budget) - 1}, or lower max_new_tokens",
    )


def _finetune(config: Config) -> Iterator[Rule]:
    finetune, model = config.finetune, config.model
    yield (
        finetune.epochs is not None and not finetune.epochs > 0,
        f"finetune.epochs={finetune.epochs} must be above 0, or null for as many steps as `steps` says",
    )
    yield _at_least("finetune.batch_size", finetune.batch_size, 1)
    yield _at_least("finetune.max_tokens", finetune.max_tokens, 2)
    yield (
        model.path is None and finetune.max_tokens > model.max_positions,
        f"finetune.max_tokens={finetune.max_tokens} exceeds model.max_positions={model.max_positions}: lower it",
    )
    yield _at_least("finetune.held_out", finetune.held_out, 0)
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
    yield _above("dpo.beta", config.dpo.beta, 0)
    yield (
        not 0 <= config.dpo.label_smoothing < 0.5,
        f"dpo.label_smoothing={config.dpo.label_smoothing:g} must be at least 0 and below 0.5",
    )
    yield (
        config.dpo.label_smoothing > 0 and config.dpo.loss.value == "ipo",
        "dpo.label_smoothing is for dpo.loss=sigmoid; IPO has no such term: leave it at 0",
    )


def _training(config: Config) -> Iterator[Rule]:
    training, warmup = config.training, config.training.warmup
    yield _above("training.lr", training.lr, 0)
    yield _at_least("training.micro_batch_tokens", training.micro_batch_tokens, 1)
    yield _at_least("training.minibatches", training.minibatches, 1)
    yield (
        len(training.betas) != 2 or not all(0 <= beta < 1 for beta in training.betas),
        f"training.betas={list(training.betas)} must be two numbers in [0, 1)",
    )
    yield _at_least("training.weight_decay", training.weight_decay, 0)
    yield _above("training.eps", training.eps, 0)
    yield _above("training.clip_norm", training.clip_norm, 0)
    yield _at_least("training.lr_warmup_steps", training.lr_warmup_steps, 0)
    yield _at_least("training.max_bad_steps", training.max_bad_steps, 1)
    for key in ("balance_coefficient", "router_z_coefficient", "expert_bias_rate"):
        yield _at_least(f"training.{key}", getattr(training, key), 0)
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
    yield _at_least("training.warmup.steps", warmup.steps, 0)
    yield _at_least("training.warmup.batch_size", warmup.batch_size, 1)
    yield _above("training.warmup.lr", warmup.lr, 0)
    yield (
        training.dtype not in ("auto", "float32", "bfloat16"),
        f'training.dtype="{training.dtype}": choose auto, float32 or bfloat16',
    )
    yield (
        training.head_dtype not in ("auto", "float32"),
        f'training.head_dtype="{training.head_dtype}": choose auto or float32',
    )


def _memory(config: Config) -> Iterator[Rule]:
    training = config.training
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


def _streaming(config: Config) -> Iterator[Rule]:
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


def _lora(config: Config) -> Iterator[Rule]:
    lora = config.training.lora
    yield _at_least("training.lora.rank", lora.rank, 0)
    yield _above("training.lora.alpha", lora.alpha, 0)
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


def _placement(config: Config) -> Iterator[Rule]:
    inline, hybrid = config.runtime.kind.value == "inline", config.placement.kind.value == "hybrid"
    auto = config.placement.kind.value == "auto"
    for section in ("training", "generation", "reward"):
        yield _at_least(f"{section}.ranks", getattr(config, section).ranks, 1)
    ranks, parallel = config.generation.ranks, config.generation.tensor_parallel
    yield _at_least("generation.tensor_parallel", parallel, 1)
    yield (
        ranks % parallel != 0,
        f"generation.ranks={ranks} is no multiple of generation.tensor_parallel={parallel}, the ranks of one replica; "
        f"use {ranks + -ranks % parallel}",
    )
    yield (
        inline and parallel > 1,
        f"generation.tensor_parallel={parallel} needs a process for each rank: use runtime=ray",
    )
    yield (
        inline and config.training.ranks > 1,
        f"training.ranks={config.training.ranks} needs a process for each rank: use runtime=ray, or training.ranks=1",
    )
    yield (
        hybrid and (config.training.ranks != config.generation.ranks or parallel > 1),
        f"placement=hybrid with training.ranks={config.training.ranks}, generation.ranks={ranks} and "
        f"generation.tensor_parallel={parallel}: each of its ranks trains and generates by itself; set both ranks to "
        "one number and tensor_parallel=1, or use placement=split",
    )
    yield (
        auto and config.command.value != "train",
        f"placement=auto is for asystem train; asystem {config.command.value} has one group of workers: leave it out",
    )
    yield (
        config.placement.sleep.value == "always" and not (hybrid or auto),
        "placement.sleep=always has phases take turns in one process, and placement=split has two: use "
        "placement=hybrid, or sleep=auto",
    )


def _parallel(config: Config) -> Iterator[Rule]:
    training = config.training
    ranks, tensor, expert = training.ranks, training.tensor_parallel, training.expert_parallel
    yield _at_least("training.tensor_parallel", tensor, 1)
    yield _at_least("training.expert_parallel", expert, 1)
    yield (
        ranks % (tensor * expert) != 0,
        f"training.ranks={ranks} is no multiple of training.tensor_parallel={tensor} x training.expert_parallel="
        f"{expert}; use {ranks + -ranks % (tensor * expert)}",
    )
    yield (
        tensor * expert > 1 and config.placement.kind.value == "hybrid",
        f"placement=hybrid decodes with whole copies, and training.tensor_parallel={tensor} x training.expert_parallel="
        f"{expert} ranks have parts of the layers alone: use placement=split",
    )
    cut = f"training.tensor_parallel={tensor}" if tensor > 1 else f"training.expert_parallel={expert}"
    yield (
        tensor * expert > 1 and training.lora.rank > 0,
        f"{cut} cuts matrices over ranks, and adapters (training.lora.rank={training.lora.rank}) stand beside whole "
        "ones: shard by training.ranks alone",
    )
    yield (
        tensor > 1 and training.optimizer.value == "adamw8bit",
        f"{cut} cuts rows through the blocks that training.optimizer=adamw8bit scales: use adamw, or "
        "training.tensor_parallel=1",
    )
    yield (
        tensor > 1 and training.master.value == "bfloat16_stochastic",
        f"{cut} needs norms that stay equal on the ranks that share them, and training.master=bfloat16_stochastic "
        "rounds each at random: use training.master=float32",
    )


def _precision(config: Config) -> Iterator[Rule]:
    generation = config.generation
    dtype, head = generation.dtype, generation.head_dtype
    yield (
        dtype not in ("auto", "float32", "bfloat16", "int8", "fp8"),
        f'generation.dtype="{dtype}": choose auto, float32, bfloat16, int8 or fp8',
    )
    yield head not in ("auto", "float32"), f'generation.head_dtype="{head}": choose auto or float32'
    yield (
        dtype in ("int8", "fp8") and config.placement.kind.value == "hybrid",
        f"generation.dtype={dtype} needs weights of its own, and placement=hybrid shares them with training: "
        "use placement=split or generation.dtype=auto",
    )


def _weights(config: Config) -> Iterator[Rule]:
    weights, transport = config.weights, config.weights.transport.value
    yield _at_least("weights.bucket_bytes", weights.bucket_bytes, 4096)
    yield _at_least("weights.verify_every", weights.verify_every, 0)
    yield _at_least("weights.probe_every", weights.probe_every, 0)
    yield _above("weights.probe_bound", weights.probe_bound, 0)
    yield (
        transport != "auto" and config.placement.kind.value == "hybrid",
        f"weights.transport={transport} carries weights between processes, and placement=hybrid has one copy of them: "
        "use auto, or placement=split",
    )
    yield (
        transport == "ipc" and config.device == "cpu",
        "weights.transport=ipc shares GPU memory, and device=cpu: use shared_memory",
    )
    yield (
        transport == "nccl" and config.runtime.kind.value == "inline",
        "weights.transport=nccl needs a process for each rank: use runtime=ray, or transport=auto",
    )


def _others(config: Config) -> Iterator[Rule]:
    generation, longest = config.generation, config.data.max_prompt_tokens + config.rollout.max_new_tokens
    yield (
        generation.kv_tokens is not None and generation.kv_tokens < longest,
        f"generation.kv_tokens={generation.kv_tokens} does not hold one sequence of data.max_prompt_tokens + "
        f"rollout.max_new_tokens = {longest} tokens: raise it, or null for what generation.max_running needs",
    )
    yield (
        not 0 < generation.memory_fraction <= 1,
        f"generation.memory_fraction={generation.memory_fraction:g} must lie in (0, 1]: a share of the GPU's memory",
    )
    yield _at_least("generation.max_running", generation.max_running, 1)
    yield _at_least("generation.block_size", generation.block_size, 1)
    yield _at_least("generation.prefill_tokens", generation.prefill_tokens, 1)
    yield (
        not 0 <= config.reward.max_error_share <= 1,
        (f"reward.max_error_share={config.reward.max_error_share:g} must lie between 0 and 1"),
    )
    yield _at_least("evaluation.every", config.evaluation.every, 0)
    yield _at_least("evaluation.prompts", config.evaluation.prompts, 1)
    yield _at_least("evaluation.temperature", config.evaluation.temperature, 0)
    yield _at_least("checkpoint.every", config.checkpoint.every, 0)
    yield _at_least("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    yield _at_least("checkpoint.keep_best", config.checkpoint.keep_best, 0)
    yield (
        config.checkpoint.keep_best > 0 and config.evaluation.every == 0,
        f"checkpoint.keep_best={config.checkpoint.keep_best} needs evaluations to choose by: set evaluation.every",
    )
    yield _at_least("data.max_prompt_tokens", config.data.max_prompt_tokens, 1)
    curriculum = config.data.curriculum
    yield (
        ".py:" not in curriculum and curriculum not in CURRICULA,
        f'data.curriculum="{curriculum}" is unknown{nearest(curriculum, CURRICULA)}',
    )
    yield _at_least("data.curriculum_visits", config.data.curriculum_visits, 1)
    yield (
        config.data.task is None and config.data.train is None,
        "no dataset: set data.task to the recipe's task.py or data.train to a JSONL file",
    )

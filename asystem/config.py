"""The configuration schema: every key of every recipe, its unit, its default, and what is refused.

Hydra composes `configs/` groups and a recipe into these dataclasses once (`asystem.cli`); below the command line nobody
sees Hydra. `Config.check` looks at the whole before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from asystem.checks import check

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class RuntimeKind(Enum):
    inline = "inline"  # all in this process: pdb works
    ray = "ray"  # one Ray actor a rank


class PlacementKind(Enum):
    split = "split"  # generation and training own different devices
    hybrid = "hybrid"  # each worker holds both over one copy of the weights
    auto = "auto"  # what `asystem plan` would choose, with its ranks and sizes


class Sleep(Enum):
    """Whether a hybrid worker's phases take turns in the GPU's memory."""

    auto = "auto"  # where both do not fit together
    never = "never"
    always = "always"


class BudgetCounts(Enum):
    generated = "generated"  # every new token (prose of the Ring-1T report; Ring-2.6)
    completed = "completed"  # whole lengths when rollouts finish (its Algorithm 1)


class KVOnUpdate(Enum):
    """What becomes of the KV of unfinished rollouts when the weights change."""

    keep = "keep"
    recompute = "recompute"


class Anchor(Enum):
    proximal = "proximal"  # the weights before the batch's first update (decoupled PPO: k corrects the rest)
    behavior = "behavior"  # the weights that sampled each token, as inference saw them (plain PPO)


class KLEstimator(Enum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class Normalizer(Enum):
    response = "response"  # mean over each response's tokens, then over responses (GRPO, IcePop: 1/|y|)
    token = "token"  # mean over all tokens of the global batch
    constant = "constant"  # sum over each response divided by rollout.max_new_tokens, mean over responses (Dr. GRPO)
    budget = "budget"  # sum over tokens divided by the constant token budget (C3PO: 1/Φ)


class Command(Enum):
    train = "train"  # reinforcement learning
    sft = "sft"  # supervised fine-tuning
    dpo = "dpo"  # direct preference optimization


class TooLong(Enum):
    drop = "drop"  # leave the row out, and count it
    cut = "cut"  # keep its first tokens


class Turns(Enum):
    all = "all"  # every assistant turn of a conversation
    last = "last"


class DpoLoss(Enum):
    sigmoid = "sigmoid"  # Rafailov et al. 2023, eq. 7
    ipo = "ipo"  # Azar et al. 2023, eq. 17, of log-probabilities averaged over tokens


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Recompute(Enum):
    none = "none"  # keep every activation
    selective = "selective"  # keep what attention reads and writes; recompute what lies between
    full = "full"  # keep each block's input alone


class Compile(Enum):
    auto = "auto"  # on CUDA
    always = "always"
    never = "never"


class Optimizer(Enum):
    adamw = "adamw"
    adamw8bit = "adamw8bit"  # moments of matrices in 8 bits


class Master(Enum):
    float32 = "float32"
    bfloat16_stochastic = "bfloat16_stochastic"  # no copy beside the weights; they, moments, sums round at random


class Transport(Enum):
    """How weights travel in split placement; docs/weights.md has the table."""

    auto = "auto"  # by where the ranks are
    shared_memory = "shared_memory"  # host memory that all processes of a host map
    store = "store"  # Ray's object store, or within one process its own memory
    ipc = "ipc"  # GPU memory that processes of a host map
    nccl = "nccl"  # sent in buckets by a process group of both sides; between CPU ranks by gloo


class WandbMode(Enum):
    auto = "auto"  # online when a key is set, else offline
    offline = "offline"
    online = "online"
    disabled = "disabled"  # wandb is not imported


@dataclass
class ExpertsConfig:
    """The mixture of experts of a model with random weights; read by the families qwen3_moe, olmoe, bailing_moe_v2."""

    count: int = 0  # in each layer; 0 = a dense model
    per_token: int = 2
    intermediate_size: int = 128  # of one expert
    first_dense_layers: int = 0  # layers that have an MLP instead, the first ones
    shared: int = 0  # experts that compute every token; this and the rest: bailing_moe_v2 alone
    groups: int = 1  # equal groups that the experts lie in
    top_groups: int = 1  # of which a token may choose from so many
    scaling: float = 1.0  # factor of the chosen experts' weights


@dataclass
class ModelConfig:
    path: str | None = None  # Hugging Face folder; null = random weights of the shape below
    family: str = "qwen3"  # llama | qwen2 | qwen3 | qwen3_moe | olmoe | bailing_moe_v2
    vocab_size: int = 259
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10_000.0
    max_positions: int = 4096
    tie_embeddings: bool = True
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    tokenizer: str = "bytes"  # "bytes", or a folder with tokenizer.json; a model folder's own wins when null-pathed
    chat_template: str | None = None  # Jinja file in place of the tokenizer's own, as with {% generation %} markers


@dataclass
class DataConfig:
    task: str | None = None  # Python file with train(), evaluation(), reward(), demonstrations(); see README
    train: str | None = None  # JSONL or Parquet file, or a folder of them, instead of the task's train()
    evaluation: str | None = None  # the same with held-out rows
    demonstrations: str | None = None  # the same with {"prompt", "response"} for the supervised warm-up
    name: str = "task"  # names the metric eval/<name>/accuracy
    max_prompt_tokens: int = 1024
    shuffle: bool = True
    curriculum: str = "none"  # none | unsolved | pass_rate | file.py:function: which prompts are asked again
    curriculum_visits: int = 2  # groups of a prompt, the last ones, that this looks at; it is asked until then


@dataclass
class AlgorithmConfig:
    """`advantage`, `surrogate` and `correction` are names (docs/algorithms.md) or a recipe's own `file.py:function`."""

    group_size: int = 8  # samples per prompt (GRPO's G)
    advantage: str = "grpo"  # grpo | rloo | reinforce | reinforce++ | reinforce++baseline | gae
    normalize_std: bool = True  # grpo: divide group advantages by their standard deviation
    gamma: float = 1.0  # gae: discount a token
    gae_lambda: float = 1.0  # gae: 1 = what came in the end, 0 = the next token's value
    value_coefficient: float = 0.1  # gae: of the value head's loss
    value_clip: float | None = 0.2  # gae: by which a value may move from the old one a batch; null = no clip
    overlong_buffer: int = 0  # tokens before max_new_tokens in which the reward falls by up to 1 (DAPO); 0 = none
    drop_equal_groups: bool = False  # leave groups of equal rewards out of batch and denominators (DAPO)
    group_filter: str | None = None  # file.py:function(rewards, lengths) -> whether a group trains; null = each does
    # groups with signal that a batch waits for, window after window (DAPO's dynamic sampling); 0 = one window's
    dynamic_sampling: int = 0
    dynamic_windows: int = 4  # windows that a batch may take for them, of up to rollout.capacity new rollouts each
    surrogate: str = "ppo"  # ppo | gspo | cispo | reinforce
    anchor: Anchor = Anchor.proximal  # what the surrogate's ratio is taken against
    clip_low: float = 0.2  # ε of the clipped surrogate below 1
    clip_high: float = 0.2  # and above
    dual_clip: float | None = None  # bound of the ratio where the advantage is negative, above 1; null = none
    correction: str = "icepop"  # none | tis | icepop | kpop | mis | geometric
    icepop_alpha: float = 0.5  # Ring-1T: keep tokens with α <= p_train/p_infer <= β
    icepop_beta: float = 5.0
    tis_cap: float = 2.0
    kpop_phi: float = 0.1  # nats
    mis_cap: float = 2.0  # of a response's product of ratios
    geometric_band: tuple[float, float] = (0.99, 1.01)  # of a response's geometric mean ratio
    normalizer: Normalizer = Normalizer.response
    routing_replay: bool = False  # train with the experts that generation chose; needs generation.return_routing
    kl_coefficient: float = 0.0  # of the KL to the weights that RL started from; 0 = no reference is held
    kl_estimator: KLEstimator = KLEstimator.k3
    entropy_coefficient: float = 0.0  # of the entropy bonus


@dataclass
class LengthsConfig:
    """For studies of speed: response lengths drawn from a log-normal distribution, whatever the model says."""

    median: float | None = None  # tokens, cut at max_new_tokens; end tokens are then ignored; null = they end responses
    sigma: float = 1.0  # of the logarithm


@dataclass
class RolloutConfig:
    capacity: int = 64  # Ω: rollouts in flight over the whole generation group
    token_budget: int | None = None  # Φ: new tokens a window generates before it hands over; null = wait for all
    retention: int = 1  # σ: windows that an unfinished rollout may outlive
    max_staleness: int = 0  # η: weight versions by which generation may run ahead of training
    budget_counts: BudgetCounts = BudgetCounts.generated
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    slice_steps: int = 16  # decode steps between two reports to the controller
    lengths: LengthsConfig = field(default_factory=LengthsConfig)


@dataclass
class GenerationConfig:
    ranks: int = 1  # of all replicas together
    tensor_parallel: int = 1  # ranks of one replica, each with a part of every layer
    max_running: int = 256  # sequences decoded together on one replica
    block_size: int = 16  # tokens in a KV block
    # KV pool of one replica, in tokens; null = what max_running at full length needs, as far as the GPU's memory goes
    kv_tokens: int | None = None
    memory_fraction: float = 0.9  # share of the GPU's memory that may be in use once the pool is there
    kv_on_update: KVOnUpdate = KVOnUpdate.keep  # recompute = prefill unfinished rollouts again under new weights
    prefill_tokens: int = 8192  # computed in one prefill batch; longer prompts are cut, and decoding goes on between
    dtype: str = "auto"  # float32 | bfloat16; auto = bfloat16 on CUDA, float32 on CPU; 8-bit weights: int8 | fp8
    head_dtype: str = "auto"  # logits are rounded as all results are; float32 = not rounded
    return_routing: bool = False  # rollouts bring along which experts computed each token (Trajectory.routing)
    graphs: bool = True  # decode steps as CUDA graphs, or on a CPU as compiled code; false = plain PyTorch


@dataclass
class WarmupConfig:
    """Supervised steps on demonstrations before RL; 0 = none."""

    steps: int = 0
    batch_size: int = 64
    lr: float = 1e-3


@dataclass
class LoraConfig:
    """Low-rank adapters beside frozen matrices; rank 0 = all parameters train."""

    rank: int = 0
    alpha: float = 32.0  # the adapters' part is scaled by alpha / rank
    dropout: float = 0.0  # of the adapters' input
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))  # Hugging Face names of linear layers
    base: str = "auto"  # how adapted matrices are kept: auto = in training.dtype | int8 | nf4
    adapter: str | None = None  # PEFT folder to start from; null = adapters that change nothing yet


@dataclass
class TrainingConfig:
    ranks: int = 1  # FSDP2 over them when more than 1
    # of several ranks, in a step of several micro-batches: 3 = a block's weights are gathered whenever it computes, 2 =
    # once a step, 1 = and gradients are added up over ranks once a step; auto = the lowest that the GPUs' memory allows
    zero: str = "auto"
    tensor_parallel: int = 1  # ranks that share every layer, and rows; each has a part of its heads and its MLP's width
    expert_parallel: int = 1  # ranks that the experts are spread over; each has rows of its own
    micro_batch_tokens: int = 8192  # packed tokens of one forward and backward
    minibatches: int = 1  # optimizer steps per batch
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    clip_norm: float = 1.0
    schedule: Schedule = Schedule.constant
    lr_warmup_steps: int = 0
    dtype: str = "auto"  # of the forward pass; reductions over ranks are float32
    head_dtype: str = "auto"  # of logits: auto = as dtype | float32, as generation.head_dtype
    max_bad_steps: int = 5  # steps in a row with a NaN or infinite gradient before the run stops
    optimizer: Optimizer = Optimizer.adamw
    master: Master = Master.float32  # how weights are kept between steps
    offload_optimizer: bool = False  # on CUDA: float32 masters and moments in the host's memory; one rank
    keep_logits: bool = False  # of a micro-batch until its backward pass, which else computes them again
    # on CUDA, beside offload_optimizer and with recompute: blocks' weights in the host's memory, streamed; one rank
    offload_parameters: bool = False
    recompute: Recompute = Recompute.none  # which activations the backward pass computes anew
    compile: Compile = Compile.auto  # torch.compile of the blocks, attention left out
    balance_coefficient: float = 0.0  # of the loss that pulls routers towards equal load of experts; 0 = none
    router_z_coefficient: float = 0.0  # of the loss that keeps routers' logits small; 0 = none
    expert_bias_rate: float = 0.0  # Ling 2.0: each step moves experts' biases by so much to equal load; 0 = frozen
    lora: LoraConfig = field(default_factory=LoraConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)


@dataclass
class FinetuneConfig:
    """What `asystem sft` and `asystem dpo` read beside data, model, training, evaluation and checkpoint."""

    epochs: float | None = None  # passes over the training rows, which then set `steps`; null = `steps` as given
    batch_size: int = 32  # rows of one optimizer step; a row of DPO is a pair
    max_tokens: int = 2048  # of one conversation
    too_long: TooLong = TooLong.drop
    turns: Turns = Turns.all
    held_out: int = 0  # training rows to put aside, drawn by seed, where there is no data.evaluation
    export: bool = True  # at the end, a Hugging Face folder: model/ in the run's folder


@dataclass
class DpoConfig:
    """The loss of `asystem dpo`."""

    beta: float = 0.1  # how much a log-ratio to the reference counts; IPO's τ
    loss: DpoLoss = DpoLoss.sigmoid
    label_smoothing: float = 0.0  # probability that a preference is noted the wrong way round; sigmoid only


@dataclass
class RewardConfig:
    ranks: int = 1
    max_error_share: float = 0.2  # of the rollouts of one step; above it the run stops


@dataclass
class EvaluationConfig:
    every: int = 0  # optimizer steps between evaluations; 0 = only before and after RL
    prompts: int = 128  # held-out prompts (sft, dpo: rows) used (the first ones)
    temperature: float = 0.0


@dataclass
class CheckpointConfig:
    every: int = 0  # optimizer steps; 0 = only at the end
    at_end: bool = True  # of the last step too; false, and every: 0 = none at all, for studies of speed
    keep_last: int = 2
    keep_best: int = 0  # beside the last ones, those that scored best; only steps that were evaluated have a score


@dataclass
class WeightsConfig:
    transport: Transport = Transport.auto  # auto | shared_memory | store | ipc | nccl
    bucket_bytes: int = 134_217_728  # nccl: what a rank sends or receives at once; two such buckets are held
    verify_every: int = 1  # publications of which one is checked, each parameter by a checksum; 0 = never
    probe_every: int = 10  # and of which one is followed by a few samples that training scores too; 0 = never
    probe_bound: float = 0.2  # nats a token by which the two may differ in the mean


@dataclass
class RuntimeConfig:
    kind: RuntimeKind = RuntimeKind.ray
    deadline_seconds: float = 600.0  # every wait on a worker ends by then
    start_seconds: float = 120.0  # and so does starting a group
    threads_per_rank: int = 1  # torch threads of one rank on CPU
    object_store_bytes: int = 268_435_456


@dataclass
class PlacementConfig:
    kind: PlacementKind = PlacementKind.split
    spread: bool = False  # put the groups on different nodes where there are several
    sleep: Sleep = Sleep.auto  # hybrid: a phase's memory lies in the host's while the other runs (docs/memory.md)


@dataclass
class TrackingConfig:
    wandb: WandbMode = WandbMode.auto
    project: str = "asystem"
    console: bool = True
    rollouts: bool = True  # write each trained rollout to rollouts/
    timeline: bool = True
    report: bool = True


@dataclass
class Config:
    command: Command = Command.train  # which program runs; `asystem sft` sets it
    recipe: str = "???"
    recipe_dir: str = "."  # folder of the recipe: relative paths in `data` start here
    run_dir: str | None = None  # null = runs/<recipe>/<date-time>
    seed: int = 0
    steps: int = 10  # optimizer steps
    device: str = "auto"  # cpu | cuda; auto = cuda when there is one
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> None:
        """Refuses what cannot work, before anything starts.

        Raises:
            ConfigError: with the key, its value and the remedy.
        """
        check(self)

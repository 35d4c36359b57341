"""The settings of the course of a run: optimiser, length, checkpoints, log."""

from __future__ import annotations

from dataclasses import dataclass

from jaxalign.bounds import setting


@dataclass
class OptimConfig:
    """AdamW on the trained parameters; values are the paper's."""

    learning_rate: float = setting(5e-4, "the peak", above=0)
    beta1: float = setting(0.9, "decay of the mean of gradients", lowest=0, below=1)
    beta2: float = setting(0.999, "decay of the mean of their squares", lowest=0, below=1)
    eps: float = setting(1e-8, "added to the divisor", above=0)
    weight_decay: float = setting(0.0, "decoupled, of every trained weight", lowest=0)
    clip_norm: float = setting(1.0, "largest norm of all gradients together; 0: no clip", lowest=0)
    schedule: str = setting(
        "inverse_sqrt",
        "how the learning rate changes; the paper's is `inverse_sqrt`",
        choices=("inverse_sqrt", "cosine", "linear", "constant"),
    )
    warmup_steps: int = setting(0, "updates", lowest=0)
    warmup_ratio: float = setting(
        0.03, "share of all updates, where `optim.warmup_steps` is 0", lowest=0, highest=1
    )
    average: str = setting(
        "tokens",
        "`tokens`: sum/count over the update; `microbatch`: mean of means (the paper's code)",
        choices=("tokens", "microbatch"),
    )
    combine: str = setting(
        "weighted",
        "`weighted`: the sum of the phases' gradients; `pcgrad` removes from each phase's gradient "
        "the component that conflicts with the other's, `task_first` only from that of alignment",
        choices=("weighted", "pcgrad", "task_first"),
    )
    missing: str = setting(
        "zero",
        "parameters without gradient: a `zero` gradient, or `skip` (adapters only; torch without "
        "ZeRO)",
        choices=("zero", "skip"),
    )


@dataclass
class TrainConfig:
    """How long, how often, when to stop."""

    steps: int = setting(0, "optimiser updates; 0: from `train.epochs`", lowest=0)
    epochs: float = setting(
        5.0, "passes over the task rows (over the pairs where the task is off)", above=0
    )
    eval_every: int = setting(200, "updates between validations; 0: only at the end", lowest=0)
    eval_batches: int = setting(
        0,
        "batches of each validation, with every language in proportion; 0: all validation rows",
        lowest=0,
    )
    metric: str = setting(
        "eval/loss", "any logged eval metric; decides best checkpoint and early stop"
    )
    goal: str = setting(
        "auto",
        "`auto`: losses should be small, scores large; your own metric needs `min` or `max`",
        choices=("auto", "min", "max"),
    )
    patience: int = setting(5, "validations without improvement; 0: never stop early", lowest=0)
    max_skipped: int = setting(
        5, "updates in a row that are not finite, after which the run ends as diverged", lowest=1
    )
    log_every: int = setting(10, "updates", lowest=1)
    cosine_every: int = setting(
        0,
        "updates between measurements of cos(task, align gradients), and of a rule's gradient "
        "with the plain one; 0: never. Updates that serve both phases log the first anyway",
        lowest=0,
    )
    warm_up: str = setting(
        "lazy",
        "a program is compiled when it is first needed; `ahead`: all before the first update",
        choices=("lazy", "ahead"),
    )


@dataclass
class CheckpointConfig:
    """What survives."""

    every: int = setting(50, "updates between two checkpoints", lowest=1)
    minutes: float = setting(
        10.0, "save one also after this many minutes without one; 0: only by `every`", lowest=0.0
    )
    keep: int = setting(2, "how many of the newest are kept; the best is kept as well", lowest=1)
    resume: str = setting(
        "auto", "`never`: refuse an output that holds a run", choices=("auto", "never")
    )


@dataclass
class LogConfig:
    """JSONL is always written."""

    progress: str = setting(
        "auto", "a bar on a terminal, elsewhere a line a minute", choices=("auto", "none")
    )
    tensorboard: bool = setting(False, "needs `jaxalign[log]`")
    wandb: str | None = setting(None, "the project's name; needs `jaxalign[log]`")
    profile: list[int] = setting(
        [],
        "`[10,3]`: a trace of the updates 10 to 12; as `--profile 10:3`",
        whole=True,
        lowest=1,
        see="troubleshooting.md#a-trace",
    )
    time_every: int = setting(
        0,
        "updates between those that time their two phases apart; 0: never",
        lowest=0,
        see="troubleshooting.md#where-the-time-goes",
    )

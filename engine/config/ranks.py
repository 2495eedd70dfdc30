"""Settings of runs on many processes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.setting import TRAINING, Topic, at_least, setting


@dataclass(frozen=True)
class RankSettings(Topic):
    title: ClassVar[str] = "Processes (docs/scale.md)"
    commands: ClassVar[tuple[str, ...]] = TRAINING

    nproc: int = setting(
        1,
        "Processes to start on this machine, one for each GPU. Under torchrun or Slurm leave it: they start them.",
        rule=at_least(1),
        most=4096,  # on one machine
        may_differ=True,
    )
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp",
        "ddp: every process holds the whole model. fsdp: weights, gradients and optimizer states are spread over all.",
        may_differ=True,
    )
    fsdp_cpu_offload: bool = setting(
        False,
        "fsdp: shards and the optimizer's step stay in the CPU's memory.",
        only_with=("parallel", "fsdp"),
        may_differ=True,
    )
    ddp_timeout: int = setting(
        1800,
        "Seconds that a process waits for the others before it gives up.",
        rule=at_least(1),
        most=10**7,  # four months
        may_differ=True,
    )
    max_restarts: int = setting(
        0,
        "How often a run whose processes died starts again by itself, from its last checkpoint.",
        rule=at_least(0),
        may_differ=True,
    )

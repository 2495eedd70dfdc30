"""`prefuse doctor`: what stands between this machine and a run, before the run.

prefuse doctor
prefuse doctor --config runs/dpo/config.yaml
prefuse doctor --command online --config grpo.yaml

Versions, devices, which kernels run and why, a self-test of the head against its float64 definition, and with a
config what the command needs of memory, disk and time. Exit code 0, or 2 where a check says "wrong".
"""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prefuse.engine.config.setting import EVERY, TRAINING
from prefuse.engine.config.tools import ToolParser
from prefuse.engine.report.log import duration, print_table

if TYPE_CHECKING:
    from prefuse.engine.config.settings import Config
    from prefuse.engine.run.needs import RunNeeds

GIB = 2**30
OPTIONAL = ("triton", "trl", "liger-kernel", "flash-attn", "bitsandbytes", "math-verify")
TESTED_BELOW = {"torch": "2.16", "transformers": "5.25", "triton": "3.10"}  # the newest that the tests ran with
SHAPE = (64, 48, 1000)  # N tokens, D, V of the self-test
TRIAL_ERROR = 0.15  # of times by a trial, on a machine that stays as busy as it was
HEAP = 1.25  # of the memory that tensors need: allocators leave gaps between them
RATES = (0.9, 0.3)  # parts of the device's rate that runs reach, where there was no trial


@dataclasses.dataclass(frozen=True)
class Check:
    name: str
    state: str  # "ok", "note" or "wrong"
    said: str


def parser() -> ToolParser:
    parser = ToolParser(prog="prefuse doctor", description=__doc__)
    parser.add_argument("--config", type=Path, default=None, help="settings of a run: what it needs is estimated")
    parser.add_argument("--command", choices=EVERY, help="the command that the config is for (a run's own, else train)")
    return parser


def doctor(argv: Sequence[str]) -> int:
    given = parser().parse_args(argv)
    checks = [*versions(), *devices(), *kernels(), self_test(torch.float32)]
    if torch.cuda.is_available():
        checks.append(self_test(torch.bfloat16))
    if given.config is not None:
        checks += needs_of_run(given.config, given.command)
    print_table(
        "prefuse doctor", ["", "state", ""], [[check.name, check.state, check.said] for check in checks], lines=False
    )
    return 2 if any(check.state == "wrong" for check in checks) else 0


# ---------------------------------------------------------------------------------------------------------
# What is installed


def versions() -> Iterator[Check]:
    from packaging.requirements import Requirement
    from packaging.version import Version

    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    required = [Requirement(line) for line in importlib.metadata.requires("prefuse") or []]
    wanted = {r.name: r.specifier for r in required if r.marker is None or "train" in str(r.marker)}
    for name in [*wanted, *(name for name in OPTIONAL if name not in wanted)]:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in wanted:
                yield Check(
                    name, "wrong", f"is not installed; expected {name}{wanted[name]}: pip install 'prefuse[train]'"
                )
            continue
        if name in wanted and not wanted[name].contains(version, prereleases=True):
            yield Check(name, "wrong", f"{version}; expected {name}{wanted[name]}")
        elif name in TESTED_BELOW and Version(version) >= Version(TESTED_BELOW[name]):
            yield Check(name, "note", f"{version}, newer than the tests have run with (below {TESTED_BELOW[name]})")
        else:
            yield Check(name, "ok", version)


# ---------------------------------------------------------------------------------------------------------
# What is there, and what runs on it


def devices() -> Iterator[Check]:
    cpus = len(os.sched_getaffinity(0))
    yield Check("CPU", "ok", f"{cpus} cores, {torch.get_num_threads()} threads, {free_memory() / GIB:.1f} GiB free")
    if not torch.cuda.is_available():
        yield Check("GPU", "note", f"none: torch {torch.__version__} sees no CUDA or ROCm device")
    for index in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_properties(index).name
        yield Check(f"GPU {index}", "ok", f"{name}, {free / GIB:.1f} of {whole / GIB:.1f} GiB free")


def free_memory() -> int:
    """Bytes: what the kernel calls available, or what the control group leaves."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def kernels() -> Iterator[Check]:
    from prefuse.kernels.checks import has_triton, resolve
    from prefuse.kernels.tiles.table import VARIABLE

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    impl = resolve("auto", torch.empty(0, device=device))
    why = {
        "triton": "the device is a GPU and Triton is installed",
        "torch": "Triton kernels need a GPU" if has_triton() else "the package triton is not installed",
    }
    state = "note" if impl == "torch" and device.type == "cuda" else "ok"
    yield Check("kernels", state, f'impl="auto" is "{impl}" on {device}: {why[impl]}')
    own = os.environ.get(VARIABLE)
    if own and not Path(own).is_file():
        yield Check("tiles", "wrong", f"{VARIABLE} names {own}, which is no file")
    else:
        yield Check("tiles", "ok", f"the shipped table{f', and {own} before it' if own else ''}")


def self_test(dtype: torch.dtype) -> Check:
    """Log-probabilities and gradients of the head against impl="reference", which computes in float64."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = f"self-test, {str(dtype).removeprefix('torch.')}"
    logps, gradient = _head_numbers("auto", dtype, device)
    exact, exact_gradient = _head_numbers("reference", dtype, device)
    nats = (logps.double() - exact.double()).abs().max().item()
    relative = ((gradient.double() - exact_gradient.double()).norm() / exact_gradient.double().norm()).item()
    bound = 8 * torch.finfo(dtype).eps
    said = f"log-probabilities within {nats:.1e} nats, gradients within {relative:.1e} of float64"
    if not (nats < 1e-4 and relative < bound):
        return Check(name, "wrong", f"{said}; expected 1e-4 and {bound:.1e}: please report it with this table")
    return Check(name, "ok", said)


def _head_numbers(impl: str, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    import prefuse

    generator = torch.Generator().manual_seed(0)
    n, d, v = SHAPE
    hidden = torch.randn(n, d, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).mul_(d**-0.5).to(device, dtype)
    targets = torch.randint(v, (n,), generator=generator).to(device)
    logps = prefuse.linear_logprobs(hidden, weight, targets, impl=impl)
    logps.sum().backward()
    return logps.detach(), hidden.grad


# ---------------------------------------------------------------------------------------------------------
# What a run needs


def needs_of_run(path: Path, command: str | None = None) -> Iterator[Check]:
    """`command`: None for the one of the run that wrote the file, and `train` for a file of a user."""
    from prefuse.engine.config.flags import given_settings
    from prefuse.engine.config.settings import Config, validate
    from prefuse.engine.config.yaml_file import command_of_run
    from prefuse.engine.model.load import device_of
    from prefuse.engine.run.needs import estimate_needs
    from prefuse.engine.score.scorers import model_of

    if command is None:
        command = (command_of_run(path) if path.is_file() else None) or "train"
    config = validate(Config(**given_settings(command, ["--config", str(path)])[0]), command)
    device = device_of(config)
    folders = [model_of(spec) for spec in [*(config.scorer or ()), *(config.gold_scorer or ())]]
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    needs = estimate_needs(config, command, [folder for folder in folders if folder is not None], room // 2)
    if needs.model is not None:
        weights, trained = needs.model.weights / 1e6, needs.model.trained / 1e6
        yield Check("model", "ok", f"{weights:,.1f} M weights, {trained:,.1f} M of them trained")
    yield _memory_of_run(needs, device)
    if command in TRAINING:
        yield _disk_of_run(config, needs)
    yield _time_of_run(needs, device)


def _memory_of_run(needs: "RunNeeds", device: torch.device) -> Check:
    needed = needs.memory + (needs.resident if device.type == "cpu" else 0)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    parts = [f"{needs.activations / GIB:.2f} of it activations"]
    parts += [f"{needs.cache / GIB:.2f} keys and values of answers as they are sampled"] if needs.cache else []
    parts += [f"{needs.standing / GIB:.2f} other models"] if needs.standing else []
    state = "ok" if HEAP * needed < free else "wrong"
    hint = ""
    if state == "wrong":
        hint = ": a smaller per_device_eval_batch_size needs less"
        if needs.model is not None and needs.model.trained:
            hint = ": --use_peft true, or --parallel fsdp over several devices, needs less"
    said = (
        f"{needed / GIB:.2f} to {HEAP * needed / GIB:.2f} GiB, {', '.join(parts)}; {free / GIB:.2f} GiB are free{hint}"
    )
    return Check("memory", state, said)


def _disk_of_run(config: "Config", needs: "RunNeeds") -> Check:
    count = 1 + (config.save_total_limit or 1) + 1 if config.save_steps else 0
    disk = needs.model.trained * (needs.width + count * (needs.width + 8))
    home = next(
        p for p in (Path(config.output_dir).absolute(), *Path(config.output_dir).absolute().parents) if p.exists()
    )
    room = shutil.disk_usage(home).free
    state = "ok" if disk < room else "wrong"
    said = f"{disk / GIB:.2f} GiB for the model and {count} checkpoints, {room / GIB:.2f} GiB are free"
    return Check("disk", state, said)


def _time_of_run(needs: "RunNeeds", device: torch.device) -> Check:
    """By a trial of a few layers where there was one, else its operations at a part of what the device can do."""
    from prefuse.engine.model.flops import PEAK_BANDWIDTH, PEAK_FLOPS, measured_bandwidth, measured_flops

    if needs.seconds is not None:
        low, high = (1 - TRIAL_ERROR) * needs.seconds, (1 + TRIAL_ERROR) * needs.seconds * needs.slower
        about = f"about {duration(needs.seconds)} ({duration(low)} to {duration(high)}), by a trial of a few layers"
        return Check("time", "ok", "; ".join([f"{about}: {needs.tokens}", *needs.notes]))
    if not needs.operations:
        return Check("time", "note", "; ".join([needs.tokens, *needs.notes]).removeprefix("; "))
    rate, bandwidth = (measured_flops(torch.float32), measured_bandwidth()) if device.type == "cpu" else (None, None)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        rate, bandwidth = (
            next((x for part, x in peaks.items() if part in name), None) for peaks in (PEAK_FLOPS, PEAK_BANDWIDTH)
        )
    if rate is None:
        return Check("time", "note", f"{needs.tokens}; the speed of {device} is not known")
    # Sampling reads all weights for each token; all else is matrix products.
    low, high = (duration(needs.operations / (part * rate) + needs.moved / (part * bandwidth)) for part in RATES)
    about = f"at most {low} to {high}" if needs.at_most else f"{low} to {high}"
    said = f"{about}: {needs.tokens}, {RATES[1]:.0%} to {RATES[0]:.0%} of {rate:.2g} FLOP/s"
    said += f" and of {bandwidth:.2g} bytes/s" if needs.moved else ""
    return Check("time", "ok", "; ".join([said, *needs.notes]))

"""`prefuse doctor`: what stands between this machine and a run, before the run.

prefuse doctor
prefuse doctor --config runs/dpo/config.yaml

Versions, devices, which kernels run and why, a self-test of the head against its float64 definition, and with a
config what the run needs of memory, disk and time. Exit code 0, or 2 where a check says "wrong".
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

from prefuse.engine.config.tools import ToolParser
from prefuse.engine.report.log import duration, print_table

if TYPE_CHECKING:
    from prefuse.engine.config.settings import Config

GIB = 2**30
OPTIONAL = ("triton", "trl", "liger-kernel", "flash-attn", "bitsandbytes", "math-verify")
TESTED_BELOW = {"torch": "2.16", "transformers": "5.25", "triton": "3.10"}  # the newest that the tests ran with
SHAPE = (64, 48, 1000)  # N tokens, D, V of the self-test


@dataclasses.dataclass(frozen=True)
class Check:
    name: str
    state: str  # "ok", "note" or "wrong"
    said: str


def parser() -> ToolParser:
    parser = ToolParser(prog="prefuse doctor", description=__doc__)
    parser.add_argument("--config", type=Path, default=None, help="settings of a run: what it needs is estimated")
    parser.add_argument("--command", default="train", choices=("sft", "train"), help="the command the config is for")
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


@dataclasses.dataclass(frozen=True)
class RunNeeds:
    """What a run computes with: numbers of weights and tokens, and bytes of its activations."""

    weights: int
    trained: int
    largest: int  # of the single weights
    tokens: int  # of an epoch; a pair's prompt counts once
    epochs: float
    activations: int


def needs_of_run(path: Path, command: str) -> Iterator[Check]:
    from prefuse.engine.config.flags import given_settings
    from prefuse.engine.config.settings import Config, validate
    from prefuse.engine.model.load import device_of

    config = validate(Config(**given_settings(command, ["--config", str(path)])[0]), command)
    device = device_of(config)
    needs = measure_needs(config, command)
    weights, trained = needs.weights, needs.trained
    yield Check("model", "ok", f"{weights / 1e6:,.1f} M weights, {trained / 1e6:,.1f} M of them trained")

    width = 2 if config.dtype == "bfloat16" else 4
    reference = 0 if command == "sft" or config.use_peft else weights * width
    # Trained weights have a gradient and two states of Adam; the reference is gone after it was asked.
    memory = weights * width + trained * 3 * 4 + needs.largest * width + needs.activations
    needed = max(memory, weights * width + reference)
    if device.type == "cpu":  # Python and the libraries, as they are loaded here
        needed += resident_memory()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    state = "ok" if needed < 0.9 * free else "wrong"
    hint = "" if state == "ok" else ": --use_peft true, or --parallel fsdp over several devices, needs less"
    parts = f"{needs.activations / GIB:.2f} of it activations"
    yield Check("memory", state, f"about {needed / GIB:.2f} GiB, {parts}; {free / GIB:.2f} GiB are free{hint}")
    yield _disk_of_run(config, trained, width)
    yield _time_of_run(needs, command, device)


def _disk_of_run(config: "Config", trained: int, width: int) -> Check:
    count = 1 + (config.save_total_limit or 1) + 1 if config.save_steps else 0
    disk = trained * width + count * trained * (width + 8)
    home = next(
        p for p in (Path(config.output_dir).absolute(), *Path(config.output_dir).absolute().parents) if p.exists()
    )
    room = shutil.disk_usage(home).free
    state = "ok" if disk < room else "wrong"
    said = f"{disk / GIB:.2f} GiB for the model and {count} checkpoints, {room / GIB:.2f} GiB are free"
    return Check("disk", state, said)


def resident_memory() -> int:
    """Bytes of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def measure_needs(config: "Config", command: str) -> RunNeeds:
    """From the model's config and the rows, which are tokenized; no weight is loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from prefuse.engine.hub import require_repository
    from prefuse.engine.model.adapters import add_adapters
    from prefuse.engine.run.setup import loss_of, read_rows

    require_repository(config.model_name_or_path)
    about = AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(about, trust_remote_code=config.trust_remote_code)
        if config.use_peft:
            add_adapters(model, config)
    sizes = {id(p): (p.numel(), p.requires_grad) for p in model.parameters()}
    trained = sum(size for size, trains in sizes.values() if trains)
    _, examples, _, _ = read_rows(config, loss_of(config, command))
    tokens = int(examples.prompts.lengths.sum() + examples.completions.lengths.sum())
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    epochs = config.max_steps * per_step / len(examples) if config.max_steps > 0 else config.num_train_epochs
    at_once = tokens * min(1.0, config.per_device_train_batch_size / len(examples))  # of a microbatch
    return RunNeeds(
        sum(size for size, _ in sizes.values()), trained, max(size for size, _ in sizes.values()), tokens, epochs,
        int(at_once * activations_per_token(config, about.get_text_config())),
    )  # fmt: skip


def activations_per_token(config: "Config", about: object) -> int:
    """Bytes that the backward of the decoder layers reads: about 10 hidden and 4 inner numbers for each layer; with
    gradient_checkpointing the hidden state of each, and one layer's as it is computed again."""
    hidden, layers = about.hidden_size, about.num_hidden_layers
    one = 10 * hidden + 4 * (getattr(about, "intermediate_size", None) or 4 * hidden)
    kept = layers * hidden + one if config.gradient_checkpointing else layers * one
    return kept * (2 if config.bf16 or config.dtype == "bfloat16" else 4)


def _time_of_run(needs: RunNeeds, command: str, device: torch.device) -> Check:
    """6 operations for each trained weight and token, 4 for a frozen one, at half of what the device can do."""
    from prefuse.engine.model.flops import PEAK_FLOPS, measured_flops

    rate = measured_flops(torch.float32) if device.type == "cpu" else None
    if device.type == "cuda":
        rate = next((r for n, r in PEAK_FLOPS.items() if n in torch.cuda.get_device_name(device)), None)
    epoch = f"{needs.tokens:,} tokens an epoch"
    if rate is None:
        return Check("time", "note", f"{epoch}; the speed of {device} is not known")
    passes = 6 * needs.trained + 4 * (needs.weights - needs.trained) + (2 * needs.weights if command != "sft" else 0)
    seconds = needs.tokens * needs.epochs * passes / (0.5 * rate)
    said = f"about {duration(seconds)}: {epoch}, {needs.epochs:.3g} epochs, half of {rate:.2g} FLOP/s"
    return Check("time", "ok", said)

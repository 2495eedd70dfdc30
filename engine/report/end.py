"""What the end of a run says: where its time went, and what to do with its model."""

import shlex

from prefuse.engine.config.settings import Config
from prefuse.engine.report.clock import PARTS
from prefuse.engine.report.log import duration, print_table


def say_time(shares: list[tuple[str, float, float]]) -> None:
    """Where the time of a run went, from `Clock.shares`."""
    total = sum(seconds for _, seconds, _ in shares)
    rows = [[name, f"{seconds:.1f}", f"{share:.1%}", PARTS[name]] for name, seconds, share in shares]
    print_table(f"where {duration(total)} went", ["part", "seconds", "share", ""], rows, lines=False)


def next_commands(config: Config, command: str, holds_out: bool) -> str:
    """Commands that run as they stand, on the rows that the run held out or, without any, on all of them."""
    run, base = config.output_dir, config.ref_model_name_or_path or config.model_name_or_path
    against = f"--ref_model_name_or_path {shlex.quote(base)}"
    given = f"--config {shlex.quote(f'{run}/config.yaml')} --model_name_or_path {shlex.quote(run)}"
    if config.server_type is not None:  # it has other weights than the run's
        given += " --server_base_url null --server_type null"
    if not holds_out:
        given += " --eval_fraction 1.0"
    load = f"AutoModelForCausalLM.from_pretrained({run!r})"
    if config.use_peft:
        load = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {run!r})"
    if command == "reward":
        kind = "TokenClassification" if config.reward_loss == "steps" else "SequenceClassification"
        return "\n  ".join(["next:", *_merging(config), f"in Python: {load.replace('CausalLM', kind)}"])
    how = {"sft": "--loss_type sft", "online": f"{against} --temperature 1"}.get(command, against)
    lines = [f"prefuse eval {given} {how}", f"prefuse generate {given} {against}"]
    # transformers takes the base's for a folder of adapters, and with it only the base's own stop tokens.
    stops = [f"  with generation_config = GenerationConfig.from_pretrained({run!r})"] if config.use_peft else []
    return "\n  ".join(["next:", *lines, *_merging(config), f"in Python: {load}", *stops])


def _merging(config: Config) -> list[str]:
    if not config.use_peft:
        return []
    adapters, whole = shlex.quote(config.output_dir), shlex.quote(f"{config.output_dir}-merged")
    return [f"prefuse merge --model_name_or_path {adapters} --output_dir {whole}"]

"""`prefuse eval` beside TRL's `DPOTrainer.evaluate()`: CPU seconds and memory on the same held-out pairs.

    prefuse bench evaluation --hidden_size 256 --num_hidden_layers 4 --vocab_size 32000 --rows 16
    prefuse bench evaluation --model_name_or_path smollm2 --dataset_name pairs.json --rows 13 --threads 1 --save smollm2

Both compare a policy with a reference of other weights on the same tokens, in one process, `--rounds` times by turns;
the least CPU time of each counts. TRL's evaluation has no KL; that of `prefuse eval` is exact, over the whole
vocabulary. Memory is the most that torch's allocator held at once beyond the two models.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; transformers reads this as it is imported

import torch
import transformers
import trl
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar

import prefuse.engine.evaluate as engine
from prefuse.bench.record import RESULTS, environment, write_result
from prefuse.bench.rows import CHAT, LONG, SEED, add_model_arguments, drawn_case, save_model
from prefuse.bench.timing import peak_bytes
from prefuse.engine.config import Config, validate
from prefuse.engine.config.tools import ToolParser
from prefuse.engine.data.dataset import read_evaluation_data
from prefuse.engine.model.load import load_model, load_tokenizer, without_padding


def main() -> None:
    parser = ToolParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per_device_eval_batch_size", type=int, default=4)
    parser.add_argument("--lengths", choices=["chat", "long"], default="chat")
    parser.add_argument("--model_name_or_path", help="a model in place of a random Llama; with --dataset_name")
    parser.add_argument("--dataset_name", help="pairs for it")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--skip_memory", action="store_true", help="which takes two more evaluations by each")
    parser.add_argument("--save", metavar="NAME", help="keep the numbers in bench/results under this name")
    arguments = parser.parse_args()
    if (arguments.model_name_or_path is None) != (arguments.dataset_name is None):
        parser.error("--model_name_or_path and --dataset_name go together")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        runs = prepare(Path(folder), arguments)
        results, metrics = {name: [] for name in runs}, {}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                began = time.process_time()
                metrics[name] = run()
                results[name].append(time.process_time() - began)
                print(f"{name:8} {results[name][-1]:7.2f} CPU s  {json.dumps(metrics[name])}", flush=True)
        seconds = {name: min(times) for name, times in results.items()}
        peaks = {} if arguments.skip_memory else {name: peak_bytes(run) for name, run in runs.items()}
    for name, peak in peaks.items():
        print(f"{name:8} {peak / 2**20:8.1f} MiB beyond the models")
    print(f"prefuse / TRL {trl.__version__}: {seconds['prefuse'] / seconds['trl']:.2f} of the CPU seconds")
    if arguments.save is not None:
        found = {"seconds": results, "peak_bytes": peaks, "metrics": metrics}
        path = RESULTS / f"evaluation-{arguments.save}-{torch.get_num_threads()}threads.json"
        settings = {name: value for name, value in vars(arguments).items() if name != "save"}
        settings["threads"] = torch.get_num_threads()
        write_result(path, "evaluation", {"environment": environment(), "settings": settings, **found})
        print(f"wrote {path}")


def prepare(folder: Path, arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, float]]]:
    """An evaluation by each, on models and tokens that are loaded."""
    model = folder / "model"
    if arguments.model_name_or_path is not None:
        model = Path(arguments.model_name_or_path)
        records = json.loads(Path(arguments.dataset_name).read_text(encoding="utf-8"))[: arguments.rows]
        save_other(model, folder / "ref", load_tokenizer(str(model)))
    else:
        lengths = {"chat": CHAT, "long": LONG}[arguments.lengths]
        case = drawn_case("pairs", lengths, arguments.rows, arguments.vocab_size)
        save_model(case, model, arguments)
        save_other(model, folder / "ref", case.tokenizer)
        records = case.rows
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    config = validate(
        Config(
            model_name_or_path=str(model), ref_model_name_or_path=str(folder / "ref"), device="cpu",
            dataset_name=str(folder / "rows.jsonl"), max_length=arguments.max_length,
            per_device_eval_batch_size=arguments.per_device_eval_batch_size,
        ), "eval",
    )  # fmt: skip
    device = torch.device("cpu")
    tokenizer = load_tokenizer(config.model_name_or_path)
    examples, _ = read_evaluation_data(config, config.loss(), tokenizer)
    lm, ref = (load_model(path, config, device) for path in (config.model_name_or_path, config.ref_model_name_or_path))
    examples = without_padding(examples, (lm, ref), config)
    return {
        "prefuse": lambda: engine.compare(lm, ref, examples, config),
        "trl": by_trl(lm, ref, examples, tokenizer, config),
    }


def save_other(folder: Path, other: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(SEED + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1 * p.std().item() if p.ndim > 1 else 0.0)
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)


class SameTokens(trl.DPOTrainer):
    def _prepare_dataset(self, dataset: Dataset, *args: object) -> Dataset:
        return dataset  # it is tokenized


def by_trl(lm, ref, examples, tokenizer, config: Config) -> Callable[[], dict[str, float]]:
    columns = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for (prompt, chosen), (_, rejected) in examples.sequences:
        for name, ids in zip(columns, (prompt, chosen, rejected), strict=True):
            columns[name].append(ids)
    rows = Dataset.from_dict(columns)
    args = trl.DPOConfig(
        tempfile.mkdtemp(), bf16=False, fp16=False, beta=0.1, max_length=None, use_cpu=True, report_to=[],
        per_device_eval_batch_size=config.per_device_eval_batch_size, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SameTokens(lm.model, ref.model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)

    def run() -> dict[str, float]:
        metrics = trainer.evaluate()
        lm.model.eval()
        return {k: metrics[k] for k in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies") if k in metrics}

    return run


if __name__ == "__main__":
    main()

"""Whether a model can judge: its greedy answers against its own at temperature 1.5, and the number of words as gold.

    prefuse bench judge --model_name_or_path smollm2 --name SmolLM2-135M-Instruct

Three commands of `prefuse eval`, as docs/evaluation.md has them: greedy answers, answers at temperature 1.5, and the
verdict of the same model on both, each pair in both orders. Writes results/judge-<name>-<cpu>-<threads>threads.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from prefuse.bench.record import RESULTS, cpu_model, environment, slug, write_result
from prefuse.engine.config.tools import ToolParser

PROMPTS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Why is the sky blue?",
    "Write a sentence about the sea.",
    "How many days does a week have?",
    "What is a good name for a cat?",
    "Explain what a computer is.",
    "Tell me something about the moon.",
)


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--name", help="the model's, for the result (default: its folder's)")
    parser.add_argument("--max_new_tokens", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=1.5, help="of the other answers")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = arguments.name or Path(arguments.model_name_or_path).name
    with tempfile.TemporaryDirectory() as folder:
        found = verdicts(Path(folder), arguments)
    found |= {"environment": environment(), "settings": vars(arguments) | {"name": name, "prompts": len(PROMPTS)}}
    path = RESULTS / f"judge-{slug(name)}-{slug(cpu_model())}-{arguments.threads}threads.json"
    write_result(path, "judge", found)
    print(f"wrote {path}")


def verdicts(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The metrics of the judged comparison, and the answers that were judged."""
    from prefuse.engine.cli import main as prefuse

    def run(*words: object) -> None:
        if status := prefuse(["eval", "--device", "cpu", *map(str, words)]):
            raise SystemExit(status)

    prompts, wins = folder / "prompts.jsonl", folder / "wins.json"
    prompts.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": x}]}) + "\n" for x in PROMPTS))
    model, answers = arguments.model_name_or_path, {"greedy": folder / "greedy", "hot": folder / "hot"}
    for kind, to in answers.items():
        drawn = ("--temperature", arguments.temperature) if kind == "hot" else ()
        run("--model_name_or_path", model, "--eval_dataset", prompts, "--scorer", "length", "--max_new_tokens",
            arguments.max_new_tokens, "--answers_dir", to, *drawn)  # fmt: skip
    files = {kind: to / "model_outputs.json" for kind, to in answers.items()}
    run("--model_answers", files["greedy"], "--ref_answers", files["hot"], "--scorer", f"judge={model}",
        "--allow_self_judge", "true", "--gold_scorer", "length", "--score_cache", "none",
        "--output_file", wins)  # fmt: skip
    texts = {kind: [row["output"] for row in json.loads(file.read_text())] for kind, file in files.items()}
    return {"metrics": json.loads(wins.read_text()), "answers": texts, "prompts": list(PROMPTS)}


if __name__ == "__main__":
    main()

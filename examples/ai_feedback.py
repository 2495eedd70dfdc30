"""AI feedback on a CPU: a constitution of one checkable principle, and a judge that is a rule behind a server.

    python examples/ai_feedback.py

1. A small Llama learns to sort letters either way (as in online.py).
2. An OpenAI-compatible server starts in this process. It answers "which is better, A or B?" by the principle that it is
   shown, as a language model would: with the probabilities of the two letters.
3. `prefuse label` samples four answers to each prompt; the judge compares them, both orders; out come weighted pairs.
4. `prefuse train` aligns the model with these pairs. Nobody has labelled anything.

The exit code is 1 unless the judge agrees with the rule and the share of ascending answers has clearly risen.
"""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import demo
import online
import sorting_rule
import torch
from transformers.utils.logging import disable_progress_bar

FOLDER = Path("runs/ai_feedback")
PRINCIPLE = "Choose the answer that has exactly the letters of the prompt, in ascending order."
SURE = 0.9  # of the judge


class RuleJudge(BaseHTTPRequestHandler):
    """POST /v1/chat/completions, as vLLM and others serve it."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][-1]["content"]
        prompt, a, b = re.search(
            r"\[Prompt\]\n(.*?)\n\n\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\n\[End\]", text, re.S
        ).groups()
        scores = sorting_rule.ascending([prompt, prompt], [a, b])
        share = 0.5 if scores[0] == scores[1] or PRINCIPLE not in text else SURE if scores[0] > scores[1] else 1 - SURE
        self.reply(share)

    def reply(self, share: float) -> None:
        from math import log

        letters = [{"token": "A", "logprob": log(share)}, {"token": "B", "logprob": log(1 - share)}]
        word = {"token": "A" if share >= 0.5 else "B", "logprob": 0.0, "top_logprobs": letters}
        choice = {"message": {"role": "assistant", "content": word["token"]}, "logprobs": {"content": [word]}}
        body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Nothing on the screen."""


def label_and_train(folder: Path, url: str) -> dict[str, float]:
    constitution = folder / "constitution.yaml"
    constitution.write_text(f"principles:\n  - {PRINCIPLE}\n", encoding="utf-8")
    demo.prefuse(
        "label", model_name_or_path=folder / "sft", dataset_name=folder / "prompts.jsonl", num_generations=4,
        pairs="all", scorer=f"judge={url}#rule", constitution=constitution, score_cache="none",
        gold_scorer=f"{online.RULE}:ascending", max_new_tokens=10, per_device_eval_batch_size=100, judge_workers=2,
        output_file=folder / "ai_pairs.jsonl",
    )  # fmt: skip
    demo.prefuse(
        "train", loss_type="dpo", beta=1.0, model_name_or_path=folder / "sft", dataset_name=folder / "ai_pairs.jsonl",
        output_dir=folder / "dpo", num_train_epochs=2, per_device_train_batch_size=32, learning_rate=3e-4,
        logging_steps=10, eval_steps=10_000, save_steps=0,
    )  # fmt: skip
    return json.loads((folder / "ai_pairs.trust.json").read_text(encoding="utf-8"))


def share_of_ascending(folder: Path, model: str) -> float:
    out = folder / f"{model}-answers.jsonl"
    demo.prefuse(
        "generate", model_name_or_path=folder / model, eval_dataset=folder / "held_out.jsonl", num_prompts=0,
        temperature=1.0, max_new_tokens=10, per_device_eval_batch_size=100, output_file=out,
    )  # fmt: skip
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return sum(sorting_rule.ascending([a["prompt"] for a in answers], [a["model"] for a in answers])) / len(answers)


def main() -> int:
    torch.set_num_threads(1)
    disable_progress_bar()
    demo.FOLDER = FOLDER
    folder = demo.fresh(FOLDER)
    online.make_start(folder, epochs=2.0)
    rows = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(rows[:300]), encoding="utf-8")
    (folder / "held_out.jsonl").write_text("".join(rows[300:]), encoding="utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), RuleJudge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    trust = label_and_train(folder, f"http://127.0.0.1:{server.server_port}/v1")
    server.shutdown()
    before, after = (share_of_ascending(folder, model) for model in ("sft", "dpo"))
    demo.console.print(
        f"kappa of judge and rule {trust['gold_kappa']:.2f}; first shown wins {trust['first_shown_wins']:.2f}; "
        f"ascending answers {before:.1%} before, {after:.1%} after"
    )
    return int(not (trust["gold_kappa"] > 0.9 and after > before + 0.1))


if __name__ == "__main__":
    sys.exit(main())

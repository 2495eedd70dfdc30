"""Constitutional AI on the demo's sorting task, in two minutes on a CPU: `python examples/constitution.py`.

    sort d x a b =>     a b d x        as the constitution has it
                        x d b a        sorted as well, but against it

The constitution has one principle, which a rule can check. A small Llama knows how to sort (either way), how to
criticize an answer ("descends"), and how to write it again behind such a critique; it answers either way.

1. `prefuse revise`: its answers, its own critiques, its revisions; `prefuse sft` on the revisions. (Supervised phase.)
2. `prefuse label`: four of its answers to each prompt are compared by a judge behind an OpenAI-compatible server, which
   follows the principle it is shown in nine of ten questions; `prefuse train` on these pairs. (AI feedback.)

The exit code is 1 unless both models answer held-out prompts clearly more often in ascending order.
"""

import http.server
import json
import random
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import demo
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

FOLDER = Path("runs/constitution")
RULE = Path(__file__).with_name("sorting_rule.py")
PRINCIPLE = "Choose the answer in ascending order."
CONSTITUTION = f"principles:\n- {PRINCIPLE}\ncritiques:\n- critique: criticize\n  revision: revise\n"
SURE = 0.9  # of the judge's answers follow the principle
SPOKEN = ("Human:", "Assistant:", "criticize", "revise", "ascends", "descends")  # as `prefuse revise` writes them

# ---- The judge ----


def verdict(question: str, rng: random.Random) -> str:
    """The answer that is sorted as the principle says; without such a one, A."""
    a, b = re.search(r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\n\[End\]", question, re.S).groups()
    letters = sorted(re.search(r"\[Prompt\]\nsort (.*?) =>", question)[1].split())
    good = "B" if b.split() == letters and a.split() != letters else "A"
    return good if rng.random() < SURE else "AB".replace(good, "")


@contextmanager
def judge() -> Iterator[str]:
    """Its URL. A question that is put again is answered alike."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            said = verdict(question, random.Random(question)) if question.startswith(PRINCIPLE) else "C"
            choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            content = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


# ---- The model that answers, criticizes and revises ----


def make_model(folder: Path) -> None:
    words = ["<end>", "sort", "=>", *demo.LETTERS, *SPOKEN]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    config = demo.make_model(tokenizer).config
    config.max_position_embeddings = 64
    torch.manual_seed(demo.SEED)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def demonstrations(pairs: list[dict[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """Each pair once as an answer in either order, and once as a critique or a revision of one."""
    rows = []
    for number, pair in enumerate(pairs):
        rows.append({"prompt": pair["prompt"], "completion": pair[rng.choice(demo.SIDES)]})
        side = rng.choice(demo.SIDES)
        word = "ascends" if side == "chosen" else "descends"
        asked = f"Human: {pair['prompt']}\n\nAssistant: {pair[side]}\n\nHuman: criticize\n\nAssistant:"
        if number % 3 == 0:
            rows.append({"prompt": asked, "completion": word})
        else:
            rows.append({"prompt": f"{asked} {word}\n\nHuman: revise\n\nAssistant:", "completion": pair["chosen"]})
    rng.shuffle(rows)
    return rows


def write_data(folder: Path) -> None:
    rng = random.Random(demo.SEED)
    pairs = demo.make_pairs(300 + 500 + 10_000, rng)
    files = {
        "held": [{"prompt": pair["prompt"]} for pair in pairs[:300]],
        "prompts": [{"prompt": pair["prompt"]} for pair in pairs[300:800]],
        "demonstrations": demonstrations(pairs[800:], rng),
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "constitution.yaml").write_text(CONSTITUTION, encoding="utf-8")


def ascending(folder: Path, name: str) -> float:
    """The rule's mean over one sampled answer to each held-out prompt."""
    out = folder / f"{name}.json"
    demo.prefuse(
        "eval", model_name_or_path=folder / name, eval_dataset=folder / "held.jsonl", scorer=f"{RULE}:ascending",
        temperature=1.0, max_new_tokens=10, per_device_eval_batch_size=100, output_file=out, score_cache="none",
    )  # fmt: skip
    return json.loads(out.read_text(encoding="utf-8"))["score"]


def stages(folder: Path, epochs: float = 2.0) -> tuple[dict[str, float], dict[str, float]]:
    """The share of ascending answers of each model, and how far the judge's labels can be trusted."""
    write_data(folder)
    make_model(folder / "base")
    quiet = {"logging_steps": 100, "eval_steps": 10_000, "save_steps": 0}
    demo.prefuse(
        "sft", model_name_or_path=folder / "base", dataset_name=folder / "demonstrations.jsonl",
        output_dir=folder / "sft", num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=4e-3,
        lr_scheduler_type="cosine", **quiet,
    )  # fmt: skip
    common = {"dataset_name": folder / "prompts.jsonl", "constitution": folder / "constitution.yaml"}
    common |= {"per_device_eval_batch_size": 100, "max_new_tokens": 10, "score_cache": "none"}
    demo.prefuse(
        "revise", model_name_or_path=folder / "sft", scorer=f"{RULE}:ascending", output_file=folder / "revised.jsonl",
        **common,
    )  # fmt: skip
    demo.prefuse(
        "sft", model_name_or_path=folder / "sft", dataset_name=folder / "revised.jsonl", output_dir=folder / "revised",
        num_train_epochs=2, per_device_train_batch_size=32, learning_rate=1e-3, **quiet,
    )  # fmt: skip
    with judge() as url:
        demo.prefuse(
            "label", model_name_or_path=folder / "sft", num_generations=4, scorer=f"judge={url}#rule",
            gold_scorer=f"{RULE}:ascending", output_file=folder / "labels.jsonl", **common,
        )  # fmt: skip
    demo.prefuse(
        "train", loss_type="dpo", beta=0.5, model_name_or_path=folder / "sft", dataset_name=folder / "labels.jsonl",
        output_dir=folder / "labelled", num_train_epochs=2, per_device_train_batch_size=32, learning_rate=3e-4, **quiet,
    )  # fmt: skip
    trust = json.loads((folder / "labels.trust.json").read_text(encoding="utf-8"))
    return {name: ascending(folder, name) for name in ("sft", "revised", "labelled")}, trust


def main() -> int:
    torch.set_num_threads(1)
    disable_progress_bar()
    demo.FOLDER = FOLDER
    found, trust = stages(demo.fresh(FOLDER))
    names = {"sft": "before", "revised": "after SFT on its revisions", "labelled": "after DPO on the judge's labels"}
    for name, share in found.items():
        demo.console.print(f"{names[name]}: {share:.1%} of the held-out answers ascend")
    demo.console.print(f"the judge and the rule: kappa {trust['gold_kappa']:.2f}")
    return 0 if min(found["revised"], found["labelled"]) > found["sft"] + 0.2 else 1


if __name__ == "__main__":
    sys.exit(main())

"""Folders as runs leave them, written by hand, and the page that `prefuse report` makes of them."""

import json
from html.parser import HTMLParser

from prefuse.engine.cli import main

MARKUP = "<script>document.title='taken'</script><img src=x onerror=alert(1)>"
CLOSING = "</script><script>document.title='taken'</script>"


def write_run(folder, steps=30, text="a plain text", **files):
    folder.mkdir()
    rows = [{"step": 0, "epoch": 0.0, "eval_loss": 0.6931, "eval_rewards/accuracies": 0.0, "eval_rewards/ties": 1.0}]
    rows += [{"step": step, "epoch": 0.1, "loss": 1 / step, "learning_rate": 1e-3} for step in range(1, steps + 1)]
    rows += [
        {"step": steps, "epoch": 1.0, "eval_loss": 0.25, "eval_rewards/accuracies": 0.75, "eval_rewards/ties": 0.1}
    ]
    side = {"name": "chosen", "ids": [1, 2], "pieces": [text, "\n"], "roles": ["prompt", "chosen"]}
    contents = {
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "run.json": json.dumps({"command": "train", "state": "finished", "libraries": {"torch": "2"}}),
        "config.yaml": f"loss_type: dpo\nbeta: 0.3\ndataset_name: {json.dumps(text)}\n",
        "about.json": json.dumps({
            "rows": {"train": 19, "held_out": 1}, "example": {"row": text, "sides": [side]}, "chat_template": text,
        }),
        "skipped.jsonl": "".join(json.dumps({"row": text, "reason": text}) + "\n" for _ in range(3)),
        "messages.jsonl": json.dumps({"time": "2026", "level": "warning", "text": text}) + "\n",
        "answers.jsonl": json.dumps({"prompt": text, "model": text, "reference": text}) + "\n",
        "eval.json": json.dumps({"loss": 0.25, "rewards/accuracies": 0.75}),
        "wins.json": json.dumps({"win_rate": 0.625, "win_rate_low": 0.5, "win_rate_high": 0.7, "best_of_n": []}),
        "curve.json": json.dumps({
            "checkpoints": [{"sqrt_kl": x, "score": x, "gold_score": x - x * x} for x in (0.0, 0.5, 1.0)], "turn": None,
        }),
    } | files  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def page_of(*folders):
    assert main(["report", *map(str, folders)]) == 0
    return (folders[0] / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

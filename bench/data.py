"""CPU seconds and memory of reading a file of pairs into token ids, beside a plain batched `datasets.map`.

    prefuse bench data                                                       # 30,000 rows of made-up words
    prefuse bench data --rows 300000 --data dpo.json --tokenizer FOLDER      # rows of a file, cut and repeated

The file is JSONL with prompt, chosen and rejected as strings. Every variant runs in a process of its own, one after the
other in each round, on one thread; ratios are paired by round. `prefuse` reads, checks, tokenizes and fits the rows and
keeps nothing; `prefuse, kept` writes them to an empty cache; `prefuse, again` finds them there. `datasets.map` loads
the file and makes the ids of the three columns in batches, and checks nothing. Times leave imports and the loading of
the tokenizer out; memory is the most that the process ever had, all included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefuse.bench.record import RESULTS, again, cpu_model, environment, markdown, slug, write_result
from prefuse.engine.config.tools import ToolParser

VARIANTS = ("datasets.map", "prefuse", "prefuse, kept", "prefuse, again")
COLUMNS = ("prompt", "chosen", "rejected")
VOCABULARY = 49152
CHARACTERS = 300  # of a field


def made_up_rows(count: int = 1000) -> Iterator[dict[str, str]]:
    draw = random.Random(0)
    letters = "etaoinshrdlu" * 2 + "cmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(8000)]
    for _ in range(count):
        yield {name: " ".join(draw.choices(words, k=60)) for name in COLUMNS}


def write_rows(path: Path, count: int, data: Path | None) -> None:
    """`count` rows: those of a file of pairs, each field cut, again and again."""
    from prefuse.bench.sparse import pairs

    rows = made_up_rows() if data is None else (dict(zip(COLUMNS, row, strict=True)) for row in pairs(data))
    lines = [json.dumps({name: text[:CHARACTERS] for name, text in row.items()}) + "\n" for row in rows]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(lines[number % len(lines)])


def train_tokenizer(source: Path, folder: Path) -> None:
    """A byte-level BPE as GPT-2's, of the size of SmolLM2's."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    with source.open(encoding="utf-8") as file:
        texts = [text for line, _ in zip(file, range(1000), strict=False) for text in json.loads(line).values()]
    tokenizer.train_from_iterator(texts, VOCABULARY, min_frequency=1, special_tokens=["</s>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="</s>").save_pretrained(folder)


# ------------------------------------------------------------------------------------- one variant, in a process


def by_map(source: Path, tokenizer: Any, folder: Path) -> int:
    import datasets

    datasets.disable_progress_bars()

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {f"{name}_ids": tokenizer(batch[name], add_special_tokens=False)["input_ids"] for name in COLUMNS}

    rows = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(folder / "map"))
    return len(rows.map(encode, batched=True, remove_columns=list(COLUMNS)))


def by_prefuse(source: Path, tokenizer: Any, cache: str) -> int:
    from prefuse.engine.data import load_examples

    return len(load_examples(str(source), "pair", tokenizer, 1024, cache=cache).examples)


def run_one(variant: str, source: Path, tokenizer_folder: str, folder: Path) -> dict[str, float]:
    from transformers import AutoTokenizer

    if variant == "datasets.map":  # imports are not measured; each variant has its own
        import datasets  # noqa: F401
    else:
        import prefuse.engine.data  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    cache = "none" if variant == "prefuse" else str(folder / "cache")
    before, start = time.process_time(), time.perf_counter()
    rows = by_map(source, tokenizer, folder) if variant == "datasets.map" else by_prefuse(source, tokenizer, cache)
    return {
        "cpu_seconds": time.process_time() - before,
        "seconds": time.perf_counter() - start,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rows": rows,
    }


# ------------------------------------------------------------------------------------------------- all of them


def measure(source: Path, tokenizer: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    quiet = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name in VARIANTS:
                given = ["--variant", name, "--source", str(source), "--tokenizer", tokenizer, "--folder", folder]
                run = subprocess.run(
                    [*again("data"), *given], env=os.environ | quiet, stdout=subprocess.PIPE, text=True, check=True
                )
                found[name].append(json.loads(run.stdout.splitlines()[-1]))
                print(name, found[name][-1], flush=True)
    return found


def report(result: dict[str, Any]) -> str:
    found, settings = result["runs"], result["settings"]
    rows = []
    for name in VARIANTS:
        ratios = [a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(found[name], found["datasets.map"], strict=True)]
        row = {
            key: statistics.median(run[key] for run in found[name]) for key in ("cpu_seconds", "seconds", "peak_mib")
        }
        figures = [f"{row['cpu_seconds']:.1f}", f"{statistics.median(ratios):.2f}", f"{row['peak_mib']:.0f}"]
        rows.append([name, *figures])
    title = f"# {settings['rows']} pairs, {settings['megabytes']:.0f} MB of JSONL, {settings['name']}, {cpu_model()}"
    return "\n".join(
        [f"{title}, one thread", "", markdown(["variant", "CPU seconds", "of datasets.map's", "peak MiB"], rows)]
    )


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=30_000, help="rows of the file (default 30000)")
    parser.add_argument("--data", type=Path, help="JSON list of pairs to take the rows from; default: made-up words")
    parser.add_argument("--tokenizer", help=f"folder; default: a BPE of {VOCABULARY} tokens trained on the rows")
    parser.add_argument("--name", help="what to call rows and tokenizer in the report")
    parser.add_argument("--rounds", type=int, default=1)
    for name in ("variant", "source", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(run_one(args.variant, Path(args.source), args.tokenizer, Path(args.folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        source, tokenizer = Path(folder) / "pairs.jsonl", args.tokenizer or folder
        write_rows(source, args.rows, args.data)
        if args.tokenizer is None:
            train_tokenizer(source, Path(folder))
        name = args.name or ("made-up words" if args.data is None else args.data.name)
        settings = {"rows": args.rows, "megabytes": source.stat().st_size / 1e6, "name": name, "rounds": args.rounds}
        result = {"environment": environment(), "settings": settings}
        result["runs"] = measure(source, tokenizer, args.rounds)
    path = RESULTS / f"data-{slug(name)}-{args.rows}rows-{slug(cpu_model())}.json"
    write_result(path, "data", result)
    path.with_suffix(".md").write_text(report(result) + "\n")
    print(report(result))


if __name__ == "__main__":
    main()

"""`prefuse bench VERB ...`: each verb is a file of this folder, with a `main` and options of its own."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

# By what they ask. Every verb that measures writes one record (record.py), which the last group reads.
GROUPS = {
    "the head": {
        "head": "Implementations x shapes x modes x losses: right first, then time, memory, error, same bits.",
        "accuracy": "How far a sequence's log-ratio is from float64, by length, beside peers.",
        "memory": "Peak memory of every implementation, by tokens and by vocabulary.",
        "scale": "How time and memory grow with tokens, vocabulary and ranks: fitted exponents.",
        "cpuhead": "Time and memory of the portable head on this CPU beside its own bare matrix products.",
        "products": "Time and error of a product of bfloat16 matrices on this CPU: float32, rounded, in two parts.",
        "guard": "Whether the portable head kept its share of its own products' speed; CI asks the same.",
        "sparse": "Time and error of the head's sparse backward on a trained model's hidden states.",
        "losses": "Time and memory of the losses under Liger's names, beside Liger's own.",
        "policy": "The policy losses beside TRL's own on the same numbers: values, gradients, metrics.",
        "gpu": "Check and time the Triton kernels on this machine's GPU, beside peers.",
    },
    "steps and runs": {
        "model": "Time and memory of a whole model's step, with its own logits and without them.",
        "packing": "Pairs per second in flat batches with shared prompts, beside padded ones.",
        "seam": "Time and memory of a DPO step of TRL's trainer, with its own head and with prefuse's.",
        "train": "Pairs per second of a whole DPO run beside TRL's, and whether both learn the same.",
        "reward": "Pairs per second of a reward model's training beside TRL's, and tokens of scoring several answers.",
        "online": "CPU seconds of a GRPO step beside TRL's GRPOTrainer on the same samples, and the first ratios.",
        "sampling": "CPU seconds of sampling beside transformers' own batched generate, and of continuous batching.",
        "evaluation": "CPU seconds and memory of `prefuse eval` beside the evaluation of TRL's DPOTrainer.",
        "judge": "Whether a model can judge: its greedy answers against its own hot ones, in both orders.",
        "data": "CPU seconds and memory of reading pairs into token ids, beside datasets.map.",
        "tolerance": "DPO with an exact head, a sparse backward, and rounded dlogits: losses and held-out metrics.",
        "ranks": "Whether one process, two, and two with FSDP2 end with the same held-out metrics.",
    },
    "pages": {
        "architectures": "Every causal LM of transformers, tiny, through all that is done with a model; writes a page.",
        "templates": "Every chat template of trl and axolotl through the reader of rows, checked against transformers.",
    },
    "results": {
        "show": "Results as tables in the terminal, or as one HTML page.",
        "compare": "Two results row by row: exit status 1 if anything became worse.",
        "figures": "Write every table and figure of README and docs from the results; --check only compares.",
    },
}
VERBS = {name: about for verbs in GROUPS.values() for name, about in verbs.items()}
OTHER_NAMES = {"loading": "data"}  # names of before


def parser() -> argparse.ArgumentParser:
    """The verbs, by which a shell completes."""
    parser = argparse.ArgumentParser(prog="prefuse bench", add_help=False)
    parser.add_argument("verb", choices=tuple(VERBS))
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one verb. Returns the exit status: 2 for the user's mistake, else the verb's own."""
    verb, rest = (argv[0], list(argv[1:])) if argv else ("--help", [])
    if verb in ("-h", "--help"):
        print("usage: prefuse bench VERB [options]    (prefuse bench VERB --help lists them)")
        for group, verbs in GROUPS.items():
            print(f"\n{group}")
            print("\n".join(f"  {name:<13} {about}" for name, about in verbs.items()))
        return 0
    verb = OTHER_NAMES.get(verb, verb)
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"
        print(f"prefuse: error: bench has no verb {verb!r}; {fix}", file=sys.stderr)
        return 2
    sys.argv[:] = [f"prefuse bench {verb}", *rest]  # argparse names the command by it
    from prefuse.bench.record import BadRecord, commit
    from prefuse.engine.errors import UserError

    commit()  # before anything can change

    try:
        return importlib.import_module(f"prefuse.bench.{verb}").main() or 0
    except (BadRecord, UserError) as error:
        print(f"prefuse: error: {error}", file=sys.stderr)
        return 2

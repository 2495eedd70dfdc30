"""`prefuse bench VERB ...`: each verb is a file of this folder, with a `main` and options of its own."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "accuracy": "How far a sequence's log-ratio is from float64, by length, beside peers.",
    "architectures": "Every causal LM of transformers, tiny, through all that is done with a model; writes a page.",
    "evaluation": "CPU seconds and memory of `prefuse eval` beside the evaluation of TRL's DPOTrainer.",
    "gpu": "Check and time the Triton kernels on this machine's GPU, beside peers.",
    "head": "Time and memory of the portable head on this CPU, beside peers and its own matrix products.",
    "loading": "CPU seconds and memory of reading pairs into token ids, beside datasets.map.",
    "losses": "Time and memory of the losses under Liger's names, beside Liger's own.",
    "model": "Time and memory of a whole model's step, with its own logits and without them.",
    "online": "CPU seconds of a GRPO step beside TRL's GRPOTrainer on the same samples, and the first ratios.",
    "packing": "Pairs per second in flat batches with shared prompts, beside padded ones.",
    "policy": "The policy losses beside TRL's own on the same numbers: values, gradients, metrics.",
    "ranks": "Whether one process, two, and two with FSDP2 end with the same held-out metrics.",
    "reward": "Pairs per second of a reward model's training beside TRL's, and tokens of scoring several answers.",
    "sampling": "CPU seconds of sampling beside transformers' own batched generate, and of continuous batching.",
    "seam": "Time and memory of a DPO step of TRL's trainer, with its own head and with prefuse's.",
    "sparse": "Time and error of the head's sparse backward on a trained model's hidden states.",
    "templates": "Every chat template of trl and axolotl through the reader of rows, checked against transformers.",
    "tolerance": "DPO with an exact head, a sparse backward, and rounded dlogits: losses and held-out metrics.",
    "train": "Pairs per second of a whole DPO run beside TRL's, and whether both learn the same.",
}


def main(argv: Sequence[str]) -> int:
    """Run one verb. Returns the exit status: 2 for a verb that does not exist, else the verb's own."""
    verb, rest = (argv[0], list(argv[1:])) if argv else ("--help", [])
    if verb in ("-h", "--help"):
        print("usage: prefuse bench VERB [options]    (prefuse bench VERB --help lists them)\n")
        print("\n".join(f"  {name:<13} {about}" for name, about in VERBS.items()))
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"
        print(f"prefuse: error: bench has no verb {verb!r}; {fix}", file=sys.stderr)
        return 2
    sys.argv[:] = [f"prefuse bench {verb}", *rest]  # argparse names the command by it
    return importlib.import_module(f"prefuse.bench.{verb}").main() or 0

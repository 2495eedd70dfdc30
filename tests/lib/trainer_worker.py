"""One rank of the slow tests of the trainers for TRL: trains each case, and writes its log, weights and collectives.

python trainer_worker.py CASES.json OUT          with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set
"""

import json
import os
import sys
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import transformers
import trl
from peft import LoraConfig
from safetensors.torch import save_file

import prefuse.trl.batches
from prefuse.engine.run.ranks import leave
from prefuse.trl.trainers import DPOTrainer, KTOTrainer
from trainer_runs import LABELLED, ROWS, build, log_of, weights_of

TRAINERS = {
    "trl dpo": (trl.DPOTrainer, trl.DPOConfig, ROWS),
    "dpo": (DPOTrainer, trl.DPOConfig, ROWS),
    "trl kto": (trl.KTOTrainer, trl.KTOConfig, LABELLED),
    "kto": (KTOTrainer, trl.KTOConfig, LABELLED),
}


def run_case(case: dict, out: Path) -> None:
    trainer, config, rows = TRAINERS[case["trainer"]]
    options = dict(case.get("options", {}), eval_rows=rows[:8])
    if options.pop("lora", False):
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if reference := options.pop("reference", None):
        options["ref_model"] = transformers.AutoModelForCausalLM.from_pretrained(reference)
    calls = []
    reduce = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        if sys._getframe(1).f_globals["__name__"].startswith("prefuse."):
            calls.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    prefuse.trl.batches.dist.all_reduce = counting
    try:
        run = build(trainer, case["model"], rows, out, config, options, ddp_backend="gloo", **case["settings"])
        run.train()
    finally:
        prefuse.trl.batches.dist.all_reduce = reduce
    rank = os.environ["RANK"]
    save_file(weights_of(run.model), out / f"weights.{rank}.safetensors")
    (out / f"log.{rank}.json").write_text(json.dumps({"log": log_of(run), "reductions": len(calls)}))


def main() -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
        out = Path(sys.argv[2]) / name
        out.mkdir(parents=True, exist_ok=True)
        run_case(case, out)
    leave(0)


if __name__ == "__main__":
    main()

"""One rank of tests/bindings/test_trl.py: trains every case on TRL's own function, then on ours; writes what it got.

python trl_worker.py CASES.json OUT          with RANK, WORLD_SIZE and PREFUSE_RENDEZVOUS set
"""

import datetime
import json
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

import prefuse.trl
import trl_runs
from prefuse.engine.run.ranks import leave


def run_case(case: dict, out: Path) -> None:
    """OUT/<who>.json and .safetensors, and start.safetensors; OUT/wrapped.json: how the model was shared;
    OUT/refused<rank>.txt: why ours would not run, where it would not.
    """
    for who in ("theirs", "ours"):
        prefuse.trl.enable() if who == "ours" else prefuse.trl.disable()
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # left there by the run before
        trainer = trl_runs.make_trainer(dict(case), out)
        start = {name: x.detach().clone() for name, x in trainer.model.state_dict().items()}
        try:
            trainer.train()
        except ValueError as error:
            if who == "theirs":
                raise
            (out / f"refused{dist.get_rank()}.txt").write_text(str(error))
            break
        logs, weights = trl_runs.logs_of(trainer), trl_runs.weights_of(trainer)
        if dist.get_rank() == 0:
            (out / f"{who}.json").write_text(json.dumps(logs))
            save_file(start, out / "start.safetensors")
            save_file({name: x.contiguous() for name, x in weights.items()}, out / f"{who}.safetensors")
            (out / "wrapped.json").write_text(json.dumps(wrapping(trainer)))
    prefuse.trl.disable()


def wrapping(trainer) -> dict:
    units = [name for name, module in trainer.model_wrapped.named_modules() if isinstance(module, FSDPModule)]
    return {"ddp": isinstance(trainer.model_wrapped, DistributedDataParallel), "fsdp_units": units}


def shard_on_cpus() -> None:
    """Accelerate asks for FSDP's settings anywhere, and follows them on accelerators alone: on CPUs too, then."""
    initialize = AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        fresh = not AcceleratorState._shared_state
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fresh and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = with_plugin


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Accelerate takes the group that is there, where it would ask for a port, once it knows that all ranks are here.
    os.environ["LOCAL_WORLD_SIZE"] = str(size)
    dist.init_process_group(
        "gloo", os.environ["PREFUSE_RENDEZVOUS"], rank=rank, world_size=size, timeout=datetime.timedelta(seconds=100)
    )
    shard_on_cpus()
    for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
        out = Path(sys.argv[2]) / name
        out.mkdir(parents=True, exist_ok=True)
        run_case(case, out)
    leave(0)


if __name__ == "__main__":
    main()

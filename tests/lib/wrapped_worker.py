"""One rank of the tests of `prefuse.transformers` on wrapped models: its rows through the wrapper, then the truth.

python wrapped_worker.py OUT          with RANK, WORLD_SIZE and PREFUSE_RENDEZVOUS set

The truth is the model's own logits, in one process and without a wrapper, on the rows of all ranks. Rank 0 writes
OUT.json: {case: {"values": largest difference in nats, "gradients": {parameter: error relative to the largest}}}.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from prefuse.engine.run.ranks import leave
from prefuse.transformers import fuse_loss, sequence_logps
from tiny_run import SHAPE

LENGTHS, PROMPTS = (11, 7, 13, 5), (4, 6, 2, 3)
COEFFICIENTS = (0.7, -1.3, 0.4, 2.0)


def rows() -> dict[str, torch.Tensor]:
    """(4, 14) padded rows, whose labels are -100 on prompts and padding."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (4, 14), generator=g)
    place, length, prompt = torch.arange(14), torch.tensor(LENGTHS)[:, None], torch.tensor(PROMPTS)[:, None]
    mask = place < length
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask | (place < prompt), -100)}


def llama(tied=False, adapters=()) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, bos_token_id=0, eos_token_id=1, initializer_range=0.2, **SHAPE)
    config.tie_word_embeddings = tied
    model = LlamaForCausalLM(config)
    if adapters:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(adapters), task_type="CAUSAL_LM"))
        for name, p in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, std=0.1)
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    return list((model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers)


def ddp(model: nn.Module, **options) -> nn.Module:
    return DistributedDataParallel(model, **options)


def fsdp(model: nn.Module, head_alone=False, root: dict | None = None, **options) -> nn.Module:
    for layer in layers_of(model):
        fully_shard(layer, **options)
    if head_alone:
        fully_shard(model.lm_head, **options)
    return fully_shard(model, **options, **(root or {}))


def checkpointed(model: nn.Module) -> nn.Module:
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    return model


# As accelerate's plugin has it, but for the dtype to compute in: what the root returns is cast.
CAST = {"mp_policy": MixedPrecisionPolicy(output_dtype=torch.bfloat16)}
TRUNK = ("q_proj", "v_proj")
CASES = {
    "ddp": lambda: ddp(llama()),
    "ddp find_unused": lambda: ddp(llama(), find_unused_parameters=True),
    "ddp static_graph": lambda: ddp(llama(), static_graph=True),
    "ddp tied": lambda: ddp(llama(tied=True)),
    "ddp lora": lambda: ddp(llama(adapters=TRUNK)),
    "ddp lora on the head": lambda: ddp(llama(adapters=(*TRUNK, "lm_head")), find_unused_parameters=True),
    "ddp checkpointed": lambda: ddp(checkpointed(llama())),
    "fsdp": lambda: fsdp(llama()),
    "fsdp resharded": lambda: fsdp(llama(), reshard_after_forward=True),
    "fsdp tied": lambda: fsdp(llama(tied=True)),
    "fsdp head alone": lambda: fsdp(llama(), head_alone=True),
    "fsdp head alone resharded": lambda: fsdp(llama(), head_alone=True, reshard_after_forward=True),
    "fsdp cast": lambda: fsdp(llama(), root=CAST),
    "fsdp lora": lambda: fsdp(llama(adapters=TRUNK)),
    "fsdp lora on the head": lambda: fsdp(llama(adapters=(*TRUNK, "lm_head"))),
    "fsdp checkpointed": lambda: fsdp(checkpointed(llama())),
}
LOSSES = {
    "ddp": ddp,
    "ddp find_unused": lambda model: ddp(model, find_unused_parameters=True),
    "ddp tied": ddp,
    "fsdp": fsdp,
    "fsdp resharded": lambda model: fsdp(model, reshard_after_forward=True),
    "fsdp tied": fsdp,
    "fsdp head alone": lambda model: fsdp(model, head_alone=True, reshard_after_forward=True),
}


def logits_of(model: nn.Module, batch: dict) -> torch.Tensor:  # (B,)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    logps = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (logps * (targets != -100)).sum(-1)


def whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    named = ((name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: whole(p.grad) if p.grad is not None else None for name, p in named}


def plain_of(name: str) -> nn.Module:
    """The same model without a wrapper, in float64 but for its precision: the same weights, by the same seed."""
    adapters = () if "lora" not in name else (*TRUNK, "lm_head") if "head" in name else TRUNK
    return llama(tied="tied" in name, adapters=adapters).double()


def compare(got: dict, wanted: dict) -> dict[str, float]:
    assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
    size = max(grad.norm() for grad in wanted.values())
    missing = [name for name in got if got[name] is None]
    assert not missing, f"no gradient for {missing}"
    return {name: ((got[name] - wanted[name]).norm() / size).item() for name in wanted}


def mine(batch: dict, rank: int, size: int, only_first: bool) -> dict:
    """This rank's rows, every `size`-th; with `only_first` nothing counts on the others."""
    own = {name: x[rank::size] for name, x in batch.items()}
    if only_first and rank > 0:
        own["labels"] = torch.full_like(own["labels"], -100)
    return own


def run(name: str, make, only_first: bool = False) -> dict:
    """Two steps, with a reference pass before and after: weights that were left gathered would stay as they were."""
    rank, size = dist.get_rank(), dist.get_world_size()
    batch, coefficients = rows(), torch.tensor(COEFFICIENTS, dtype=torch.float64)
    model, plain = make(), plain_of(name)
    own = mine(batch, rank, size, only_first)
    result = {"values": 0.0, "gradients": {}}
    for _ in range(2):
        with torch.no_grad():
            reference = sequence_logps(model, **own)
        optimizer, truth = (torch.optim.SGD(m.parameters(), lr=0.02) for m in (model, plain))
        logps = sequence_logps(model, **own)
        assert torch.equal(logps, reference), "policy and reference differ"
        wanted = logits_of(plain, batch)
        (logps * coefficients[rank::size]).sum().backward()
        shares = coefficients.clone()
        if only_first:
            shares[[i for i in range(4) if i % size]] = 0
        (wanted * shares).sum().div(size).backward()  # wrappers average over the ranks
        if not only_first:
            result["values"] = max(result["values"], (logps - wanted[rank::size]).abs().max().item())
        errors = compare(gradients_of(model), gradients_of(plain))
        result["gradients"] = {k: max(x, result["gradients"].get(k, 0.0)) for k, x in errors.items()}
        for o in (optimizer, truth):
            o.step()
            o.zero_grad()
    return result


def run_loss(name: str, make) -> dict:
    """`fuse_loss`, then the wrapper: the loss and its gradients are those of transformers' own."""
    rank, size = dist.get_rank(), dist.get_world_size()
    batch = rows()
    count = (batch["labels"][:, 1:] != -100).sum()
    model = fuse_loss(llama(tied="tied" in name).train())
    model, plain = make(model), llama(tied="tied" in name).double().train()
    wanted = plain(**batch, num_items_in_batch=count).loss
    (wanted / size).backward()
    output = model(**mine(batch, rank, size, False), num_items_in_batch=count)
    assert output.logits is None
    output.loss.backward()
    total = output.loss.detach().clone()
    dist.all_reduce(total)
    errors = compare(gradients_of(model), gradients_of(plain))
    return {"values": (total - wanted).abs().item(), "gradients": errors}


def main() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=os.environ["PREFUSE_RENDEZVOUS"])
    results = {}
    for name, make in CASES.items():
        results[name] = run(name, make)
    for name in ("ddp", "fsdp"):
        results[f"{name}, one rank alone has rows"] = run(name, CASES[name], only_first=True)
    for name, wrap in LOSSES.items():
        results[f"loss {name}"] = run_loss(name, wrap)
    if rank == 0:
        Path(f"{sys.argv[1]}.json").write_text(json.dumps(results))
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()

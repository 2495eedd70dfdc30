"""Digests of what the library computes, to show that a change of the code's shape changes no bit of its numbers.

It runs everything public on small inputs of fixed seeds: the head, the KL and the losses in each implementation, the
model and Liger functions on a tiny Llama, and short training runs by the command line. Of every tensor that comes out
it prints the sha256 of dtype, shape and bytes. Run it before and after:

    python tests/lib/digests.py --out before.json
    python tests/lib/digests.py --compare before.json       # names each digest that differs, and exits 1

It goes through public names and the command line alone, so that it runs unchanged on both sides of a move of files.
Digests are comparable on one machine, with the same torch, triton and transformers. Without a GPU the Triton kernels
run in the strict interpreter.
"""

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read as triton is imported
    import strict_interpreter

    strict_interpreter.install()
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
torch.set_num_threads(1)

import prefuse  # noqa: E402
import prefuse.attention  # noqa: E402
import prefuse.liger  # noqa: E402
import prefuse.packing  # noqa: E402
import prefuse.transformers  # noqa: E402
from tiny_tokenizer import CHATML, tiny_tokenizer  # noqa: E402

IMPLS = ("torch", "triton", "reference")
LENGTHS = [7, 9, 1, 3, 5, 2, 0, 4, 8, 3]  # five pairs; a completion of one token, and one of none
N, D, V = sum(LENGTHS), 24, 300
# Gradients are made group by group only where there are more rows than the portable implementation's tile has.
TILE_ROWS, LONGER = (256, 15) if DEVICE.type == "cpu" else (2048, 120)
OUTPUTS = ("entropy", "mean_logits", "log_sum_sq_probs", "is_top1")
TRANSFORM = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3}
ALL = ("hidden", "weight", "bias")
# What needs a gradient decides the mode.
NEEDS = {"no grad": (), "frozen": ("hidden",), "lean": ALL, "weight alone": ("weight",)}
# The large one is more than a tile of the portable implementation in both directions.
SIZES = {"small": (N, D, V), "large": (300, 8, 2500), "long": (LONGER * N, 8, 40)}
LOSSES = [prefuse.DPO(), prefuse.DPO(label_smoothing=0.1), prefuse.IPO(), prefuse.IPO(average=False), prefuse.KTO()]
LOSSES += [prefuse.KTO(desirable_weight=1.3), prefuse.SFT(), prefuse.DPONorm(), prefuse.Hinge(), prefuse.RobustDPO()]
LOSSES += [prefuse.EXO(), prefuse.DiscoPOP(), prefuse.AOT(), prefuse.AOT(paired=False), prefuse.NCA(), prefuse.BCO()]
LOSSES += [prefuse.SPPO(), prefuse.APO(), prefuse.APO(anchor="down"), prefuse.SimPO(), prefuse.CPO(), prefuse.ORPO()]
LOSSES += [prefuse.SLiC(), prefuse.RPO(), prefuse.ChosenNLL()]
LOSSES += [prefuse.Mixture((prefuse.DPO(), prefuse.ChosenNLL()), (1.0, 0.3))]
FOUR = LOSSES[:7]  # DPO, IPO, KTO, SFT: those with kernels of their own, and the simplest

digests: dict[str, str] = {}


def add(name: str, **tensors) -> None:
    """Of each tensor one digest; of dicts, tuples and dataclasses one for each tensor in them; of None nothing."""
    for key, x in tensors.items():
        if isinstance(x, dict):
            add(f"{name}, {key}", **x)
        elif isinstance(x, (tuple, list)):
            add(f"{name}, {key}", **{str(i): part for i, part in enumerate(x)})
        elif x is not None:
            x = torch.as_tensor(x).detach().cpu().contiguous()
            data = x.reshape(-1).view(torch.uint8).numpy().tobytes()
            digests[f"{name}, {key}"] = hashlib.sha256(f"{x.dtype} {tuple(x.shape)} ".encode() + data).hexdigest()


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def head(size: str, dtype: torch.dtype, needs: tuple[str, ...], weight_dtype: torch.dtype | None = None):
    """Leaves hidden, weight and bias, and targets of which every seventh is ignored."""
    n, d, v = SIZES[size]
    x = {"hidden": normal(n, d, seed=1, dtype=dtype), "weight": normal(v, d, seed=2, dtype=weight_dtype or dtype)}
    x["bias"] = normal(v, seed=3, dtype=weight_dtype or dtype)
    targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    targets[3::7] = -100
    return {name: t.requires_grad_(name in needs) for name, t in x.items()}, targets


def gradients(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    return {f"gradient of {name}": t.grad for name, t in x.items()}


def dtypes(impl: str) -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16] + ([torch.float16, torch.float64] if impl == "torch" else [])


def sizes(impl: str) -> tuple[str, ...]:
    return ("small", "large") if impl == "torch" else ("small",)


# ---- heads and losses ----------------------------------------------------------------------------


def logprobs() -> None:
    for impl in IMPLS:
        for size, dtype, mode, options in itertools.product(sizes(impl), dtypes(impl), NEEDS, ("plain", "options")):
            one_logprobs(impl, size, dtype, mode, options)
        one_logprobs(impl, "small", torch.bfloat16, "lean", "options", torch.float32)


def one_logprobs(impl, size, dtype, mode, options, weight_dtype=None) -> None:
    for outputs in ((), OUTPUTS):
        x, targets = head(size, dtype, NEEDS[mode], weight_dtype)
        if options == "plain":
            x.pop("bias")
        arguments = TRANSFORM if options == "options" else {}
        made = prefuse.linear_logprobs(
            x["hidden"], x["weight"], targets, bias=x.get("bias"), outputs=outputs, impl=impl, **arguments
        )
        logps, extra = made if outputs else (made, {})
        if NEEDS[mode]:
            loss = (logps * normal(len(logps), seed=5)).sum()
            if outputs:
                loss = loss + (extra["entropy"] * normal(len(logps), seed=6)).sum()
            loss.backward()
        name = f"linear_logprobs, {impl}, {size}, {dtype}, weight {weight_dtype or dtype}, {mode}, {options}"
        add(f"{name}, {len(outputs)} outputs", logps=logps, **extra, **gradients(x))


def kl() -> None:
    for impl in IMPLS:
        for size, dtype, options in itertools.product(sizes(impl), dtypes(impl)[:2], ("plain", "options")):
            x, targets = head(size, dtype, ALL)
            n, d, v = SIZES[size]
            ref = normal(n, d + 8, seed=7, dtype=dtype), normal(v, d + 8, seed=8, dtype=dtype)
            arguments = {}
            if options == "options":
                arguments = TRANSFORM | {"bias": x["bias"], "ref_bias": normal(v, seed=9, dtype=dtype)}
                arguments |= {"mask": targets != -100, "ref_options": {"softcap": 5.0, "temperature": 0.9}}
            value = prefuse.linear_kl(x["hidden"], x["weight"], *ref, impl=impl, **arguments)
            (value * normal(n, seed=5)).sum().backward()
            add(f"linear_kl, {impl}, {size}, {dtype}, {options}", value=value, **gradients(x))


def label(loss) -> str:
    """Its repr, without the options of KTO that came after the first digests and are off here."""
    return repr(loss).replace(", reference_point=None, value='logistic', reference_free=False", "")


def loss_arguments(loss, longer: int = 1) -> dict[str, dict]:
    """Its arguments after the log-probabilities: references, labels and reference points in the forms it takes."""
    lengths = torch.tensor(LENGTHS, device=DEVICE) * longer
    n, cu_seqlens = longer * N, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    always = {"loss": loss, "cu_seqlens": cu_seqlens, "ref_logps": None}
    if not loss.uses_reference:
        return {"no reference": always}
    always["ref_logps"] = normal(n, seed=10) - 5
    if isinstance(loss, prefuse.KTO):
        always["labels"] = torch.arange(len(lengths), device=DEVICE) % 3 > 0
        mismatched = prefuse.Mismatched(normal(n, seed=11) - 4, normal(n, seed=12) - 5, cu_seqlens)
        return {"z0 a number": always | {"z0": 0.2}, "z0 of mismatched": always | {"z0": mismatched}}
    per_sequence = always | {"ref_logps": normal(len(lengths), seed=13, dtype=torch.float64) * 3 - 20}
    return {"per token": always, "per sequence": per_sequence, "counted": always | {"num_items": 11}}


def fields(out: prefuse.PreferenceOutput) -> dict:
    return {name: getattr(out, name) for name in ("loss", "losses", "logps", "rewards", "metrics")}


def losses() -> None:
    known = {name for name in prefuse.__all__ if callable(getattr(getattr(prefuse, name), "losses", None))}
    assert {type(loss).__name__ for loss in LOSSES} <= known, "each loss that has digests is exported"
    for impl, loss in itertools.product(IMPLS, LOSSES):
        if impl != "torch" and loss not in FOUR:
            continue
        for case, arguments in loss_arguments(loss).items():
            logps = (normal(N, seed=14) - 5).requires_grad_()
            out = prefuse.preference_loss(logps, impl=impl, **arguments)
            out.loss.backward()
            add(f"preference_loss, {impl}, {label(loss)}, {case}", **fields(out), **gradients({"logps": logps}))
            if case == "per token":
                add(f"reduce_metrics, {impl}, {label(loss)}", **prefuse.reduce_metrics(out.metrics))
            if case == "z0 of mismatched":
                add(f"kto_reference_point, {impl}, {label(loss)}", z0=prefuse.kto_reference_point(*arguments["z0"]))


def linear_losses() -> None:
    """From hidden states: nothing kept for the backward, room for some pairs at a time, room for all."""
    for impl, dtype, loss in itertools.product(IMPLS, (torch.float32, torch.bfloat16), LOSSES):
        if loss not in FOUR and (impl, dtype) != ("torch", torch.float32):
            continue
        _, d, v = SIZES["long"]
        groups = TILE_ROWS * v * 4 + 4 * v * d  # a tile of rows, and a float32 gradient of the weight
        for mode, size, workspace in ("lean", "small", 0), ("groups", "long", groups), ("stash", "small", 1 << 30):
            x, targets = head(size, dtype, ALL)
            case, arguments = list(loss_arguments(loss, len(targets) // N).items())[-1]
            out = prefuse.linear_preference_loss(
                x["hidden"],
                x["weight"],
                targets,
                **arguments,
                bias=x["bias"],
                impl=impl,
                workspace=workspace,
                **TRANSFORM,
            )
            out.loss.backward()
            add(
                f"linear_preference_loss, {impl}, {dtype}, {label(loss)}, {case}, {mode}", **fields(out), **gradients(x)
            )


# ---- models --------------------------------------------------------------------------------------


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": V, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1)).to(DEVICE)


def models() -> None:
    ids = torch.randint(V, (4, 15), generator=torch.Generator().manual_seed(0))
    flat = ids.flatten().tolist()
    packed = prefuse.packing.pack(
        [(flat[:9], [flat[9:15], flat[15:17]]), (flat[20:23], [flat[23:30], flat[30:31]])]
    ).to(DEVICE)
    mask = (torch.arange(15) < torch.tensor([15, 9, 12, 4])[:, None]).long()
    labels = torch.where((torch.arange(15) >= 3) & mask.bool(), ids, -100)
    padded = {"input_ids": ids.to(DEVICE), "labels": labels.to(DEVICE), "attention_mask": mask.to(DEVICE)}

    def run(name, function):
        model = tiny_llama()
        value = function(model)
        (value * torch.linspace(-1, 1, value.numel(), device=DEVICE).view_as(value)).sum().backward()
        add(name, value=value, **gradients(dict(model.named_parameters())))

    run("packed_hidden", lambda model: prefuse.attention.packed_hidden(model, packed))
    logps = prefuse.transformers.sequence_logps
    for impl, how in itertools.product(("torch", "triton"), ("sum", "mean", "none")):
        run(f"sequence_logps, {impl}, {how}", partial(logps, **padded, reduction=how, impl=impl))
        run(f"sequence_logps, {impl}, packed", partial(logps, input_ids=packed, temperature=1.3, impl=impl))


def liger() -> None:
    b, t = 4, 9
    targets = torch.randint(V, (b, t), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    targets[0, 4:] = targets[2, :3] = -100
    for nll, ref in itertools.product((False, True), ("states", "log-probabilities")):
        x = {"hidden": normal(b, t, D, seed=1), "weight": normal(V, D, seed=2), "bias": normal(V, seed=3)}
        x = {name: tensor.requires_grad_() for name, tensor in x.items()}
        reference = {"ref_logps": normal(b, seed=6) - 20}
        if ref == "states":
            reference = {"ref_input": normal(b, t, D, seed=7), "ref_weight": normal(V, D, seed=8)}
        module = prefuse.liger.LigerFusedLinearDPOLoss(compute_nll_loss=nll)
        loss, aux = module(x["weight"], x["hidden"], targets, x["bias"], **reference)
        loss.backward()
        add(f"LigerFusedLinearDPOLoss, nll {nll}, reference by {ref}", loss=loss, aux=aux, **gradients(x))


# ---- training runs -------------------------------------------------------------------------------

PAIRS = [
    {"prompt": f"what {'colour ' * (i % 4)}is it?", "chosen": "it is " + "blue " * (i % 3), "rejected": f"no {i}"}
    for i in range(20)
]
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
    for i, pair in enumerate(PAIRS)
]
SETTINGS = "--device cpu --impl torch --max_length 64 --learning_rate 1e-2 --eval_fraction 0 --max_steps 5"
SETTINGS += " --per_device_train_batch_size 4 --save_steps 0 --logging_steps 1"
RUNS = {
    "dpo": ("train", "pairs", ""),
    "dpo, triton": ("train", "pairs", "--impl triton"),
    "dpo, padded": ("train", "pairs", "--padding_free False"),
    "kto": ("train", "labelled", "--loss_type kto"),
    "sft": ("sft", "pairs", ""),
    "dpo, lora": ("train", "pairs", "--use_peft --lora_r 4"),
    "dpo, 2 ranks": ("train", "pairs", "--nproc 2 --per_device_train_batch_size 2"),
}


def engine() -> None:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tiny_llama().save_pretrained(folder / "model")
        tiny_tokenizer(chat_template=CHATML).save_pretrained(folder / "model")
        for name, rows in {"pairs": PAIRS, "labelled": LABELLED}.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for name, (command, rows, more) in RUNS.items():
            words = f"{command} --model_name_or_path model --dataset_name {rows}.jsonl {SETTINGS} {more}".split()
            call = [sys.executable, "-m", "prefuse.engine", *words, "--output_dir", name]
            done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(call)} failed:\n{done.stdout}{done.stderr}")
            for file in sorted((folder / name).glob("*.safetensors")):
                add(f"run, {name}", **load_file(file))


# ---- the command ---------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write the digests to")
    parser.add_argument("--compare", type=Path, help="JSON file of another run")
    parser.add_argument("--skip-engine", action="store_true", help="leave the training runs out")
    arguments = parser.parse_args()
    before = json.loads(arguments.compare.read_text()) if arguments.compare else None
    for part in (logprobs, kl, losses, linear_losses, models, liger, *(() if arguments.skip_engine else (engine,))):
        part()
    print("\n".join(f"{digest[:16]}  {name}" for name, digest in digests.items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(digests, indent=1) + "\n")
    if before is None:
        return 0
    if arguments.skip_engine:
        before = {name: digest for name, digest in before.items() if not name.startswith("run, ")}
    wrong = [name for name in before | digests if before.get(name) != digests.get(name)]
    print("\n".join(f"differs: {name}" for name in wrong) or f"all {len(digests)} digests are the same")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

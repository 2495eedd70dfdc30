"""Reference log-probabilities: computed once, before training, while the reference is at hand; kept per token.

On disk they are keyed by what they depend on and by nothing else: the reference's weights and config, the dtype it
computes in, and the tokens, in which the chat template shows, and for KTO the seed and epoch of its mismatches. So runs
with other learning rates, losses, batches or folders share them, and a LoRA run shares them with one of all weights.

What the key cannot know (another version of a library, another kernel) is looked for when they are read: one batch is
computed again. Where the two differ by more than rounding, or a file is damaged or missing, all is computed again, and
said. The ranks write and read a part each, whatever their number; where nothing can be written the run goes on.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prefuse.engine.data.batches import Examples, collate
from prefuse.engine.errors import OtherRankFailed, UserError
from prefuse.engine.model.adapters import state_in_force
from prefuse.engine.model.forward import LanguageModel, token_logps
from prefuse.engine.run.files import aside_of, clear_dead, file_faults_as_oserror, publish, sha256_of
from prefuse.engine.run.ranks import ALONE, Ranks, whole

logger = logging.getLogger(__name__)

CACHE_FORMAT = 2  # to be raised when the same key would mean other numbers


def reference_logps(
    lm: LanguageModel,
    examples: Examples,
    batches: Iterable[Sequence[int]],
    cache: str | None = None,
    ranks: Ranks = ALONE,
) -> list[Tensor]:  # (E,) of (completion tokens of the example,) float32, on the CPU
    """The log-probability of each completion token of each example.

    Give the batches that the policy will meet them in: a trunk's last bits depend on what shares a batch, and with the
    same batches a policy equal to its reference has log-ratios of exactly 0. With several ranks each gives its own
    batches and gets the numbers of all.
    """
    batches = list(batches)
    if cache is None:
        return _compute(lm, examples, batches, ranks)
    key = cache_key(lm, examples)
    entry = Path(cache) / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    stored, fault = _read(entry, key, examples, ranks)
    if stored is not None:
        fault = _fault_of_one_batch(lm, examples, batches, stored, entry.name, ranks)
    if stored is not None and fault is None:
        logger.info("reference log-probabilities of %d examples read from %s", len(examples), entry)
        return stored
    if fault is not None:
        logger.warning("the reference cache %s %s: computing it again", entry, fault)
    logps = _compute(lm, examples, batches, ranks)
    try:
        _write(entry, key, logps, ranks)
    except (OSError, UserError) as error:  # they are here all the same, and took long
        if not isinstance(error, OtherRankFailed):
            logger.warning("the reference cache %s could not be written (%s): the run goes on without", entry, error)
    return logps


def cache_key(lm: LanguageModel, examples: Examples) -> dict[str, str | int]:
    """All that the numbers depend on, and nothing else."""
    settings = {
        k: v for k, v in lm.model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")
    }
    return {
        "format": CACHE_FORMAT,
        "weights": _weights_hash(lm.model),
        "model": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest(),
        "tokens": examples.fingerprint(),
        "dtype": str(lm.compute_dtype),
    }


def _compute(
    lm: LanguageModel, examples: Examples, batches: Sequence[Sequence[int]], ranks: Ranks = ALONE
) -> list[Tensor]:
    logps: list[Tensor | None] = [None] * len(examples)
    for indices, counts_here in ranks.in_step(batches, [0]):
        values = _logps_of(lm, examples, indices)
        if counts_here:
            for index, own in zip(indices, values, strict=True):
                logps[index] = own.clone()  # not a view that keeps the whole batch alive
    return _for_all(logps, examples, ranks)


def _logps_of(lm: LanguageModel, examples: Examples, indices: Sequence[int]) -> Sequence[Tensor]:
    packed = token_logps(lm, collate(examples, indices).to(lm.device)).float().cpu()
    return packed.split([_count(examples, i) for i in indices])


def _count(examples: Examples, index: int) -> int:
    return sum(len(completion) for _, completion in examples.sequences[index])


def _for_all(logps: list[Tensor | None], examples: Examples, ranks: Ranks) -> list[Tensor]:
    """Each example's numbers from the one rank that has them."""
    if ranks.size == 1:
        return logps
    counts = [_count(examples, i) for i in range(len(examples))]
    mine = [torch.zeros(count) if x is None else x for x, count in zip(logps, counts, strict=True)]
    return list(ranks.sum_(torch.cat(mine)).split(counts))


def _weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state_in_force(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(whole(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------
# On disk: a folder with a shard for each rank that wrote, and about.json, written last, with their hashes


def _shard(number: int, count: int) -> str:
    return f"logps-{number + 1:05}-of-{count:05}.safetensors"


def _write(entry: Path, key: dict, logps: list[Tensor], ranks: Ranks) -> None:
    """Every rank writes as many of the numbers; the folder appears when all have."""
    from safetensors.torch import save_file

    def begin() -> str:
        folder = aside_of(entry)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        clear_dead(entry.parent)
        return str(folder)

    aside = Path(ranks.from_main(begin))
    name = _shard(ranks.rank, ranks.size)

    def write() -> str:
        with file_faults_as_oserror():
            save_file({"logps": torch.cat(logps).tensor_split(ranks.size)[ranks.rank].clone()}, aside / name)
        return sha256_of(aside / name)

    try:
        hashes = ranks.texts(ranks.together(write))

        def finish() -> None:
            shards = {_shard(rank, ranks.size): value for rank, value in enumerate(hashes)}
            for shard in shards:
                if not (aside / shard).exists():
                    raise UserError(f"{shard} was written by another rank and is not here: expected a shared folder")
            (aside / "about.json").write_text(json.dumps({"key": key, "shards": shards}, indent=1))
            publish(aside, entry)

        ranks.from_main(finish)
    finally:
        if ranks.main:
            shutil.rmtree(aside, ignore_errors=True)


def _read(entry: Path, key: dict, examples: Examples, ranks: Ranks) -> tuple[list[Tensor] | None, str | None]:
    """The numbers, or None and what is wrong with them, if there are any. Each rank reads and checks its share of the
    shards, of which there may be more or fewer than ranks."""
    if ranks.any(not entry.exists()):
        return None, None
    counts = [_count(examples, i) for i in range(len(examples))]
    sizes, fault = [], ""
    try:
        about = json.loads((entry / "about.json").read_text())
        shards = about["shards"]
        sizes = [len(part) for part in torch.empty(sum(counts), device="meta").tensor_split(len(shards))]
        fault = "is not what its key says" if about["key"] != key else ""
        own = torch.zeros(sum(counts))
        for part, name, size in list(zip(own.split(sizes), shards, sizes, strict=True))[ranks.rank :: ranks.size]:
            part.copy_(_read_shard(entry / name, shards[name], size))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        fault = f"is damaged ({error})"
    said = ranks.texts(fault) if ranks.size > 1 else [fault]
    if any(said):
        return None, next(text for text in said if text)
    return list(ranks.sum_(own).split(counts)), None


def _read_shard(path: Path, expected: str, size: int) -> Tensor:
    from safetensors.torch import load

    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(f"{path.name} does not have the hash that was written down")
    logps = load(data)["logps"]
    if logps.shape != (size,):
        raise ValueError(f"{path.name} has {tuple(logps.shape)} numbers, expected {size}")
    return logps


def _fault_of_one_batch(
    lm: LanguageModel, examples: Examples, batches: Sequence[Sequence[int]], stored: list[Tensor], name: str,
    ranks: Ranks,
) -> str | None:  # fmt: skip
    """What is wrong with the numbers as far as one batch of each rank shows, the same one every time."""
    chosen = [batches[int(name, 16) % len(batches)]] if batches else []
    worst = torch.zeros(ranks.size)
    for indices, counts_here in ranks.in_step(chosen, [0]):
        got, wanted = (torch.cat(list(x)) for x in ([stored[i] for i in indices], _logps_of(lm, examples, indices)))
        # They may come from other batches: a trunk's last bits depend on what shares a batch.
        bound = max(1e-4, 16 * torch.finfo(lm.compute_dtype).eps) * wanted.abs().clamp(min=1.0)
        if counts_here:
            worst[ranks.rank] = ((got - wanted).abs() / bound).nan_to_num(torch.inf).max()
    worst = ranks.sum_(worst).max().item()
    if worst <= 1:
        return None
    return f"differs from what the reference says now, by {worst:.3g} times what rounding explains"

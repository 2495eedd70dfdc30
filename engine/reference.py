"""Reference log-probabilities: computed once, before training, while the reference is at hand; kept per token.

On disk they are keyed by everything they depend on (weights, model config, tokens, precision, implementation), so a
changed model or data set finds nothing and the same ones find the same numbers. KTO's mismatches are tokens like any
others. An entry that fails its checksum is recomputed.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prefuse.engine.batches import Examples, collate
from prefuse.engine.files import published_folder, sha256_of
from prefuse.engine.forward import LanguageModel, token_logps
from prefuse.engine.parallel import ALONE, Ranks, whole

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1  # to be raised when the same key would mean other numbers


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
    batches and gets the numbers of all; the main one reads and writes the cache.
    """
    if cache is None:
        return _compute(lm, examples, batches, ranks)
    key = cache_key(lm, examples)
    entry = Path(cache) / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    stored = _read(entry, key) if ranks.main else None
    if ranks.any(stored is not None):
        logger.info("reference log-probabilities of %d examples read from %s", len(examples), entry)
        return _for_all(stored or [None] * len(examples), examples, ranks)
    logps = _compute(lm, examples, batches, ranks)
    ranks.from_main(lambda: _write(entry, key, logps))
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
        "impl": lm.impl,
        "padding_free": examples.padding_free,
    }


def _compute(
    lm: LanguageModel, examples: Examples, batches: Iterable[Sequence[int]], ranks: Ranks = ALONE
) -> list[Tensor]:
    logps: list[Tensor | None] = [None] * len(examples)
    for indices, counts_here in ranks.in_step(list(batches), [0]):
        packed = token_logps(lm, collate(examples, indices).to(lm.device)).float().cpu()
        counts = [_count(examples, i) for i in indices]
        for index, values in zip(indices, packed.split(counts), strict=True):
            if counts_here:
                logps[index] = values.clone()  # not a view that keeps the whole batch alive
    return _for_all(logps, examples, ranks)


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
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(whole(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(entry: Path, key: dict, logps: list[Tensor]) -> None:
    from safetensors.torch import save_file

    with published_folder(entry) as folder:
        tensors = {"logps": torch.cat(logps), "counts": torch.tensor([len(values) for values in logps])}
        save_file(tensors, folder / "logps.safetensors")
        about = {"key": key, "sha256": sha256_of(folder / "logps.safetensors")}
        (folder / "about.json").write_text(json.dumps(about, indent=1))


def _read(entry: Path, key: dict) -> list[Tensor] | None:
    from safetensors.torch import load_file

    if not entry.exists():
        return None
    try:
        about = json.loads((entry / "about.json").read_text())
        whole = about["key"] == key and about["sha256"] == sha256_of(entry / "logps.safetensors")
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        logger.warning("the reference cache %s is damaged: computing it again", entry)
        return None
    tensors = load_file(entry / "logps.safetensors")
    return list(tensors["logps"].split(tensors["counts"].tolist()))

"""Reference log-probabilities: computed once, before training, while the reference is at hand; kept per token.

On disk their key is what they depend on, and nothing else: the reference's weights and config, the dtype it computes
in, and the tokens of the rows. (The chat template, and for KTO the draw of mismatches, change the tokens.) So runs with
other learning rates, losses, batches or folders share them, and a LoRA run shares them with a run of all weights.

What the key cannot know (another version of a library, another kernel) is looked for when they are read: one batch is
computed again. Where the two differ by more than rounding, or a file is damaged or missing, all is computed again, and
said. The ranks write and read a part each, whatever their number; where nothing can be written the run goes on.

The reference is asked about the rows that a run comes to. An entry says which rows it has; a longer run adds to it, and
what stood in it stays as it was, to the last bit.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prefuse.engine.data.batches import Examples, collate
from prefuse.engine.data.ragged import ranges
from prefuse.engine.errors import OtherRankFailed, UserError
from prefuse.engine.model.adapters import state_in_force
from prefuse.engine.model.forward import LanguageModel, completion_logps
from prefuse.engine.report.clock import clock
from prefuse.engine.report.log import progress
from prefuse.engine.run.files import aside_of, clear_dead, file_faults_as_oserror, publish, sha256_of
from prefuse.engine.run.ranks import ALONE, Ranks, whole

logger = logging.getLogger(__name__)

KNOWN = "known.safetensors"  # which rows an entry has the numbers of, where it has not all
CACHE_FORMAT = 2  # to be raised when the same key would mean other numbers


class Logps(Sequence):
    """The log-probabilities of each example's completion tokens, end to end, as far as they are known."""

    def __init__(self, counts: np.ndarray):  # (E,) completion tokens of each example
        self.counts = counts
        self.starts = np.cumsum(counts) - counts
        self.values = torch.zeros(int(counts.sum()))  # (N,) float32, on the CPU
        self.known = np.zeros(len(counts), bool)  # (E,)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> Tensor:  # (completion tokens of the example,)
        assert self.known[index], f"the reference was not asked about example {index}"
        return self.values[self.starts[index] : self.starts[index] + self.counts[index]]

    def __setitem__(self, index: int, logps: Tensor) -> None:
        self.values[self.starts[index] : self.starts[index] + self.counts[index]] = logps
        self.known[index] = True

    def places(self, rows: np.ndarray) -> Tensor:  # (E,) bool -> (tokens of these rows,)
        """Where in `values` the numbers of some rows are."""
        return torch.from_numpy(ranges(self.starts[rows], self.counts[rows]))

    def all_of(self, indices: Sequence[int]) -> bool:
        return bool(self.known[indices].all())


@clock.part("reference")
def reference_logps(
    lm: LanguageModel,
    examples: Examples,
    batches: Iterable[Sequence[int]],
    cache: str | None = None,
    ranks: Ranks = ALONE,
) -> Logps:
    """The log-probability of each completion token of each example in `batches`.

    Give the batches that the policy will meet them in: a trunk's last bits depend on what shares a batch, and with the
    same batches a policy equal to its reference has log-ratios of exactly 0. With several ranks each gives its own
    batches and gets the numbers of all.
    """
    batches, logps = list(batches), Logps(examples.counts)
    if cache is None:
        _compute(lm, examples, batches, logps, ranks)
        return logps
    key = cache_key(lm, examples)
    entry = Path(cache) / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    stored, fault = _read(entry, key, examples, ranks)
    if stored is not None:
        fault = _fault_of_one_batch(lm, examples, batches, stored, entry.name, ranks)
    if stored is not None and fault is None:
        logps = stored
        logger.info("reference log-probabilities of %d examples read from %s", logps.known.sum(), entry)
    if fault is not None:
        logger.warning("the reference cache %s %s: computing it again", entry, fault)
    missing = [indices for indices in batches if not logps.all_of(indices)]
    if not ranks.any(bool(missing)):
        return logps
    _compute(lm, examples, missing, logps, ranks)
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
    lm: LanguageModel, examples: Examples, batches: Sequence[Sequence[int]], logps: Logps, ranks: Ranks = ALONE
) -> None:
    """Into `logps` what it does not know. Numbers that it has stay, to the last bit."""
    before = logps.known.copy()
    for indices, counts_here in progress(ranks.in_step(batches, [0]), "reference", len(batches)):
        values = _logps_of(lm, examples, indices)
        for index, own in zip(indices, values, strict=True):
            if counts_here and not before[index]:
                logps[index] = own
    if ranks.size > 1:  # each example's numbers come from the one rank that has them
        new = ranks.sum_(torch.from_numpy(logps.known & ~before).int()).numpy() > 0
        places = logps.places(new)
        logps.values[places] = ranks.sum_(logps.values[places])
        logps.known |= new


def _logps_of(lm: LanguageModel, examples: Examples, indices: Sequence[int]) -> Sequence[Tensor]:
    packed = completion_logps(lm, collate(examples, indices).to(lm.device)).float().cpu()
    return packed.split(examples.counts[indices].tolist())


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


def _write(entry: Path, key: dict, logps: Logps, ranks: Ranks) -> None:
    """Every rank writes an equal part of the known numbers; the folder appears when all ranks have written."""
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
            own = logps.values[logps.places(logps.known)].tensor_split(ranks.size)[ranks.rank]
            save_file({"logps": own.clone()}, aside / name)
        return sha256_of(aside / name)

    try:
        hashes = ranks.texts(ranks.together(write))

        def finish() -> None:
            shards = {_shard(rank, ranks.size): value for rank, value in enumerate(hashes)}
            for shard in shards:
                if not (aside / shard).exists():
                    raise UserError(f"{shard} was written by another rank and is not here: expected a shared folder")
            about = {"key": key, "shards": shards}
            if not logps.known.all():  # of a run that did not come to all rows; a longer one adds to it
                with file_faults_as_oserror():
                    save_file({"known": torch.from_numpy(logps.known)}, aside / KNOWN)
                about["known"] = sha256_of(aside / KNOWN)
            (aside / "about.json").write_text(json.dumps(about, indent=1))
            publish(aside, entry)

        ranks.from_main(finish)
    finally:
        if ranks.main:
            shutil.rmtree(aside, ignore_errors=True)


def _read(entry: Path, key: dict, examples: Examples, ranks: Ranks) -> tuple[Logps | None, str | None]:
    """The numbers, or None and what is wrong with them, if there are any. Each rank reads and checks its share of the
    shards, of which there may be more or fewer than ranks."""
    if ranks.any(not entry.exists()):
        return None, None
    logps, fault = Logps(examples.counts), ""
    try:
        about = json.loads((entry / "about.json").read_text())
        fault = "is not what its key says" if about["key"] != key else ""
        logps.known[:] = True
        if "known" in about:
            logps.known = _read_tensor(entry / KNOWN, about["known"], "known", len(logps)).numpy().copy()
        shards, places = about["shards"], logps.places(logps.known)
        sizes = [len(part) for part in torch.empty(len(places), device="meta").tensor_split(len(shards))]
        for part, name, size in list(zip(places.split(sizes), shards, sizes, strict=True))[ranks.rank :: ranks.size]:
            logps.values[part] = _read_tensor(entry / name, shards[name], "logps", size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        fault = f"is damaged ({error})"
    said = ranks.texts(fault) if ranks.size > 1 else [fault]
    if any(said):
        return None, next(text for text in said if text)
    ranks.sum_(logps.values)
    return logps, None


def _read_tensor(path: Path, expected: str, name: str, size: int) -> Tensor:  # (size,)
    from safetensors.torch import load

    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(f"{path.name} does not have the hash that was written down")
    values = load(data)[name]
    if values.shape != (size,):
        raise ValueError(f"{path.name} has {tuple(values.shape)} numbers, expected {size}")
    return values


def _fault_of_one_batch(
    lm: LanguageModel, examples: Examples, batches: Sequence[Sequence[int]], stored: Logps, name: str, ranks: Ranks,
) -> str | None:  # fmt: skip
    """What is wrong with the numbers as far as one batch of each rank shows, the same one every time."""
    known = [indices for indices in batches if stored.all_of(indices)]
    chosen = [known[int(name, 16) % len(known)]] if known else []
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

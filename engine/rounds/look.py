"""One look at a policy: what it answers to fixed prompts, how that is scored, how far it has moved.

`prefuse eval --checkpoints` looks at every checkpoint of a run so; `prefuse train` and `sft` with --scorer at every
evaluation, so that a reward, the KL or a sign of trouble can choose the best checkpoint and end the run:

    prefuse train ... --scorer reward --gold_scorer rules.py:truth --metric_for_best_model gold_score

Always the same prompts from the same seed, so the numbers of two evaluations differ by the weights alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import collate, examples_of
from prefuse.engine.data.dataset import columns_of_rows, read_prompts
from prefuse.engine.data.examples import Prompt
from prefuse.engine.data.plain import plain_blocks
from prefuse.engine.data.table import Demonstration, Examples
from prefuse.engine.errors import UserError
from prefuse.engine.model.divergence import kl_of_states, over_common_vocabulary
from prefuse.engine.model.forward import LanguageModel, completion_logps, completion_states
from prefuse.engine.model.limits import check_prompts
from prefuse.engine.model.load import device_of, load_model, without_padding
from prefuse.engine.model.sampling import Answer, sample_for
from prefuse.engine.report.log import say
from prefuse.engine.run.held_out import HeldOut, evaluation_batches
from prefuse.engine.run.plan import TrainingSet
from prefuse.engine.run.ranks import Ranks
from prefuse.engine.run.setup import FileRows
from prefuse.engine.score.contract import Scorer, say_reasons
from prefuse.engine.score.scorers import scorer_of
from prefuse.engine.score.signs import signs_of
from prefuse.engine.score.winrate import lengths


def look(
    lm: LanguageModel, ref: LanguageModel, tokenizer, prompts: Sequence[Prompt], columns: dict[str, list],
    scorer: Scorer, gold: Scorer | None, blocks: list[Demonstration] | None, config: Config,
) -> dict[str, float]:  # fmt: skip
    """All numbers of one checkpoint."""
    size = config.num_generations
    check_prompts(lm, [prompt.ids for prompt in prompts], [prompt.row for prompt in prompts], config.max_new_tokens)
    ids = [prompt.ids for prompt in prompts for _ in range(size)]
    said = sample_for(config, lm, tokenizer, ids)
    answers = [[a.text for a in said[i : i + size]] for i in range(0, len(said), size)]
    raw = [prompt.raw for prompt in prompts]
    metrics = {}
    for name, one in ("score", scorer), ("gold_score", gold):
        if one is not None:
            scores = one.score(raw, answers, columns)
            rows = [prompt.row for prompt, reasons in zip(prompts, scores.reasons, strict=True) for _ in reasons]
            say_reasons(one.name, [reason for reasons in scores.reasons for reason in reasons], rows)
            metrics[name] = float(scores.values.nanmean())
    metrics |= divergence(lm, ref, ids, said, config)
    metrics |= {"length": lengths(answers), "cut_answers": sum(not a.stopped for a in said) / len(said)}
    metrics |= signs_of(answers)
    if blocks is not None:
        metrics["perplexity"] = perplexity(lm, blocks, config)
    return metrics


@torch.no_grad()
def divergence(
    lm: LanguageModel, ref: LanguageModel, prompts: list[list[int]], answers: list[Answer], config: Config
) -> dict[str, float]:
    """KL(policy || reference) of whole answers: at each token the exact KL over the vocabulary, summed over the answer
    and averaged over answers. Its expectation is the KL of the two distributions over answers."""
    if lm is ref:
        return {"kl": 0.0, "kl_per_token": 0.0, "sqrt_kl": 0.0}
    lm, ref = over_common_vocabulary(lm, ref, config)
    rows = [Demonstration(ids, a.ids, f"answer {i}") for i, (ids, a) in enumerate(zip(prompts, answers, strict=True))]
    examples = without_padding(examples_of(rows), (lm, ref), config)
    total = torch.zeros(2, dtype=torch.float64)
    for indices in evaluation_batches(examples, config):
        batch = collate(examples, indices).to(lm.device)
        hidden, ref_hidden = completion_states(lm, batch), completion_states(ref, batch)
        everywhere = torch.ones(len(hidden), dtype=torch.bool, device=lm.device)
        total += kl_of_states(lm, hidden, ref, ref_hidden, everywhere).cpu()
    kl = max(0.0, float(total[0])) / len(answers)
    return {"kl": kl, "kl_per_token": float(total[0] / total[1]), "sqrt_kl": math.sqrt(kl)}


@torch.no_grad()
def perplexity(lm: LanguageModel, blocks: list[Demonstration], config: Config) -> float:
    """exp of the mean of -log p over the tokens of plain text."""
    examples = without_padding(examples_of(blocks), (lm,), config)
    total, count = 0.0, 0
    for indices in evaluation_batches(examples, config):
        logps = completion_logps(lm, collate(examples, indices).to(lm.device))
        total, count = total - float(logps.double().sum()), count + len(logps)
    return math.exp(min(total / count, 700.0))


# ---- while training ------------------------------------------------------------------------------


class ScoredRows(FileRows):
    """What `sft` and `train` learn from with a scorer: rows of files, and held-out prompts to answer."""

    def read(self, config: Config, *rest: Any) -> tuple[object, Examples, Examples | None]:
        tokenizer, examples, held = super().read(config, *rest)
        if held is None:
            raise UserError("a scorer looks at held-out prompts: give eval_dataset, or eval_fraction above 0")
        self.tokenizer, self.scorers = tokenizer, scorers_of(config)
        needed = columns_needed(self.scorers, config)
        self.prompts = read_prompts(config, tokenizer, needed)
        self.columns = columns_of_rows(config, self.prompts, needed)
        text = config.text_dataset
        self.blocks = None if text is None else plain_blocks(text, tokenizer, config.max_length)
        say(f"{len(self.prompts)} held-out prompts are answered at every evaluation, scored by {self.scorers[0].name}")
        return tokenizer, examples, held

    def plan(
        self, lm: LanguageModel, examples: Examples, held: Examples | None, loss: Any, config: Config, ranks: Ranks,
        *rest: Any,
    ) -> tuple[TrainingSet, HeldOut | None]:  # fmt: skip
        if ranks.sharded:
            raise UserError(
                "a scorer while training needs whole weights: drop it and look at the checkpoints afterwards (prefuse "
                "eval --checkpoints), or give --parallel ddp"
            )
        data, held_out = super().plan(lm, examples, held, loss, config, ranks, *rest)

        def look_at(policy: LanguageModel, ranks: Ranks) -> dict[str, float]:
            return ranks.from_main(lambda: self.look(policy, config))

        return data, dataclasses.replace(held_out, look=look_at)

    def look(self, lm: LanguageModel, config: Config) -> dict[str, float]:
        """By the main rank alone. The reference is read again each time: between evaluations it takes no memory."""
        path = config.ref_model_name_or_path or config.model_name_or_path
        temperature = 1.0 if config.temperature is None else config.temperature
        config = dataclasses.replace(config, ref_model_name_or_path=path, temperature=temperature)
        ref = load_model(path, dataclasses.replace(config, use_peft=False), lm.device)
        return look(lm, ref, self.tokenizer, self.prompts, self.columns, *self.scorers, self.blocks, config)


def scorers_of(config: Config) -> tuple[Scorer, Scorer | None]:
    """scorer and gold_scorer, each of which scores one answer alone."""
    device = device_of(config)
    scorer = scorer_of(config.scorer, config, device)
    gold = scorer_of(config.gold_scorer, config, device) if config.gold_scorer else None
    for one in (scorer, gold):
        if hasattr(one, "compare"):
            raise UserError(f"{one.name} compares: give a scorer that scores one answer alone")
    return scorer, gold


def columns_needed(scorers: tuple[Scorer, Scorer | None], config: Config) -> list[str]:
    named = [name for one in scorers if one is not None for name in one.columns]
    return list(dict.fromkeys([*named, *(config.scorer_columns or ())]))

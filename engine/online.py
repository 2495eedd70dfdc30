"""Online training: prompts -> samples -> scores -> batches -> the step of `prefuse train`, round by round.

    prefuse online --algorithm grpo --model_name_or_path sft --dataset_name p.jsonl --scorer r.py:rule --output_dir run

A round samples num_generations answers to each of its prompts, scores them, and is learned from in steps_per_generation
x num_iterations optimizer steps: the same steps, checkpoints, guards and ranks as those of `prefuse train`. Each rank
samples and learns its own prompts. Log-probabilities of samples are computed by the head that trains, so the first
ratio is 1. Samples and scores stand in the run folder before the first update; a resumed run goes on with them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prefuse
from prefuse.engine.config.online import OVER_TOKENS, PAIRED
from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import Batch, Examples, collate, examples_of
from prefuse.engine.data.dataset import columns_of_rows, read_training_prompts
from prefuse.engine.data.examples import Prompt
from prefuse.engine.data.fit import character_parts
from prefuse.engine.data.order import generator
from prefuse.engine.data.table import Demonstration
from prefuse.engine.errors import UserError
from prefuse.engine.model.adapters import adapters_off
from prefuse.engine.model.forward import LanguageModel, completion_logps, token_values
from prefuse.engine.model.limits import check_prompts
from prefuse.engine.model.load import device_of, load_tokenizer, without_padding
from prefuse.engine.report.clock import clock
from prefuse.engine.report.log import say
from prefuse.engine.rounds.guards import OnlineGuards
from prefuse.engine.rounds.handover import Handover, source_of_policy
from prefuse.engine.rounds.held import HeldPrompts
from prefuse.engine.rounds.learn import (
    Material,
    answers_of,
    batch_of,
    material_of,
    parts_of,
    spare_of,
    summary_of,
    with_mismatches,
)
from prefuse.engine.rounds.reference import reference_of
from prefuse.engine.rounds.sampler import Sampler, seed_of, texts_of
from prefuse.engine.rounds.samples import Round, forget_tensors, load_round, save_round
from prefuse.engine.rounds.served import logps_of_sampler, served_summary
from prefuse.engine.rounds.values import ValueHead
from prefuse.engine.run.folder import RunFolder
from prefuse.engine.run.plan import Share
from prefuse.engine.run.proof import checkpoints
from prefuse.engine.run.ranks import Ranks
from prefuse.engine.run.setup import FileRows
from prefuse.losses.contract import Loss
from prefuse.preference import means_of


class PromptRows(FileRows):
    """What `prefuse online` learns from: prompts, and what says how good an answer is."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.held: list[Prompt] = []
        self.columns: tuple[dict[str, list[Any]], dict[str, list[Any]]] = ({}, {})
        self.scorer: Any = None
        self.gold: Any = None
        self.tokenizer: Any = None

    def loss(self, config: Config, command: str) -> Loss:
        if config.algorithm in OVER_TOKENS:
            return config.policy_loss()
        if config.algorithm in PAIRED:
            return prefuse.DPO(config.algorithm_beta())
        return prefuse.KTO(config.algorithm_beta()) if config.algorithm == "kto" else prefuse.SFT()

    def read(
        self, config: Config, loss: Loss, home: RunFolder, ranks: Ranks
    ) -> tuple[object, Examples, Examples | None]:
        from prefuse.engine.score.itself import warn_of_self_judge
        from prefuse.engine.score.scorers import scorer_of

        def read_all() -> None:
            device = device_of(config)
            self.tokenizer = load_tokenizer(config.model_name_or_path, config)
            self.scorer = scorer_of(config.scorer, config, device)
            self.gold = scorer_of(config.gold_scorer, config, device) if config.gold_scorer else None
            for one in (self.scorer, self.gold):
                warn_of_self_judge(one, config.model_name_or_path)
            asked = [*self.scorer.columns, *(self.gold.columns if self.gold is not None else ())]
            columns = tuple(dict.fromkeys(asked))
            self.prompts, self.held = read_training_prompts(config, self.tokenizer, columns)
            held_in = config.eval_dataset is None
            self.columns = (
                columns_of_rows(config, self.prompts, columns, trained=True),
                columns_of_rows(config, self.held, columns, trained=held_in),
            )

        ranks.together(read_all)
        say(f"{len(self.prompts)} prompts, {len(self.held)} held out; scored by {self.scorer.name}")
        return self.tokenizer, self._as_examples(self.prompts), self._as_examples(self.held) if self.held else None

    def _as_examples(self, prompts: Sequence[Prompt]) -> Examples:
        """Each prompt with the token that ends an answer, to be checked with and to be known by."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise UserError("the tokenizer has no EOS: give --eos_token, with which an answer is to end")
        rows = [Demonstration(prompt.ids, [end], prompt.row) for prompt in prompts]
        return examples_of(rows, self.tokenizer.bos_token_id, character_parts(self.tokenizer))

    def guards(self, config: Config, loss: Loss, examples: Examples) -> OnlineGuards:
        return OnlineGuards(config)

    def plan(
        self, lm: LanguageModel, examples: Examples, held: Examples | None, loss: Loss, config: Config, ranks: Ranks,
        home: RunFolder, guards: OnlineGuards,
    ) -> tuple["Rounds", HeldPrompts | None]:  # fmt: skip
        rows = [prompt.row for prompt in [*self.prompts, *self.held]]
        check_prompts(lm, [p.ids for p in [*self.prompts, *self.held]], rows, config.max_completion_length)
        ref = reference_of(lm, config, ranks)
        models = (lm,) if ref is None or ref is lm else (lm, ref)
        examples = without_padding(examples, models, config)
        source, handover = source_of_policy(config, lm, self.tokenizer, ranks, home.path)
        sampler = Sampler(source, self.scorer, self.columns[0])
        rounds = Rounds(config, lm, ref, self.prompts, examples, sampler, ranks, home.path, guards, handover)
        if config.algorithm == "ppo":
            width = lm.model.config.get_text_config().hidden_size
            rounds.values = ValueHead(width, config.value_learning_rate, lm.device)
        held_out = replace(sampler, columns=self.columns[1])
        return rounds, HeldPrompts(self.held, held_out, self.gold, config.seed) if self.held else None


@lru_cache(maxsize=2)
def order_of(prompts: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(prompts, generator=generator("prompts", seed, epoch)).tolist()


@dataclass
class Rounds:
    """The steps of a run: each round is sampled when its first step is asked for. It stands where a file's rows do."""

    config: Config
    lm: LanguageModel
    ref: LanguageModel | None
    prompts: Sequence[Prompt]
    examples: Examples  # the prompts, each with the token that ends an answer
    sampler: Sampler
    ranks: Ranks
    folder: Path
    guards: OnlineGuards
    handover: Handover | None = None  # where a server samples
    reference: None = None  # checksums of a second model: here it is the first one, whose own are compared
    last: Share | None = None
    values: ValueHead | None = None  # ppo

    @property
    def per_step(self) -> int:
        """Prompts of one step, of all ranks."""
        answers = self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps * self.ranks.size
        return answers // self.config.num_generations

    @property
    def steps_per_round(self) -> int:
        return self.config.steps_per_generation * self.config.num_iterations

    @property
    def steps_per_epoch(self) -> int:
        rounds = -(-len(self.prompts) // (self.per_step * self.config.steps_per_generation))
        return rounds * self.steps_per_round

    @property
    def total_steps(self) -> int:
        if self.config.max_steps > 0:
            return self.config.max_steps
        return max(1, round(self.config.num_train_epochs * self.steps_per_epoch))

    def prompts_of(self, number: int) -> list[int]:
        """This rank's prompts of a round. An epoch is one permutation; its last round begins the next."""
        size = self.per_step * self.config.steps_per_generation
        places = (divmod(place, len(self.prompts)) for place in range(number * size, (number + 1) * size))
        chosen = [order_of(len(self.prompts), self.config.seed, epoch)[index] for epoch, index in places]
        return chosen[self.ranks.rank :: self.ranks.size]

    def after_step(self) -> None:
        """After each update of the policy."""
        if self.handover is not None:
            self.handover.moved()
        if self.values is not None:
            self.values.step(self.ranks)

    def state(self) -> dict:
        return {} if self.values is None else {"values": self.values.state()}

    def restore(self, state: dict) -> None:
        if self.values is not None and "values" in state:
            self.values.restore(state["values"])

    def first_share(self) -> Share | None:
        return self.last

    def steps_from(self, start: int) -> Iterator[Share]:
        """This rank's share of every optimizer step from `start` on."""
        if self.handover is not None:
            self.handover.begin(start)
        for number in range(start // self.steps_per_round, -(-self.total_steps // self.steps_per_round)):
            first = number * self.steps_per_round
            made, resumed = self.round(number, first, start)
            metrics = self.summary(made, first, resumed)
            shares = self.shares(made)
            for step in range(max(first, start), min(first + self.steps_per_round, self.total_steps)):
                share = shares((step - first) % self.config.steps_per_generation)
                if share is None:
                    continue  # no pair, no label: no rank has anything to learn
                staleness = torch.tensor([float(step - made.weights), 1.0], dtype=torch.float64)
                about = {"staleness": staleness} | (metrics if step == first else {})  # a resumed log has them
                self.last = replace(share, step=step, metrics={k: v.to(self.lm.device) for k, v in about.items()})
                yield self.last
        if self.last is None and not start:  # a checkpoint is of a step that learned
            raise UserError(
                f"no round had anything to learn from: with {self.config.algorithm} a group needs answers of unequal "
                "scores. Take harder or easier prompts, a finer scorer, more num_generations or a higher temperature"
            )

    # ---- a round -----------------------------------------------------------------------------

    def round(self, number: int, step: int, start: int) -> tuple[Round, bool]:
        """Sampled and scored now, or as it was before the run was cut off; and whether the run goes on within it."""
        chosen, seed = self.prompts_of(number), seed_of(self.config.seed, "round", number, self.ranks.rank)
        within = start > step
        if within or (start and self.handover is not None):  # a server may not draw the same once more
            kept = load_round(self.folder, number, step, seed, chosen, self.ranks)
            if not self.ranks.any(kept is None):
                return kept, within
            if within:
                say(f"  the samples of round {number} are gone: they are drawn again, from later weights than before")
        with clock.part("sampling"):
            made = self.sample(number, step, seed, chosen)
        with clock.part("reference"):
            made = self.with_logps(made)
        save_round(self.folder, made, self.ranks)
        oldest = min((at for at, _ in checkpoints(self.folder)), default=step)
        forget_tensors(self.folder, min(oldest, step) // self.steps_per_round)
        return made, False

    def sample(self, number: int, step: int, seed: int, chosen: list[int]) -> Round:
        own = [self.prompts[i] for i in chosen]
        samples = self.sampler.sample(own, self.config.num_generations, seed, f"round {number}: sampling")
        texts, names = texts_of(samples), ("ids", "stopped", "round_trip")
        ids, *flags = ([[getattr(one, name) for one in group] for group in samples] for name in names)
        scores = self.sampler.scores(chosen, own, texts)
        weights = step if self.handover is None else self.handover.served_step
        made = Round(
            number, step, seed, chosen, [p.row for p in own], ids, texts, *flags, scores.values, weights=weights
        )
        return replace(made, sampler_logps=logps_of_sampler(samples), parts=dict(scores.parts))

    def with_logps(self, made: Round) -> Round:
        """Log-probabilities of the policy and of the reference, where the loss, the reward or the KL reads them."""
        config = self.config
        over_tokens = config.algorithm in OVER_TOKENS
        needs_ref = over_tokens and self.ref is not None
        if config.algorithm == "iterative_dpo" and self.ref is self.lm:
            material = self.material(made)
            if material is not None:
                made = replace(made, example_ref_logps=self.of_tokens(material, made, self.lm, completion_logps))
        compared = needs_ref or made.sampler_logps is not None
        if over_tokens and (self.steps_per_round > 1 or compared or config.algorithm == "ppo"):
            made = replace(made, old_logps=self.logps_of(made, self.lm))
        if self.values is not None:
            values = partial(token_values, head=self.values)
            made = replace(made, old_values=self.of_tokens(self.answers(made), made, self.lm, values))
        if needs_ref:
            with self.as_reference():
                made = replace(made, ref_logps=self.logps_of(made, self.ref))
        return made

    def logps_of(self, made: Round, model: LanguageModel) -> Tensor:  # (N,)
        """Of all answers, in the batches that the policy will meet."""
        logps = partial(completion_logps, temperature=self.config.temperature)
        return self.of_tokens(self.answers(made), made, model, logps)

    def answers(self, made: Round) -> Material:
        """All of them, without what they are worth."""
        return self.like_prompts(answers_of(made, self.ids))

    def of_tokens(
        self, material: Material, made: Round, model: LanguageModel, measure: Callable[[LanguageModel, Batch], Tensor]
    ) -> Tensor:  # (N,)
        """A number for each token of the material, in its order."""
        examples = material.examples
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        batches = [indices for part in parts_of(material, len(made.prompts), self.config) for indices in part]
        for indices, counts in self.ranks.in_step(batches, [0]):
            numbers = measure(model, collate(examples, indices).to(model.device)).float().cpu()
            if counts:
                for index, own in zip(indices, numbers.split(examples.counts[indices].tolist()), strict=True):
                    found[index] = own
        return torch.cat(found)

    def material(self, made: Round) -> Material | None:
        """What is learned from the round."""
        material = material_of(made, self.ids, self.config, self.ranks, self.guards.penalty)
        return None if material is None else self.like_prompts(material)

    def like_prompts(self, material: Material) -> Material:
        """Flat or padded as the prompts were found to be run."""
        like = {"padding_free": self.examples.padding_free, "bos": self.examples.bos, "parts": self.examples.parts}
        return replace(material, examples=replace(material.examples, **like))

    @cached_property
    def ids(self) -> list[list[int]]:
        return [prompt.ids for prompt in self.prompts]

    def as_reference(self) -> AbstractContextManager:
        """The reference in force: the first model is the policy without its adapters."""
        if self.ref is self.lm and self.config.algorithm != "iterative_dpo":
            return adapters_off(self.lm.model)
        return nullcontext()

    # ---- the steps of a round ----------------------------------------------------------------

    def shares(self, made: Round) -> Callable[[int], Share | None]:
        """A function from a part of the round to this rank's share of its step, made when it is asked for."""
        material = self.material(made)
        parts = [[] for _ in range(self.config.steps_per_generation)]
        mismatches = None
        if self.config.algorithm == "kto":
            material, mismatches = with_mismatches(material, made, self.config, self.ranks)
        if material is not None:
            parts = parts_of(material, len(made.prompts), self.config)

        def share(part: int) -> Share | None:
            own = parts[part]
            most = int(self.ranks.gather(torch.tensor([len(own)])).max())
            if most == 0:
                return None
            counts = [number < len(own) for number in range(most)]
            batches = self.batches(material, own, made) if own else []
            other = self.batches(replace(material, examples=mismatches), own, made) if mismatches and own else []
            if len(own) < most:
                like = self.like_prompts(spare_of(made, self.ids, self.config))
                spare = self.batches(like, [[0]] * (most - len(own)), made, spare=True)
                batches, other = batches + spare, other + (spare if self.config.algorithm == "kto" else [])
            names = [[material.examples.rows[i] for i in indices] for indices in own]
            return Share(
                0, batches, other, counts, [names if r == self.ranks.rank else [] for r in range(self.ranks.size)]
            )

        return share

    def batches(
        self, material: Material, parts: Sequence[list[int]], made: Round, spare: bool = False
    ) -> list[Batch]:  # fmt: skip
        """Microbatches with what the reference says of them; `spare`: whose numbers count nowhere."""
        config = self.config
        if config.algorithm in OVER_TOKENS:
            needs_ref = "ref_logps" in config.policy_loss().policy_needs
            rest = {"needs_ref": needs_ref, "values": self.values}
            return [batch_of(material, indices, made, config, **rest) for indices in parts]
        if config.algorithm == "best_of_n":
            return [collate(material.examples, indices) for indices in parts]
        if config.algorithm == "iterative_dpo" and self.ref is self.lm:
            counts = material.examples.counts
            logps = torch.zeros(int(counts.sum())) if spare else made.example_ref_logps
            return [collate(material.examples, indices, logps.split(counts.tolist())) for indices in parts]
        with self.as_reference():
            found = [collate(material.examples, indices).to(self.lm.device) for indices in parts]
            return [replace(batch, ref_logps=completion_logps(self.ref, batch)) for batch in found]

    def summary(self, made: Round, step: int, resumed: bool) -> dict[str, Tensor]:
        """The round in TRL's names, shown to the guards."""
        found = summary_of(made, self.ranks, self.sampler.scorer.name)
        if self.handover is not None:
            found |= served_summary(made, self.ranks)
        if made.ref_logps is not None:
            x = made.old_logps.double() - made.ref_logps.double()
            found["kl"] = self.ranks.sum_(torch.stack([x.sum(), torch.tensor(float(len(x)), dtype=torch.float64)]))
        if not resumed:
            means = means_of({name: x.tolist() for name, x in found.items()})
            answers = len(made.answers) * self.ranks.size
            self.guards.on_round(made.number, means, answers)
            if "kl" in means:
                self.guards.on_kl(step, means["kl"], answers)
        if self.config.algorithm in ("grpo", "reinforce"):  # the loss reports its own estimate
            found.pop("kl", None)
        if self.config.beta_horizon is not None:
            found["beta"] = torch.tensor([self.guards.penalty, 1.0], dtype=torch.float64)
        return found

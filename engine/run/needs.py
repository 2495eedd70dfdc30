"""What a command will take, before it starts: memory, tokens and matrix products, by its config and its rows alone.

`estimate_needs` reads and tokenizes the rows as the command will; no weight is loaded. Answers that are still to be
sampled count as long as they may become, so what rests on them is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from prefuse.engine.config.settings import TRAINING_COMMANDS, Config
from prefuse.engine.data.dataset import read_evaluation_data, read_prompts, read_training_prompts
from prefuse.engine.data.examples import Prompt
from prefuse.engine.model.load import load_tokenizer
from prefuse.engine.model.reward_model import heads_of, load_model, loader_of, scores_steps
from prefuse.engine.model.size import (
    ModelSize,
    activations_per_token,
    cache_per_token,
    size_of,
    working_per_token,
)
from prefuse.engine.run.setup import loss_of, read_rows
from prefuse.losses.contract import needs_of
from prefuse.losses.rewards import reads_scores

ADAM = 3 * 4  # bytes of a trained weight: its gradient and two states, in float32


@dataclass
class RunNeeds:
    """Bytes, tokens and operations. `at_most`: they rest on answers that are still to be sampled."""

    model: ModelSize | None
    width: int  # bytes of a weight
    standing: int = 0  # bytes of the models that stay beside it: a reference, scorers
    passing: int = 0  # of a model that is gone before the first step
    activations: int = 0  # bytes, of a microbatch
    cache: int = 0  # bytes of keys and values while answers are sampled
    operations: float = 0.0
    tokens: str = ""  # how many, in words
    at_most: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def memory(self) -> int:
        """Bytes at the peak, beside the libraries."""
        own = self.model.weights * self.width if self.model else 0
        trained, largest = (self.model.trained, self.model.largest) if self.model else (0, 0)
        training = trained * ADAM + (largest * self.width if trained else 0) + max(self.activations, self.cache)
        return own + self.standing + max(training, self.passing)


def estimate_needs(config: Config, command: str, scorers: Sequence[str]) -> RunNeeds:
    """`scorers`: folders of the models that score or judge."""
    found = RunNeeds(None, 2 if config.dtype == "bfloat16" else 4)
    if config.model_name_or_path:
        found.model = policy_size(config, command)
    judges = [scorer_size(path, config) for path in scorers]
    found.standing += sum(judge.weights for judge in judges) * found.width
    if command == "online":
        _online(found, config, judges)
    elif command in TRAINING_COMMANDS:
        _training(found, config, command)
    elif command == "eval" and not config.scorer:
        _evaluation(found, config)
    else:
        _answering(found, config, command, judges)
    return found


def policy_size(config: Config, command: str) -> ModelSize:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    auto, labels = AutoModelForCausalLM, {}
    if command == "reward":
        steps = config.reward_loss == "steps"
        auto = AutoModelForTokenClassification if steps else AutoModelForSequenceClassification
        labels = {"num_labels": 2 if steps else heads_of(config.model_name_or_path) or config.reward_heads}
    return size_of(config.model_name_or_path, config, auto, trains=command in TRAINING_COMMANDS, **labels)


def scorer_size(path: str, config: Config) -> ModelSize:
    """Of a judge, a causal LM, or of a reward model."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    if loader_of(path) is load_model:
        return size_of(path, config, AutoModelForCausalLM, trains=False)
    if scores_steps(path):
        return size_of(path, config, AutoModelForTokenClassification, trains=False, num_labels=2)
    labels = heads_of(path) or 1
    return size_of(path, config, AutoModelForSequenceClassification, trains=False, num_labels=labels)


def reference_size(found: RunNeeds, config: Config) -> ModelSize:
    """The reference: the model that is named, else the one that is trained."""
    if config.ref_model_name_or_path is None:
        return found.model
    from transformers import AutoModelForCausalLM

    return size_of(config.ref_model_name_or_path, config, AutoModelForCausalLM, trains=False)


# ---- rows ----------------------------------------------------------------------------------------


def _training(found: RunNeeds, config: Config, command: str) -> None:
    """`sft`, `train`, `reward`. The reference is asked once, before the first step, and its answers are kept."""
    loss, model = loss_of(config, command), found.model
    _, examples, _, _ = read_rows(config, loss)
    tokens = int(examples.prompts.lengths.sum() + examples.completions.lengths.sum())
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.nproc
    epochs = config.max_steps * per_step / len(examples) if config.max_steps > 0 else config.num_train_epochs
    at_once = tokens * min(1.0, config.per_device_train_batch_size / len(examples))
    found.activations = int(at_once * activations_per_token(config, model.about))
    found.operations = learning(model) * tokens * epochs
    if not reads_scores(loss) and "z0" in needs_of(loss):
        found.operations += reading(model) * tokens * epochs  # mismatched completions, before each step
    if not reads_scores(loss) and "reference" in needs_of(loss):
        ref = reference_size(found, config)
        found.operations += reading(ref) * tokens
        if not config.use_peft or config.ref_model_name_or_path:
            found.passing = ref.weights * found.width
            if config.sync_ref_model:  # it stays, and follows the policy
                found.standing, found.passing = found.standing + found.passing, 0
    found.tokens = f"{tokens:,} tokens an epoch, {epochs:.3g} epochs"


def _evaluation(found: RunNeeds, config: Config) -> None:
    """`eval` without a scorer: one pass of each model."""
    loss, model = config.loss(), found.model
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    examples, _ = read_evaluation_data(config, loss, tokenizer)
    tokens = int(examples.prompts.lengths.sum() + examples.completions.lengths.sum())
    models = [model]
    if config.ref_model_name_or_path is not None:
        models.append(reference_size(found, config))
        found.standing += models[1].weights * found.width
    at_once = tokens * min(1.0, config.per_device_eval_batch_size / len(examples))
    found.activations = int(at_once * working_per_token(config, model.about))
    passes = 2 if "z0" in needs_of(loss) else 1
    found.operations = passes * tokens * sum(map(reading, models))
    found.tokens = f"{tokens:,} tokens"


# ---- answers -------------------------------------------------------------------------------------


def _online(found: RunNeeds, config: Config, judges: Sequence[ModelSize]) -> None:
    """Sampled, scored, compared with the reference, learned from."""
    model, size = found.model, config.num_generations
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    prompts, _ = read_training_prompts(config, tokenizer)
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.nproc // size
    epoch = len(prompts) / max(1, per_step)  # steps that go through all prompts once
    steps = config.max_steps if config.max_steps > 0 else epoch * config.num_iterations * config.num_train_epochs
    groups = steps / config.num_iterations * per_step
    prompt, longest = _lengths(prompts)
    answer = config.max_completion_length
    once = groups * (prompt + size * answer)  # tokens, a group's prompt once
    found.operations = learning(model) * once * config.num_iterations
    if config.reads_first_model() or config.ref_model_name_or_path:
        ref = reference_size(found, config)
        found.operations += reading(ref) * once
        if not config.use_peft or config.ref_model_name_or_path:
            found.standing += ref.weights * found.width
    separate = groups * size * (prompt + answer)
    found.operations += sum(map(reading, judges)) * separate
    if config.server_base_url is None:
        found.operations += reading(model) * separate
        side_by_side = config.per_device_eval_batch_size * size
        found.cache = int(side_by_side * (longest + answer) * cache_per_token(config, model.about))
    batch = config.per_device_train_batch_size * (answer + prompt / size)
    found.activations = int(batch * activations_per_token(config, model.about))
    found.at_most = True
    found.tokens = (
        f"{len(prompts):,} prompts, {steps:,.0f} steps, {groups * size:,.0f} answers of {answer:,} tokens at most"
    )


def _answering(found: RunNeeds, config: Config, command: str, judges: Sequence[ModelSize]) -> None:
    """`generate`, `label`, `revise`, and `eval` with a scorer: answers to each prompt, and what is said of them."""
    given = config.model_answers or (command == "label" and not config.model_name_or_path)
    if given or config.label_form == "steps":
        found.notes.append(f"not estimated for {'answers that are given' if given else 'labels of steps'}")
        return
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    prompts = read_prompts(config, tokenizer)
    count, length = config.num_generations if command in ("label", "eval") else 1, config.max_new_tokens
    models = [found.model]
    if config.ref_model_name_or_path is not None and command in ("generate", "eval"):
        models.append(reference_size(found, config))
        found.standing += models[1].weights * found.width
    prompt, longest = _lengths(prompts)
    turns = 1 + 2 * config.num_revisions if command == "revise" else 1  # a critique and a revision each time
    answers = len(prompts) * count
    if config.server_base_url is None:
        # Each turn reads what was said before it.
        read = sum(prompt + (turn + 1) * length for turn in range(turns))
        found.operations = answers * read * sum(map(reading, models))
        side_by_side = min(answers, config.per_device_eval_batch_size)
        found.cache = int(side_by_side * (longest + turns * length) * cache_per_token(config, found.model.about))
    compared = _texts_scored(config, command, len(prompts), count, len(models))
    found.operations += compared * (prompt + length) * sum(map(reading, judges))
    if command == "eval" and config.checkpoints:
        found.notes.append("this is for one checkpoint: the run has several")
    found.at_most = True
    found.tokens = f"{len(prompts):,} prompts, {answers * turns * len(models):,} answers of {length:,} tokens at most"


def _texts_scored(config: Config, command: str, prompts: int, count: int, models: int) -> int:
    """How many answers the scorers read. A judge reads two at once, in both orders."""
    judge = any(spec.startswith("judge=") for spec in config.scorer or [])
    if command == "label":
        pairs = count * (count - 1) // 2
        return prompts * (4 * pairs if judge else count)
    if command == "revise":
        return prompts * (1 + config.num_revisions)
    return prompts * count * (4 if judge else models)


def _lengths(prompts: Sequence[Prompt]) -> tuple[float, int]:
    """The mean and the longest, in tokens."""
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
    return lengths.double().mean().item(), int(lengths.max())


# ---- operations ----------------------------------------------------------------------------------


def learning(model: ModelSize) -> int:
    """Operations of a token, forward and backward: 6 for each trained weight, 4 for a frozen one."""
    return 6 * model.trained + 4 * (model.weights - model.trained)


def reading(model: ModelSize) -> int:
    """Operations of a token in a pass without gradients: 2 for each weight."""
    return 2 * model.weights

"""What a command will take, before it starts: memory, tokens and matrix products, by its config and its rows alone.

`estimate_needs` reads and tokenizes the rows as the command will; no weight is loaded. How long training takes is found
by a trial (trial.py); all else is counted in operations. Answers that are still to be sampled count as long as they may
become, so what rests on them is an upper bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from prefuse.engine.config.settings import TRAINING_COMMANDS, Config
from prefuse.engine.data.batches import Examples
from prefuse.engine.data.dataset import read_evaluation_data, read_prompts, read_training_prompts
from prefuse.engine.data.examples import Prompt
from prefuse.engine.model.adapters import base_of
from prefuse.engine.model.load import load_tokenizer
from prefuse.engine.model.reward_model import heads_of, load_model, loader_of, scores_steps
from prefuse.engine.model.size import (
    ModelSize,
    activations_per_token,
    cache_per_token,
    cut_model,
    size_of,
    working_per_token,
)
from prefuse.engine.run.setup import loss_of, read_rows
from prefuse.engine.run.trial import LAYERS, ROUNDS, plan_of, run_trial
from prefuse.losses.contract import needs_of
from prefuse.losses.rewards import reads_scores

MOST_OPERATIONS = 2e12  # of a trial on a CPU: some half a minute on one core
ADAM = 3 * 4  # bytes of a trained weight: its gradient and two states, in float32


@dataclass
class RunNeeds:
    """Bytes, tokens and operations. `at_most`: they rest on answers that are still to be sampled."""

    model: ModelSize | None
    width: int  # bytes of a weight
    resident: int = 0  # bytes of Python, the libraries and the rows, which are loaded here as in the run
    standing: int = 0  # of the models that stay beside it: a reference, scorers
    passing: int = 0  # of a model that is gone before the first step
    activations: int = 0  # bytes, of a microbatch
    cache: int = 0  # bytes of keys and values while answers are sampled
    operations: float = 0.0
    moved: float = 0.0  # bytes of weights that sampling reads: all of them for each next token of a batch
    seconds: float | None = None  # by a trial
    slower: float = 1.0  # how much slower its rounds were than the best one
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


def estimate_needs(config: Config, command: str, scorers: Sequence[str], room: int = 0) -> RunNeeds:
    """`scorers`: folders of the models that score or judge. `room`: bytes that a trial may take; 0: none is made."""
    found = RunNeeds(None, 2 if config.dtype == "bfloat16" else 4)
    if config.model_name_or_path:
        found.model = policy_size(config, command)
    judges = [scorer_size(path, config) for path in scorers]
    found.standing += sum(judge.weights for judge in judges) * found.width
    if command == "online":
        _online(found, config, judges)
    elif command in TRAINING_COMMANDS:
        _training(found, config, command, room)
    elif command == "eval" and not config.scorer:
        _evaluation(found, config)
    else:
        _answering(found, config, command, judges)
    found.resident = found.resident or resident_memory()
    return found


def policy_kind(config: Config, command: str) -> tuple[type, dict[str, int]]:
    """transformers' Auto class of the model that the command works with, and what its config takes beside."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    if command != "reward":
        return AutoModelForCausalLM, {}
    if config.reward_loss == "steps":
        return AutoModelForTokenClassification, {"num_labels": 2}
    labels = heads_of(config.model_name_or_path) or config.reward_heads
    return AutoModelForSequenceClassification, {"num_labels": labels}


def policy_size(config: Config, command: str) -> ModelSize:
    auto, labels = policy_kind(config, command)
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


def _training(found: RunNeeds, config: Config, command: str, room: int) -> None:
    """`sft`, `train`, `reward`: by a trial where one can be made in `room` bytes, else by operations."""
    loss, model = loss_of(config, command), found.model
    _, examples, _, _ = read_rows(config, loss)
    needs = frozenset() if reads_scores(loss) else needs_of(loss)
    ref = reference_size(found, config) if "reference" in needs else None
    if ref is not None and (not config.use_peft or config.ref_model_name_or_path):
        found.passing = ref.weights * found.width
        if config.sync_ref_model:  # it stays, and follows the policy
            found.standing, found.passing = found.standing + found.passing, 0
    found.resident = resident_memory()  # before the trial adds to it
    try:
        cut, settings = _cut_for_trial(found, config, command, examples, room)
        trial, plan = run_trial(cut, settings, examples, loss)
    except Exception as error:  # of layers of another kind, of too little memory, of a device
        found.notes.append(f"without a trial of a few layers ({' '.join(str(error).split())[:100]})")
        flat = dataclasses.replace(examples, padding_free=config.padding_free is not False)
        trial, plan = None, plan_of(flat, config, loss)
    own, others = _readings(config, needs, plan.epochs)
    others *= 0 if ref is None else ref.weights / model.weights
    tokens = plan.tokens * plan.epochs
    found.tokens = f"{plan.tokens:,.0f} tokens an epoch, {plan.epochs:.3g} epochs"
    found.operations = learning(model) * tokens + (own + others) * reading(model) * plan.tokens
    found.activations = plan.largest * activations_per_token(config, model.about)
    if trial is None:
        return
    layers = model.about.num_hidden_layers
    # One layer's numbers are there twice: its gradients, and with gradient_checkpointing what is computed again.
    found.activations = trial.activations(plan.largest, layers) + plan.largest * working_per_token(config, model.about)
    found.seconds = trial.training(plan, layers, model.trained) + (own + others) * trial.reading(plan, layers)
    if config.nproc > 1 and torch.cuda.is_available():  # on a CPU the ranks share its cores
        found.seconds /= config.nproc
    found.slower = trial.slower


def _readings(config: Config, needs: frozenset[str], epochs: float) -> tuple[float, float]:
    """Passes over the rows of an epoch without gradients: of the policy, and of the reference."""
    mismatched = epochs if "z0" in needs else 0.0
    if "reference" not in needs:
        return mismatched, 0.0
    return mismatched, mismatched + (epochs if config.sync_ref_model else 1.0)


def _cut_for_trial(
    found: RunNeeds, config: Config, command: str, examples: Examples, room: int
) -> tuple[torch.nn.Module, Config]:
    """A few layers of the policy and the settings that train them; ValueError where that takes too long or too much."""
    model = found.model
    for name in ("load_in_4bit", "torch_compile"):
        if getattr(config, name):
            raise ValueError(f"{name} would take long for a trial")
    weights = model.weights * LAYERS // max(LAYERS, model.about.num_hidden_layers) + 2 * model.largest
    if 3 * weights * found.width > room:  # with gradients, and numbers that lie between
        raise ValueError("too little memory is free")
    tokens = config.per_device_train_batch_size * float(examples.lengths.mean())
    if not torch.cuda.is_available() and 6 * weights * tokens * ROUNDS > MOST_OPERATIONS:
        raise ValueError("the layers are too large for this CPU")
    auto, labels = policy_kind(config, command)
    cut = cut_model(config.model_name_or_path, config, auto, LAYERS, **labels)
    base = base_of(Path(config.model_name_or_path))
    return cut, dataclasses.replace(config, model_name_or_path=base or config.model_name_or_path)


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
        found.moved = math.ceil(groups * size / side_by_side) * answer * model.weights * found.width
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
        steps = math.ceil(answers / side_by_side) * turns * length
        found.moved = steps * sum(model.weights for model in models) * found.width
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


def resident_memory() -> int:
    """Bytes of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0

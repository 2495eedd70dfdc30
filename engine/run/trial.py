"""How long training takes, by a trial: a few decoder layers with made-up weights run one real microbatch.

A model of the run's shape with LAYERS layers, and the same with one, run forward and backward as the run will (flat
batches, LoRA, dtype, checkpointing). What a layer takes is the difference divided by the layers between the two; the
rest does not grow with layers. So no weight is read, and little memory is needed. `prefuse doctor` asks for it.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import Batch, Examples, collate
from prefuse.engine.model.forward import LanguageModel, completion_states, logps_of_states, loss_of_states
from prefuse.engine.model.layers import decoder_layers
from prefuse.engine.model.load import device_of, load_model, without_padding
from prefuse.engine.model.reward_model import RewardModel
from prefuse.engine.run.optimizer import make_optimizer
from prefuse.engine.run.plan import Steps
from prefuse.engine.run.ranks import ALONE
from prefuse.losses.contract import Loss, is_batchwise, needs_of
from prefuse.losses.rewards import reads_scores

LAYERS = 4
ROUNDS = 2  # after one for warming up; the best counts, for another program can only make a round slower
STAND_IN = 1 << 24  # weights at most whose optimizer step is timed: more than caches hold


@dataclass(frozen=True)
class Plan:
    """What the steps of a run have in all, and in the first epoch."""

    steps: int
    epochs: float  # of the microbatches below; a run that ends within its first epoch has 1
    microbatches: int
    tokens: int  # that run in the trunk: a shared prompt once, padding too
    completions: int  # tokens of the head
    largest: int  # tokens of the largest microbatch
    typical: list[int]  # the examples of a microbatch of middle size


def plan_of(examples: Examples, config: Config, loss: Loss) -> Plan:
    whole = dataclasses.replace(config, gradient_accumulation_steps=config.gradient_accumulation_steps * config.nproc)
    steps = Steps(examples, whole, ALONE, is_batchwise(loss))
    microbatches = steps.microbatches_of(0, 0)
    tokens = [_tokens(examples, np.asarray(indices)) for indices in microbatches]
    completions = sum(int(examples.counts[indices].sum()) for indices in microbatches)
    middle = sorted(range(len(tokens)), key=tokens.__getitem__)[len(tokens) // 2]
    epochs = steps.total / min(steps.total, steps.per_epoch)
    return Plan(steps.total, epochs, len(tokens), sum(tokens), completions, max(tokens), microbatches[middle])


def _needs(loss: Loss) -> frozenset[str]:
    return frozenset() if reads_scores(loss) else needs_of(loss)


def _tokens(examples: Examples, indices: np.ndarray) -> int:
    if not examples.padding_free:
        return len(indices) * examples.sides * int(examples.lengths[indices].max())
    prompts = examples.prompts.same[indices]
    first = np.concatenate([[True], prompts[1:] != prompts[:-1]])  # neighbours share a prompt
    return int(examples.prompts.lengths[indices[first]].sum() + examples.counts[indices].sum())


@dataclass(frozen=True)
class Trial:
    """Seconds and bytes of a microbatch of `tokens` tokens in the trunk and `completions` in the head."""

    tokens: int
    completions: int
    layer: float  # of one decoder layer, forward and backward
    rest: float  # of the trunk beside its layers
    head: float
    reading_layer: float  # of one layer in a pass without gradients
    reading_head: float  # with the rest of that trunk
    optimizer: float  # of one trained weight in a step
    kept_layer: int  # bytes that the backward of one layer reads
    kept_rest: int
    slower: float  # the middle round's time divided by the best one's: how busy the machine was

    def training(self, plan: Plan, layers: int, trained: int) -> float:
        """Seconds of all steps."""
        trunk = plan.tokens / self.tokens * layers * self.layer + plan.microbatches * self.rest
        head = plan.completions / max(1, self.completions) * self.head
        return plan.epochs * (trunk + head) + plan.steps * trained * self.optimizer

    def reading(self, plan: Plan, layers: int) -> float:
        """Seconds of a pass over the rows of one epoch without gradients."""
        trunk = plan.tokens / self.tokens * layers * self.reading_layer
        return trunk + plan.completions / max(1, self.completions) * self.reading_head

    def activations(self, tokens: int, layers: int) -> int:
        """Bytes that the backward of a microbatch of so many tokens reads. With checkpointing a layer keeps its input
        alone, and the numbers of the layer that is computed again are not among these."""
        return int(tokens / self.tokens * (layers * self.kept_layer + self.kept_rest))


def run_trial(model: nn.Module, config: Config, examples: Examples, loss: Loss) -> tuple[Trial, Plan]:
    """`model`: LAYERS layers of the policy (`cut_model`). Whatever an unusual model raises is the caller's to catch."""
    device = device_of(config)
    kind = RewardModel if reads_scores(loss) else LanguageModel
    lm = load_model(
        config.model_name_or_path, config, device, trains=True, read=lambda path, config: model, make=kind
    )  # fmt: skip
    examples = without_padding(examples, (lm,), config)
    plan = plan_of(examples, config, loss)
    zeros = {index: torch.zeros(int(examples.counts[index])) for index in plan.typical}
    batch = collate(examples, plan.typical, zeros if "reference" in _needs(loss) else None).to(device)
    layers = decoder_layers(lm.model)
    if len(layers) < 2:
        raise ValueError("it has one layer")
    many = len(layers)
    kept, trunk, reading = {}, {}, {}
    for count in (many, 1):
        with _only(lm.model, layers[:count]):
            kept[count] = _kept_bytes(lm, batch)
            trunk[count], reading[count] = _rounds(lambda: _learn_trunk(lm, batch), lambda: _read_trunk(lm, batch))
    hidden = torch.randn_like(completion_states(lm, batch).detach())
    head, reading_head = _rounds(lambda: _learn_head(lm, hidden, batch, loss), lambda: _read_head(lm, hidden, batch))
    layer, reading_layer, kept_layer = (
        max(0, (of[many] - of[1]) / (many - 1)) for of in (_best(trunk), _best(reading), kept)
    )  # fmt: skip
    every = (*trunk.values(), *reading.values(), head, reading_head)
    trial = Trial(
        tokens=batch.tokens.num_tokens, completions=len(batch.targets), layer=layer,
        rest=max(0.0, min(trunk[1]) - layer), head=min(head), reading_layer=reading_layer,
        reading_head=max(0.0, min(reading[1]) - reading_layer) + min(reading_head),
        optimizer=_optimizer(lm, config), kept_layer=int(kept_layer), kept_rest=int(kept[1] - kept_layer),
        slower=sum(map(statistics.mean, every)) / sum(map(min, every)),
    )  # fmt: skip
    return trial, plan


def _rounds(*runs: Callable[[], float]) -> list[list[float]]:
    """The seconds of each, by round, without the first."""
    rounds = [[run() for run in runs] for _ in range(ROUNDS + 1)]
    return [list(seconds) for seconds in zip(*rounds[1:], strict=True)]


def _best(rounds: dict[int, list[float]]) -> dict[int, float]:
    return {count: min(seconds) for count, seconds in rounds.items()}


@contextmanager
def _only(model: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
    """The model with its first layers alone."""
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) and child[0] is layers[0]
    ]
    for module, name, _ in places:
        setattr(module, name, nn.ModuleList(layers))
    try:
        yield
    finally:
        for module, name, child in places:
            setattr(module, name, child)


def _learn_trunk(lm: LanguageModel, batch: Batch) -> float:
    """Seconds, forward and backward."""
    lm.model.zero_grad()
    began = _now(lm)
    hidden = completion_states(lm, batch)
    hidden.backward(torch.ones_like(hidden))
    return _now(lm) - began


@torch.no_grad()
def _read_trunk(lm: LanguageModel, batch: Batch) -> float:
    began = _now(lm)
    completion_states(lm, batch)
    return _now(lm) - began


def _learn_head(lm: LanguageModel, hidden: Tensor, batch: Batch, loss: Loss) -> float:
    lm.model.zero_grad()
    z0 = torch.zeros((), device=lm.device) if "z0" in _needs(loss) else None
    began = _now(lm)
    loss_of_states(lm, hidden.detach().requires_grad_(), batch, loss, z0=z0).loss.backward()
    return _now(lm) - began


@torch.no_grad()
def _read_head(lm: LanguageModel, hidden: Tensor, batch: Batch) -> float:
    """Of log-probabilities; nothing is read of a model that scores."""
    began = _now(lm)
    if not lm.scores:
        logps_of_states(lm, hidden, batch)
    return _now(lm) - began


def _now(lm: LanguageModel) -> float:
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    return time.perf_counter()


def _kept_bytes(lm: LanguageModel, batch: Batch) -> int:
    """What autograd keeps of a forward for its backward, each storage once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), x)  # alive, so that no storage takes the place of another
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        completion_states(lm, batch)
    return sum(size for place, (size, _) in kept.items() if place not in weights)


def _optimizer(lm: LanguageModel, config: Config) -> float:
    """Seconds of a step for one weight: numbers move through memory, so a stand-in of any shape will do."""
    count = min(STAND_IN, sum(p.numel() for p in lm.model.parameters() if p.requires_grad))
    stand_in = nn.Linear(count, 1, bias=False, device=lm.device)
    optimizer = make_optimizer(stand_in, config)
    seconds = []
    for _ in range(ROUNDS + 1):
        stand_in.weight.grad = torch.ones_like(stand_in.weight)
        began = _now(lm)
        nn.utils.clip_grad_norm_(stand_in.parameters(), 1.0)
        optimizer.step()
        seconds.append(_now(lm) - began)
    return min(seconds) / count

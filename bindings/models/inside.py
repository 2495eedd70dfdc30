"""A transformers causal LM run by its own forward, with something else in place of its head.

    logps = run_with_head(model, causal, layer, lambda hidden: ..., input_ids=input_ids)

The logits of a forward are the last thing that a model makes and the largest. Here the model runs as it always does,
wrappers and all; at its head it hands over the hidden states, and gets a few numbers back in place of the logits.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prefuse.models.flat import alone
from prefuse.models.head import Head, columns_of, is_lora, transform_of
from prefuse.models.probes import States, check_causal, check_causal_loss, check_logits, loud_logits, probe_ids, quietly
from prefuse.models.trunk import UnsupportedModel, class_of

# ---------------------------------------------------------------------------------------------------------
# The model's own forward, with another head


def run_with_head(
    model: nn.Module,
    causal: nn.Module,
    layer: nn.Module,
    compute: Callable[[Tensor], Tensor],  # hidden states as the head gets them -> (K,)
    checks: dict[str, Callable[[States], None]],
    **inputs,
) -> Tensor:  # (K,)
    """`compute(hidden)`, run where `model(**inputs)` runs its head; the model makes no logits.

    `checks`: as of `ReplacedHead`.

    There the weights are whole under `fully_shard`, autocast is the model's, and what comes out passes the hooks of
    every wrapper.
    """
    call, before = ReplacedHead(causal, layer, compute, checks), causal.forward
    begin, end, result = (outside_graphs(x) for x in (call.begin, call.end, call.result))
    results = []

    def forward(*args, **kwargs) -> Tensor:  # (1, K, 1)
        begin(before, kwargs)
        try:
            before(*args, **kwargs)
        finally:
            end()
        results.append(result())
        return results[-1]

    with _replaced(causal, outside_graphs(forward, inner=False)):
        returned = model(**inputs)
    if not results:
        raise UnsupportedModel(
            f"{type(model).__name__} did not call the forward of its {class_of(causal).__name__}: give the model inside"
        )
    _reshard(model, returned)
    # fully_shard may cast what its root returns to bf16; its hooks are on the tensor before the cast, so return that.
    # (DDP's hooks are on the tensor that it returns.)
    returned = results[0] if returned.dtype != results[0].dtype else returned
    return returned[0, :, 0]


_running: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose head is another at this moment


def is_running(causal: nn.Module) -> bool:
    """Whether a `ReplacedHead` has replaced the model's head already."""
    return causal in _running


@dataclass
class ReplacedHead:
    """One forward of a model with something else in place of its head.

        call.begin(forward, kwargs)
        try:
            output = forward(*args, **kwargs)   # calls its head once: in its place runs `compute`
        finally:
            call.end()
        made = call.result()

    The caller writes these lines itself, in a function out of the compiler's sight (`outside_graphs(inner=False)`), and
    calls the three methods through `outside_graphs`: torch.compile then sees the model's forward and nothing of ours.
    """

    causal: nn.Module
    layer: nn.Module
    compute: Callable[[Tensor], Tensor]  # hidden states as the head gets them -> (K,)
    checks: dict[str, Callable[[States], None]] = field(default_factory=dict)  # run on the model's states, once
    own_loss: bool = False  # whether the forward is given labels
    kept: list = field(default_factory=list)  # what `compute` keeps for the caller
    _made: list[Tensor] = field(default_factory=list)  # of (1, K, 1)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def begin(self, forward: Callable[..., object], kwargs: dict) -> None:
        """Replaces the head until `end`.

        The first time, `_try_forward` finds out whether what the forward does to its logits is what is computed here,
        and with `own_loss` what it does to labels.
        """
        _running.add(self.causal)
        self._stack.callback(_running.discard, self.causal)
        try:
            _try_forward(self.causal, self.layer, forward, kwargs, self.checks, self.own_loss)
            self._stack.enter_context(_replaced(self.layer, outside_graphs(self._head)))
        except BaseException:
            self.end()
            raise

    def _head(self, hidden: Tensor) -> Tensor:
        _check_weight(self.causal, self.layer)
        result = self.compute(hidden)
        self._made.append(result[None, :, None].clone())
        # fully_shard puts the backward's hooks of a head that is its own unit on the head's output: keep its graph.
        return self._made[-1] if hasattr(self.layer, "reshard") else self._made[-1].detach()

    def end(self) -> None:
        """Gives the model its head back."""
        self._stack.close()

    def result(self) -> Tensor:  # (1, K, 1)
        """What `compute` made. Raises UnsupportedModel unless the head was called once, and its output kept."""
        made = self._made
        if len(made) != 1 or made[0]._version:
            what = "changed its head's output in place" if made else "did not call it"
            raise UnsupportedModel(
                f"{class_of(self.causal).__name__} was to call its head ({type(self.layer).__name__}) once, and "
                f"{what if len(made) < 2 else f'called it {len(made)} times'}: this is not computed here; call the "
                "trunk yourself and use prefuse.linear_logprobs"
            )
        return made[0]


# ---------------------------------------------------------------------------------------------------------
# The first time

_passed: weakref.WeakKeyDictionary[nn.Module, set] = weakref.WeakKeyDictionary()  # what each model was tried for


def _try_forward(
    causal: nn.Module, layer: nn.Module, forward: Callable[..., object], kwargs: dict, checks: dict, own_loss: bool
) -> None:
    """Runs the model's own forward on a few tokens, once for a model and each set of switches it is called with.

    Raises UnsupportedModel if its logits are not its head's output with the config's factor and cap, if its loss is
    not the one known here, if its states depend on later tokens, and if any of `checks` raises.
    """
    switches = {name: True for name, value in kwargs.items() if value is True and name not in ("return_dict", "labels")}
    transform = transform_of(causal.config.get_text_config())
    passed = _passed.setdefault(causal, set())
    key = (tuple(transform.items()), tuple(switches), own_loss)
    if key in passed and passed.issuperset(checks):
        return
    with quietly(causal), alone(), loud_head(layer) as run:
        states = lambda ids, **inputs: (forward(input_ids=ids, **_uncached(inputs)), run.hidden)[1]  # noqa: E731
        try:
            if key not in passed:
                ids = probe_ids(causal)[None]
                labels = {"labels": ids} if own_loss else {}
                output = forward(input_ids=ids, **_uncached(switches), **labels)
                if run.logits is None:  # the run itself will say that the head was not called
                    return
                used = Head(run.logits, **transform).after(columns_of(causal, run.logits))
                check_logits(causal, _logits(output, own_loss), used, transform)
                if own_loss:
                    check_causal_loss(causal, _loss(output), used, ids, own_router_loss(causal, output))
                check_causal(causal, states)
                passed.add(key)
            for name in checks.keys() - passed:
                checks[name](states)
                passed.add(name)
        except UnsupportedModel:
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"{class_of(causal).__name__} cannot be tried on a few tokens: {type(error).__name__}: {error}"
            ) from error


def _uncached(inputs: dict) -> dict:
    return {"use_cache": False} | inputs


@dataclass
class _LoudRun:
    """The hidden states that the head was given, and the made-up logits that it returned."""

    hidden: Tensor | None = None  # (B, T, D)
    logits: Tensor | None = None  # (B, T, V)


@contextlib.contextmanager
def loud_head(layer: nn.Module) -> Iterator[_LoudRun]:
    """While this lasts, the head returns logits small and large, whatever it is given."""
    run = _LoudRun()
    vocabulary = (layer.get_base_layer() if is_lora(layer) else layer).out_features

    def head(hidden: Tensor) -> Tensor:
        run.hidden, shape = hidden, hidden.shape[:-1]
        run.logits = loud_logits(shape.numel(), vocabulary, hidden.device).view(*shape, vocabulary)
        return run.logits.clone()

    with _replaced(layer, outside_graphs(head)):
        yield run


def _logits(output: object, with_loss: bool) -> object:
    """The logits of a named output or of a tuple, in which the loss comes first if labels were given."""
    return getattr(output, "logits", output[int(with_loss)] if isinstance(output, tuple) else None)


def _loss(output: object) -> object:
    return getattr(output, "loss", output[0] if isinstance(output, tuple) else None)


def own_router_loss(causal: nn.Module, output: object) -> Tensor | float:
    """What a mixture of experts adds to its loss, of its own forward's output; 0 where it was not asked for it."""
    balance = getattr(output, "aux_loss", None)
    if balance is None:
        return 0.0
    config = causal.config.get_text_config()
    coefficient = getattr(causal, "router_aux_loss_coef", getattr(config, "router_aux_loss_coef", None))
    if coefficient is None:
        raise UnsupportedModel(
            f"{class_of(causal).__name__} adds a router's loss with a coefficient of a name unknown here "
            "(known is router_aux_loss_coef): call it without output_router_logits"
        )
    return coefficient * balance.float()


def _check_weight(causal: nn.Module, layer: nn.Module) -> None:
    """Whether the weight is there, now that the model runs."""
    weight = (layer.get_base_layer() if is_lora(layer) else layer).weight
    name = f"the head of {class_of(causal).__name__}"
    if hasattr(weight, "full_tensor"):
        raise UnsupportedModel(
            f"{name} is a DTensor inside the model's forward: expected a whole weight. Leave it out of the "
            "tensor-parallel plan; under fully_shard, call the root module, or wrap the head with the root"
        )
    if weight.is_meta or weight.numel() == 0:
        raise UnsupportedModel(
            f"{name} has no weight here ({'offloaded' if weight.is_meta else 'partitioned, as by DeepSpeed ZeRO-3'}): "
            "keep it on the device that runs the model, or shard the model by fully_shard (FSDP2)"
        )


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """The module with another forward, for as long as this lasts; libraries too put one in the instance."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def outside_graphs(function: Callable, inner: bool = True) -> Callable:
    """`function` out of torch.compile's sight, and with `inner` what it calls as well.

    What torch.compile sees, it guards: it read the list of all models that were tried here, and raised IndexError where
    one of them was collected meanwhile (torch 2.13.0).
    """
    if "torch._dynamo" not in sys.modules:
        return function
    return torch.compiler.disable(function, recursive=inner)


def _reshard(model: nn.Module, result: Tensor) -> None:
    """Reshards the root of `fully_shard` after a forward without gradients, which would leave its weights gathered: an
    optimizer made then would get the gathered copies, and the next forward would not see its updates."""
    if hasattr(model, "reshard") and not result.requires_grad:
        model.reshard()

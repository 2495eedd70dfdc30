"""What the sweep over architectures asks of one model; every check raises `Wrong`, or is refused by the library.

The truth is the model's own forward, in float64, on each row alone. B rows of T tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from prefuse.bench.tiny_models import NOT_TRIED, TOKENS, VOCABULARY, dtype_of, tiny_model
from prefuse.engine.errors import first_line
from prefuse.models.trunk import UnsupportedModel

TOLERANCE = 2e-5  # log-probabilities are float32


class Wrong(Exception):
    """The library gave a number that is not the model's own, and raised no error."""


class Refused(ValueError):
    """The engine refused the model; the message is its one-line error."""


class NoTruth(Exception):
    """The model's own forward does not do it, so nothing can be compared."""


def rows(lengths: tuple[int, ...] = (TOKENS, TOKENS - 9)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in lengths]


def own_logps(model, ids: Tensor, **inputs) -> Tensor:  # (T,) -> (T - 1,)
    """Of a row alone, from the model's own logits."""
    try:
        logits = model(input_ids=ids[None], use_cache=False, **inputs).logits
    except Exception as error:
        raise NoTruth(f"its own forward fails: {first_line(error)}") from error
    if logits.shape[:2] != (1, len(ids)):
        raise NoTruth(f"its own logits have the shape {tuple(logits.shape)}")
    picked = logits[0, :-1].log_softmax(-1)
    return picked.gather(-1, ids[1:, None])[:, 0]


def close(got: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    size = expected.abs().max().clamp(min=1)
    tolerance *= 1 if expected.dtype == torch.float64 else 10
    difference = ((got.double() - expected.double()).abs().max() / size).item()
    if not difference <= tolerance:
        raise Wrong(f"{what} differ by {difference:.2g} of their size")


# ---------------------------------------------------------------------------------------------------------
# The checks


def logps(model) -> None:
    """`sequence_logps` of a row against the model's logits, and the gradients of all weights."""
    from prefuse.transformers import sequence_logps

    (ids,) = rows((TOKENS,))
    expected = own_logps(model, ids)
    got = sequence_logps(model, ids[None], reduction="none")[0, 1:]
    close(got, expected, "log-probabilities")
    names, weights = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    try:
        expected = torch.autograd.grad(own_logps(model, ids).sum(), weights, allow_unused=True)
    except AssertionError as error:
        raise NoTruth(f"its own gradients in eval mode: {first_line(error)}") from error
    got = torch.autograd.grad(sequence_logps(model, ids[None]).sum(), weights, allow_unused=True)
    for name, mine, own in zip(names, got, expected, strict=True):
        zero = torch.zeros(())
        mine, own = (zero if x is None else x for x in (mine, own))
        size = own.norm().clamp(min=1e-3)
        if not (mine - own).norm() <= (1e-4 if own.dtype == torch.float64 else 2e-3) * size:
            raise Wrong(f"the gradient of {name} differs by {((mine - own).norm() / size).item():.2g} of its size")


def ahead(model) -> None:
    """Whether a model whose states depend on later tokens is refused."""
    from prefuse.transformers import sequence_logps

    (ids,) = rows((TOKENS,))
    other = ids.clone()
    other[-1] = 5 + (ids[-1] - 4) % (VOCABULARY - 5)
    change = (own_logps(model, ids)[:-1] - own_logps(model, other)[:-1]).abs().max().item()
    if change > 1e-6:
        sequence_logps(model, ids[None])
        raise Wrong(f"it looks ahead (a later token moves earlier log-probabilities by {change:.2g}) and is taken")


def padded(model) -> None:
    """Rows padded on the right, with their mask, against each row alone."""
    from prefuse.packing import pad
    from prefuse.transformers import sequence_logps

    alone = [own_logps(model, ids) for ids in rows()]
    ids, mask = pad([ids.tolist() for ids in rows()])
    if not _own_padded(model, ids, mask).isfinite().all():
        raise NoTruth("its own logits of a padded row are not finite")
    got = sequence_logps(model, ids, ids.masked_fill(mask == 0, -100), attention_mask=mask, reduction="none")
    for row, expected in zip(got, alone, strict=True):
        close(row[1 : len(expected) + 1], expected, "log-probabilities of a padded row and of the row alone")


def _own_padded(model, ids: Tensor, mask: Tensor) -> Tensor:
    try:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    except Exception as error:
        raise NoTruth(f"its own forward of padded rows fails: {first_line(error)}") from error


def flat(model) -> None:
    """Rows end to end, and completions that share a prompt, against each row alone."""
    from prefuse.attention import packed_hidden
    from prefuse.packing import pack
    from prefuse.transformers import check_head, head_of, sequence_logps, token_logps

    expected = torch.cat([own_logps(model, ids) for ids in rows()])
    ends = torch.tensor([0, *(len(ids) for ids in rows())]).cumsum(0).int()
    got = sequence_logps(model, torch.cat(rows())[None], cu_seqlens=ends, reduction="none")[0]
    first = torch.ones_like(got, dtype=torch.bool)
    first[ends[:-1].long()] = False
    close(got[first], expected, "log-probabilities of a flat batch and of the rows alone")
    prompt, chosen, rejected = (ids.tolist() for ids in rows((TOKENS - 12, 12, 5)))
    packed = pack([(prompt, [chosen, rejected])])
    sides = [own_logps(model, torch.tensor(prompt + side))[len(prompt) - 1 :] for side in (chosen, rejected)]
    close(token_logps(model, packed).logps, torch.cat(sides), "log-probabilities behind a shared prompt")
    check_head(model, torch.tensor([prompt]))
    hidden = packed_hidden(model, packed)
    logits = head_of(model).logits(hidden).double()
    got = logits.log_softmax(-1).gather(-1, packed.targets[:, None])[:, 0]
    close(got, torch.cat(sides), "log-probabilities from packed_hidden")


def loss(model) -> None:
    """`fuse_loss` against the model's own loss, alone and with the router's."""
    from prefuse.packing import pad
    from prefuse.transformers import fuse_loss

    ids, mask = pad([ids.tolist() for ids in rows()])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    asked = [{}, {"output_router_logits": True}] if "output_router_logits" in _arguments(model) else [{}]
    own = [_own_loss(model, input_ids=ids, attention_mask=mask, labels=labels, **more) for more in asked]
    fuse_loss(model)
    try:
        for more, expected in zip(asked, own, strict=True):
            what = "the loss asked for with the router's" if more else "the loss"
            try:
                got = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, **more).loss
            except ValueError:
                if not more:
                    raise
                continue  # with the router's it may be refused
            close(got, expected, f"{what}: {got.item():.4f} for {expected.item():.4f}; they")
    finally:
        model.__dict__.pop("forward", None)


def _own_loss(model, **inputs) -> Tensor:
    try:
        loss = model(**inputs, use_cache=False).loss
    except Exception as error:
        raise NoTruth(f"its own loss fails: {first_line(error)}") from error
    if not loss.isfinite():
        raise NoTruth("its own loss is not finite")
    return loss


def _arguments(model) -> set[str]:
    import inspect

    return set(inspect.signature(type(model).forward).parameters)


def engine(model) -> None:
    """Two steps of `prefuse train`, saved, and read back."""
    _train(model)


def lora(model) -> None:
    """Two steps of `prefuse train --use_peft true` with default targets."""
    _train(model, "--use_peft", "true", "--lora_r", "2")


def _train(model, *more: str) -> None:
    from transformers import AutoModelForCausalLM

    from prefuse.engine.cli import main

    with tempfile.TemporaryDirectory() as folder:
        base, run = Path(folder, "base"), Path(folder, "run")
        model.float().save_pretrained(base)
        character_tokenizer().save_pretrained(base)
        lines = [{"prompt": f"w9 w1{i} w2", "chosen": f"w3 w4{i} w5", "rejected": "w6 w7 w8 w9"} for i in range(4)]
        Path(folder, "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        flags = {"model_name_or_path": base, "dataset_name": Path(folder, "rows.jsonl"), "output_dir": run}
        flags |= {"max_steps": 2, "learning_rate": 1e-3, "device": "cpu", "save_steps": 0, "eval_fraction": 0}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        said = _Said()
        with said:
            status = main(["train", *words, *more])
        if status != 0:
            raise Refused(said.last_line().replace(str(base), "MODEL"))
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in log if "loss" in line]
        if not losses or abs(losses[0] - 0.693147) > 1e-3:
            raise Wrong(f"the first loss is {losses[:1]}, expected ln 2")
        if more:
            return
        again = AutoModelForCausalLM.from_pretrained(run).eval()
        if not torch.isfinite(own_logps(again, rows((TOKENS,))[0])).all():
            raise Wrong("the saved model's log-probabilities are not finite")


class _Said:
    """What is printed to stderr while this lasts."""

    def __enter__(self):
        import contextlib
        import io

        self.text = io.StringIO()
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(contextlib.redirect_stderr(self.text))
        self._stack.enter_context(contextlib.redirect_stdout(io.StringIO()))

    def __exit__(self, *error):
        self._stack.close()

    def last_line(self) -> str:
        return (self.text.getvalue().strip().splitlines() or ["no word"])[-1]


def character_tokenizer():
    """A byte-level BPE without merges, of the characters in the rows: also what classes that take a vocabulary and
    merges alone (Qwen 2's) make of its files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", "<x>", "w", "\u0120", *"0123456789"]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )


CHECKS: dict[str, Callable] = {"logps": logps, "ahead": ahead, "padded": padded, "flat": flat, "loss": loss}
RUNS: dict[str, Callable] = {"engine": engine, "lora": lora}  # seconds each


def examine(kind: str, checks: list[str]) -> dict[str, str]:
    """{check: "right", "refused: ...", "no truth: ...", "WRONG: ..."}, of a fresh model for each."""
    try:
        model = tiny_model(kind)
        own_logps(model, rows((TOKENS,))[0])
    except Exception as error:
        return {"model": f"no truth: {NOT_TRIED.get(kind) or f'{type(error).__name__}: {first_line(error)}'}"}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    results = {}
    for check in checks:
        results[check] = _one((CHECKS | RUNS)[check], model)
        model.to(dtype_of(kind)).eval().load_state_dict(state)
    return results


def _one(check: Callable, model) -> str:
    try:
        check(model)
    except Wrong as error:
        return f"WRONG: {error}"
    except NoTruth as error:
        return f"no truth: {error}"
    except (UnsupportedModel, ImportError, Refused) as error:
        return f"refused: {first_line(error)}"
    except Exception as error:
        return f"WRONG: ends in {type(error).__name__}: {first_line(error)}{_where(error)}"
    return "right"


def _where(error: BaseException) -> str:
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({Path(frame.filename).name}:{frame.lineno})"

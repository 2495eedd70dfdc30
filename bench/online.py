"""A GRPO learning step beside that of TRL's GRPOTrainer, on the same samples: CPU seconds, tokens, first ratios.

    prefuse bench online            # groups of 8 answers, prompts as long as answers, one thread, float32

Both take the same model, prompts, answers and advantages: forward, backward, clipping and AdamW's step, what
lies between sampling and the next round. TRL's side is `GRPOTrainer._compute_loss`, its fused head and all, without
gradient checkpointing, which would cost it a third more. Both in turn; the ratio is the median over rounds.

The first ratios: log-probabilities from a pass without gradients, against those of the training pass over the same
weights. TRL makes the two over other microbatches (it shuffles a generation batch in between), prefuse over the same.
Writes results/online-<cpu>-1threads-torch<version>.json and .md.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import prefuse
from prefuse.bench.record import RESULTS, cpu_model, environment, markdown, slug, write_result
from prefuse.engine.config.tools import ToolParser

GROUPS, ANSWERS, PROMPT, ANSWER = 2, 8, 128, 128  # prompts, answers to each, tokens of each
MODEL = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 16384, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Samples:
    prompts: list[list[int]]
    answers: list[list[list[int]]]
    advantages: Tensor  # (GROUPS * ANSWERS,)

    @property
    def rows(self) -> list[tuple[list[int], list[int]]]:
        return [(prompt, answer) for prompt, own in zip(self.prompts, self.answers, strict=True) for answer in own]


def draw(vocabulary: int) -> Samples:
    g = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, vocabulary, (count,), generator=g).tolist()

    # Answers of half to the whole length: padded batches carry what real ones do.
    lengths = torch.randint(ANSWER // 2, ANSWER + 1, (GROUPS, ANSWERS), generator=g).tolist()
    answers = [[tokens(n) for n in own] for own in lengths]
    rewards = torch.rand(GROUPS, ANSWERS, generator=g)
    return Samples(
        [tokens(PROMPT) for _ in range(GROUPS)], answers, prefuse.group_advantages(rewards).flatten().float()
    )


def make_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**MODEL, max_position_embeddings=2 * (PROMPT + ANSWER)))


def stepped(model, loss_of: Callable[[], Tensor]) -> Callable[[], float]:
    """One update by `loss_of`: the same for both."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


# ---- prefuse -------------------------------------------------------------------------------------


class Ours:
    def __init__(self, samples: Samples):
        from prefuse.attention import packed_hidden
        from prefuse.packing import pack

        self.model, self.samples, self.hidden = make_model().eval(), samples, packed_hidden
        self.packed = pack(list(zip(samples.prompts, samples.answers, strict=True)))
        self.step = stepped(self.model, self.loss)
        self.tokens = self.packed.num_tokens

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden(self.model, self.packed), self.model.lm_head.weight, self.packed.targets

    def loss(self) -> Tensor:
        rest = (self.packed.cu_seqlens, None, self.samples.advantages)
        return prefuse.linear_policy_loss(*self.arguments(), *rest, loss=prefuse.GRPO()).loss

    def first_ratios(self) -> Tensor:
        with torch.no_grad():
            old = prefuse.linear_logprobs(*self.arguments())
        out = prefuse.linear_policy_loss(*self.arguments(), self.packed.cu_seqlens, old, self.samples.advantages)
        return torch.exp(out.logps.double() - old.double())


# ---- TRL -----------------------------------------------------------------------------------------


class TRL:
    def __init__(self, samples: Samples, folder: str):
        self.samples, self.model = samples, make_model()
        self.trainer = self.make_trainer(folder)
        self.inputs = self.batch(range(len(samples.rows)))
        self.step = stepped(self.model, lambda: self.trainer._compute_loss(self.model, self.inputs))
        self.tokens = self.inputs["prompt_ids"].numel() + self.inputs["completion_ids"].numel()

    def make_trainer(self, folder: str):
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from trl import GRPOConfig, GRPOTrainer

        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(MODEL["vocab_size"])}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1")
        settings = GRPOConfig(
            folder, per_device_train_batch_size=GROUPS * ANSWERS, num_generations=ANSWERS, use_cpu=True, bf16=False,
            max_completion_length=ANSWER, gradient_checkpointing=False, report_to="none", save_strategy="no",
        )  # fmt: skip
        rows = Dataset.from_dict({"prompt": ["w2 w3"] * GROUPS})
        trainer = GRPOTrainer(self.model, lambda completions, **_: [0.0] * len(completions), settings, rows,
                              processing_class=tokenizer)  # fmt: skip
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        return trainer

    def batch(self, chosen) -> dict[str, Tensor]:
        """As `_generate_and_score_completions` returns it: prompts padded on the left, answers on the right."""
        rows = [self.samples.rows[i] for i in chosen]
        width = max(len(answer) for _, answer in rows)
        ids = torch.tensor([answer + [1] * (width - len(answer)) for _, answer in rows])
        mask = torch.tensor([[1] * len(answer) + [0] * (width - len(answer)) for _, answer in rows])
        prompts = torch.tensor([prompt for prompt, _ in rows])
        return {
            "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": ids,
            "completion_mask": mask, "advantages": self.samples.advantages[list(chosen)],
            "num_items_in_batch": mask.sum(),
        }  # fmt: skip

    def logps(self, chosen) -> Tensor:
        """(N,) of these answers, as one microbatch."""
        b = self.batch(chosen)
        ids, mask = (torch.cat([b[f"prompt_{x}"], b[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        logps, *_ = self.trainer._get_per_token_logps_and_entropies(self.model, ids, mask, b["completion_ids"].shape[1])
        return torch.cat([row[kept.bool()] for row, kept in zip(logps, b["completion_mask"], strict=True)])

    def first_ratios(self) -> Tensor:
        """Two microbatches before, two others after the shuffle."""
        count = len(self.samples.rows)
        half, order = count // 2, torch.randperm(count, generator=torch.Generator().manual_seed(2)).tolist()
        lengths = [len(answer) for _, answer in self.samples.rows]
        with torch.no_grad():
            old = torch.cat([self.logps(range(half)), self.logps(range(half, count))]).split(lengths)
        parts = [self.logps(order[:half]), self.logps(order[half:])]
        new = torch.cat(parts).detach().split([lengths[i] for i in order])
        return torch.cat([torch.exp(x.double() - old[i].double()) for x, i in zip(new, order, strict=True)])


def measure(rounds: int) -> dict:
    samples = draw(MODEL["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        sides = {"prefuse": Ours(samples), "TRL": TRL(samples, folder)}
        ratios = {name: (side.first_ratios() - 1).abs() for name, side in sides.items()}
        losses = {name: side.step() for name, side in sides.items()}  # warm-up
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in sorted(sides, reverse=number % 2 == 0):
                start = time.process_time()
                sides[name].step()
                seconds[name].append(time.process_time() - start)
    ratio = statistics.median(a / b for a, b in zip(seconds["TRL"], seconds["prefuse"], strict=True))
    return {
        "seconds": seconds, "trl_over_prefuse": ratio, "tokens": {name: side.tokens for name, side in sides.items()},
        "first_loss": losses,
        "first_ratio_off_by": {name: {"max": x.max().item(), "share_not_1": (x > 0).double().mean().item()}
                               for name, x in ratios.items()},
    }  # fmt: skip


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    import trl

    found = measure(args.rounds)
    shape = {"groups": GROUPS, "answers": ANSWERS, "prompt": PROMPT, "answer": [ANSWER // 2, ANSWER], **MODEL}
    path = RESULTS / f"online-{slug(cpu_model())}-1threads-torch{torch.__version__.split('+')[0]}.json"
    write_result(
        path, "online", {"environment": environment(), "settings": shape | {"rounds": args.rounds}, **found}, seed=1
    )
    rows = [
        [
            name, f"{statistics.median(found['seconds'][name]):.3f}", str(found["tokens"][name]),
            f"{found['first_loss'][name]:.6f}", f"{found['first_ratio_off_by'][name]['max']:.1e}",
            f"{found['first_ratio_off_by'][name]['share_not_1']:.0%}",
        ]
        for name in ("prefuse", "TRL")
    ]  # fmt: skip
    header = ["", "CPU seconds a step", "tokens run", "loss", "first ratio off by", "tokens off 1"]
    title = (
        f"# A GRPO step on {GROUPS} groups of {ANSWERS}, prompts of {PROMPT} and answers of {ANSWER // 2} to {ANSWER} "
        f"tokens, {MODEL['num_hidden_layers']} layers of {MODEL['hidden_size']}, V = {MODEL['vocab_size']}, float32, "
        f"{cpu_model()}, one thread, torch {torch.__version__}, TRL {trl.__version__}"
    )
    last = f"TRL / prefuse: {found['trl_over_prefuse']:.2f} (median of {args.rounds} rounds)"
    text = "\n".join([title, "", markdown(header, rows), "", last])
    path.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

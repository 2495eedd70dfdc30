"""DPO in a plain PyTorch loop over padded batches, in the form of the original DPO repository.

    python examples/padded_loop.py            # seconds on a CPU

The loop stays as it was. Two names change, marked below: the forward that made (2P, T, V) logits and gathered from
them, and the loss. A tiny model learns to answer with even tokens.
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prefuse
from prefuse.padded import concatenated_forward, preference_loss  # the two that change

VOCABULARY, PAIRS, STEPS = 256, 16, 30


def side(generator, parity):
    """Padded rows of a prompt and a completion of unequal lengths; labels are -100 but on the completion."""
    rows = []
    for _ in range(PAIRS):
        prompt, length = (int(torch.randint(low, 9, (), generator=generator)) for low in (3, 2))
        tokens = torch.randint(1, VOCABULARY // 2, (prompt + length,), generator=generator) * 2
        tokens[prompt:] += parity
        rows.append((tokens, prompt))
    ids, mask, labels = torch.zeros(3, PAIRS, max(len(tokens) for tokens, _ in rows), dtype=torch.long)
    labels.fill_(-100)
    for i, (tokens, prompt) in enumerate(rows):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i, prompt : len(tokens)] = tokens[prompt:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    sides = {name: side(generator, parity) for name, parity in (("chosen", 0), ("rejected", 1))}
    return {f"{name}_{key}": x for name, rows in sides.items() for key, x in rows.items()}


def main():
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, **shape))
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-4)
    held_out = make_batch(10**6)
    for step in range(STEPS + 1):
        batch = make_batch(step) if step < STEPS else held_out
        chosen, rejected = concatenated_forward(policy, batch)  # was: model(...).logits, then _get_batch_logps
        with torch.no_grad():
            ref_chosen, ref_rejected = concatenated_forward(reference, batch)
        loss = prefuse.DPO(beta=0.1)
        losses, chosen_rewards, rejected_rewards = preference_loss(chosen, rejected, ref_chosen, ref_rejected, loss)
        accuracy = (chosen_rewards > rejected_rewards).double().mean().item()
        where = "held out" if step == STEPS else f"step {step}"
        print(f"{where}: loss {losses.mean().item():.4f} reward accuracy {accuracy:.2f}")
        if step < STEPS:
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()


if __name__ == "__main__":
    main()

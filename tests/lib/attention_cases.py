"""Inputs of shared-prefix attention, and variable-length attention written from the kernels' documentation."""

import torch

# One completion, a pair, five of them; prompts and completions of one token; a prompt longer than any window below.
LENGTHS = [[9, 4, 6], [1, 3], [5, 1], [4, 2, 1, 7, 1, 3], [12, 8, 1]]


def inputs(heads, d=8, dtype=torch.float64, lengths=LENGTHS, requires_grad=True):
    tokens = sum(map(sum, lengths))
    shapes = [(1, h, tokens, d) for h in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, dtype=dtype).mul(2).requires_grad_(requires_grad) for shape in shapes]


def reference_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size, softcap):
    """flash_attn_varlen_func by its documentation: causal, sequences aligned at their end, `window_size` tokens to the
    left and right of the one that stands at the same place."""
    assert q.is_contiguous()
    assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
    assert (cu_q.diff().max(), cu_k.diff().max(), cu_q[-1], cu_k[-1]) == (max_q, max_k, len(q), len(k))
    left, right = window_size
    assert right == 0
    outputs = []
    for (q0, q1), (k0, k1) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        share = q.shape[1] // k.shape[1]
        keys, values = (x[k0:k1].repeat_interleave(share, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        column = torch.arange(k1 - k0)[None]
        hidden = (column > place) | ((left >= 0) & (column < place - left))
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)

"""Model FLOPs utilization (MFU): the arithmetic that training needs, as a share of what the device could do.

Chowdhery et al. 2022 (PaLM), appendix B, without their attention term, so it is a little too low for long texts. Tokens
are those that run: sharing a prompt makes a run faster, not its MFU. Recomputed activations, KTO's pass over
mismatches and optimizer steps count as nothing.
"""

import torch
from torch import nn

from prefuse.engine.batches import Batch
from prefuse.engine.forward import LanguageModel

# Dense bfloat16 or float16 per second, by the makers' data sheets; the first name that the device's contains.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}


def peak_flops(lm: LanguageModel) -> float | None:
    """Of the device in the precision of the run; None where that is not known, as for every CPU, and for mixtures of
    experts, whose weights are not all used by a token."""
    config = lm.model.config.get_text_config()
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    half = lm.compute_dtype in (torch.bfloat16, torch.float16)
    if lm.device.type != "cuda" or experts or not half:
        return None
    device = torch.cuda.get_device_name(lm.device)
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)


def training_flops(lm: LanguageModel, batch: Batch) -> int:
    """Forward and backward: 6 per weight and token, of those that run in the trunk and the completion's in the head."""
    return 6 * (trunk_weights(lm.model) * batch.tokens.num_tokens + lm.head.weight.numel() * len(batch.targets))


def trunk_weights(model: nn.Module) -> int:
    """Weights that a token is multiplied by, outside of the head."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    tables.add(id(model.get_output_embeddings().weight))
    return sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in tables)

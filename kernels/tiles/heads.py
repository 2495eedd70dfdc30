"""Output heads of released models, for which times are predicted, measured, and tiles raced (by their config.json)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReleasedHead:
    d: int  # hidden size
    v: int  # vocabulary
    softcap: float | None = None


RELEASED_HEADS = {
    "Llama-3-8B": ReleasedHead(4096, 128256),
    "Llama-3.2-1B": ReleasedHead(2048, 128256),
    "Qwen2.5-0.5B": ReleasedHead(896, 151936),
    "Qwen2.5-7B": ReleasedHead(3584, 152064),
    "Gemma-2-2B": ReleasedHead(2304, 256000, softcap=30.0),
    "Gemma-3-4B": ReleasedHead(2560, 262208),
    "SmolLM2-1.7B": ReleasedHead(2048, 49152),
    "SmolLM2-135M": ReleasedHead(576, 49152),
}

"""What turns `hidden @ weight.T` into the logits a model trains on, and the names of the optional outputs."""

from __future__ import annotations

from dataclasses import dataclass

# Per-token outputs besides the log-probability, in the order the implementations stack them.
OUTPUTS = ("entropy", "mean_logits", "log_sum_sq_probs", "is_top1")


@dataclass(frozen=True)
class HeadOptions:
    """The head's transform, in the order models apply it.

    x = hidden @ weight.T + bias
    z = softcap * tanh(logit_scale * x / softcap) / temperature      (softcap None: logit_scale * x / temperature)
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    ignore_index: int = -100

    @property
    def slope(self) -> float:
        """dz/dx where the softcap is flat: `logit_scale / temperature`."""
        return self.logit_scale / self.temperature

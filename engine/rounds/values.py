"""PPO's value head: a linear reading of the policy's hidden states, which it does not move.

    V_t = w . h_t + b      h_t: the state that predicts token t

It has an optimizer of its own and steps with the policy. It begins at 0, so the first advantages are the rewards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prefuse.engine.run.ranks import Ranks


class ValueHead(nn.Module):
    def __init__(self, width: int, learning_rate: float, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.optimizer = torch.optim.Adam(self.linear.parameters(), lr=learning_rate)

    def forward(self, hidden: Tensor) -> Tensor:  # (N, D) -> (N,) float32
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.detach().float())[:, 0]

    def step(self, ranks: Ranks) -> None:
        """With the gradients that the policy's step has left here, summed over the ranks."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.linear.parameters()]
        gradients = [ranks.sum_(gradient) for gradient in gradients]
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            for p, gradient in zip(self.linear.parameters(), gradients, strict=True):
                p.grad = gradient
            self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict:
        """As numbers that JSON keeps to the last bit."""
        parameters = list(self.linear.parameters())
        states = [self.optimizer.state.get(p, {}) for p in parameters]
        return {
            "weights": [p.detach().flatten().tolist() for p in parameters],
            "states": [{name: x.flatten().tolist() for name, x in state.items()} for state in states],
        }

    @torch.no_grad()
    def restore(self, state: dict) -> None:
        for p, weights, states in zip(self.linear.parameters(), state["weights"], state["states"], strict=True):
            p.copy_(torch.tensor(weights).reshape(p.shape))
            if states:
                like = {
                    name: p.new_tensor(values).reshape(p.shape) for name, values in states.items() if name != "step"
                }
                self.optimizer.state[p] = {"step": torch.tensor(states["step"][0]), **like}

"""The tail: from log-probabilities to a preference loss and its metrics, in one Triton launch each way."""

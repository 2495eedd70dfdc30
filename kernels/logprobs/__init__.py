"""`linear_logprobs`: log-probabilities of target tokens, straight from hidden states and the weight of the head."""

"""`linear_kl`: the exact KL divergence of each token, straight from two sets of hidden states and two heads."""

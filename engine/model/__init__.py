"""A causal language model with its tokenizer: loaded, prepared, run, saved."""

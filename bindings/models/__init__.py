"""What is known of the causal language models of transformers: their trunk, their head, flat batches through them."""

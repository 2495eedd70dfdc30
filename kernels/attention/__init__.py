"""Attention over flat batches: sequences end to end in one row, whose groups share a prompt."""

"""What a training run is made of: its set-up, ranks, optimizer, checkpoints, guards and signals."""

"""What is right: float64 oracles written from the papers, and the cases and tolerances of tests and benchmarks."""

"""What tests and benchmarks share: evaluating a call, memory layouts, error measures."""

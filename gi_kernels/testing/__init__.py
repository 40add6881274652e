"""What tests and benchmarks share: evaluating a call, layouts, error measures, published formulations."""

"""What benchmarks, tests and the demo share: the published style of a step, and steps to time."""

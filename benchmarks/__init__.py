"""peftlite beside real PEFT, in one process, on the same weights: `python -m benchmarks`."""

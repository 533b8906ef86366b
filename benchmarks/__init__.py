"""Benchmarks of the loss against plain PyTorch; `python -m benchmarks --help` and README.md say how to run them."""

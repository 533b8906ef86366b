"""What `pytest benchmarks/` and `make bench` run: groups, plans, the process that measures, whole training steps."""

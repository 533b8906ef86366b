"""`make gpu`: tests and measurements on a GPU within minutes; `python -m benchmarks.gpu --help`."""

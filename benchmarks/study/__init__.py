"""The accuracy study: does the loss help, and against what; `python -m benchmarks.study --help`."""

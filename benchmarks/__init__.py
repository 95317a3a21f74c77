"""The figures in docs/results.md, each measured by one file here: `python -m benchmarks [NAME ...]`."""

"""What steps cost, side by side; see `benchmarks/README.md`."""

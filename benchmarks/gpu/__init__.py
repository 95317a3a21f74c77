"""What a machine with one GPU must show; on a CPU the same in tiny shapes. See `benchmarks/gpu.sh`."""

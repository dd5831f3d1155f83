"""Speed and memory, measured as ratios against named peers: python -m benchmarks."""

"""Starting vLLM servers from Python: for the demonstration, the tests and the benchmarks."""

"""Integration with vLLM: plugin, attention backend, dense attention, metrics, and server tools."""

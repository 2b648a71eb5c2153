"""The adamas and the stock backend under the same traffic, one after the other: `vllm-adamas loadtest`."""

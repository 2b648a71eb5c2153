"""Speed on the user's own model and device: the command `vllm-adamas bench`."""

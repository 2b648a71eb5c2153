"""Seeded traffic against a live server, checked against a reference: `vllm-adamas storm URL`."""

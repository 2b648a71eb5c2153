"""What an engineer runs on a host before traffic: the command ``vllm-adamas doctor``."""

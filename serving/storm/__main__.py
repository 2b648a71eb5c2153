"""`python -m vllm_adamas.serving.storm URL`: the same as `vllm-adamas storm URL`."""

import sys

from vllm_adamas.cli import main

sys.exit(main(["storm", *sys.argv[1:]]))

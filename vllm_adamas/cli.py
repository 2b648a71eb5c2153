"""The ``vllm-adamas`` command."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

from vllm_adamas import __version__, compat
from vllm_adamas.config import AdamasConfig
from vllm_adamas.errors import AdamasError

DTYPES = ("bfloat16", "float16", "float32", "fp8")


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand; an unmet constraint prints one sentence and gives exit status 2."""
    parser = argparse.ArgumentParser(prog="vllm-adamas", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser(
        "info", help="resolved configuration, kernels, versions, page arithmetic"
    )
    info.add_argument(
        "--config", default="{}", metavar="JSON", help="the options you would give under 'adamas'"
    )
    info.add_argument(
        "--model", metavar="DIR", help="folder with a config.json, for the page arithmetic"
    )
    info.add_argument("--head-size", type=int, default=128)
    info.add_argument("--num-kv-heads", type=int, default=8)
    info.add_argument("--num-layers", type=int, default=32)
    info.add_argument("--kv-cache-dtype", choices=DTYPES, default="bfloat16")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except AdamasError as error:
        print(f"vllm-adamas: {error}", file=sys.stderr)
        return 2


def _info(args) -> int:
    try:
        options = json.loads(args.config)
    except json.JSONDecodeError as error:
        raise AdamasError(
            f"--config is not JSON ({error}): quote it as '{{\"token_budget\": 256}}'."
        ) from None
    config = AdamasConfig.parse(options)
    shape = _model_shape(args)
    report = {
        "versions": _versions(),
        "kernels": _kernels(config),
        "configuration": {
            **config.model_dump(mode="json"),
            "thresholds": str(config.coding(shape["head_size"])),
        },
        "page": _page(shape),
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for title, section in report.items():
        print(title)
        for key, value in section.items():
            print(f"  {key:24} {value}")
    return 0


def _versions() -> dict[str, str]:
    import torch

    versions = {
        "vllm-adamas": __version__,
        "vllm": compat.vllm_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "apache-tvm-ffi"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _kernels(config: AdamasConfig) -> dict[str, str]:
    from vllm_adamas.backends import get_backend

    found = {}
    for name in ("cpu", "reference"):
        try:
            found[name] = get_backend(name).description
        except AdamasError as error:
            found[name] = f"not available: {error}"
    found["used here"] = get_backend(config.kernels).description
    return found


def _model_shape(args) -> dict:
    shape = {
        "head_size": args.head_size,
        "num_kv_heads": args.num_kv_heads,
        "num_layers": args.num_layers,
        "dtype": args.kv_cache_dtype,
    }
    if args.model is None:
        return shape
    path = Path(args.model) / "config.json"
    if not path.is_file():
        raise AdamasError(
            f"{path} does not exist: give --model the folder of a Hugging Face model."
        )
    model = json.loads(path.read_text())
    model = model.get("text_config", model)
    try:
        heads = model["num_attention_heads"]
        shape["head_size"] = model.get("head_dim") or model["hidden_size"] // heads
        shape["num_kv_heads"] = model.get("num_key_value_heads") or heads
        shape["num_layers"] = model["num_hidden_layers"]
    except KeyError as missing:
        raise AdamasError(
            f"{path} has no {missing}: give --head-size, --num-kv-heads and --num-layers instead of --model."
        ) from None
    return shape


def _page(shape: dict) -> dict:
    import torch

    from vllm_adamas.layout import PageLayout, overhead, token_bytes

    dtype = torch.uint8 if shape["dtype"] == "fp8" else getattr(torch, shape["dtype"])
    size = shape["head_size"]
    PageLayout(size, 32, dtype)  # refuses an unsupported head size
    dense = 2 * size * dtype.itemsize
    content = token_bytes(size, dtype)
    tokens = shape["num_kv_heads"] * shape["num_layers"]
    return {
        **shape,
        "K and V": f"{dense} bytes per token and KV head",
        "signature": f"{size // 4} bytes of codes + 2 bytes of scale",
        "total": f"{content} bytes per token and KV head (+{100 * overhead(size, dtype):.1f}%)",
        "per token, all layers": f"{content * tokens / 1024:.1f} KiB",
        "capacity": f"{100 * dense / content:.1f}% of a dense KV cache's tokens",
    }


if __name__ == "__main__":
    sys.exit(main())

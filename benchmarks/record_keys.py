"""Records keys and queries of a model for benchmarks/keys.py, over real text, through the engine on a CPU.

Keys are recorded after RoPE, as a backend gets them, of chosen layers and KV heads. Queries are those of
the last ``QUERIES`` decode steps, which attend to every token. The text of a window is forced, so the
queries are those of the text. A file holds one window per text.

    python scripts/fetch_texts.py && make model && python scripts/fetch_model.py gemma3
    python benchmarks/record_keys.py .models/SmolLM2-135M-Instruct --heads 3:0 15:1 27:2 \\
        --text .texts/alice.txt .texts/workshop.txt
    python benchmarks/record_keys.py .models/gemma-3-270m --heads 11:0 --context 32768 --keep 12288 \\
        --text .texts/workshop.txt
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import keys
import torch

from vllm_adamas.environment import Environment
from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate import texts
from vllm_adamas.evaluate.delegate import DelegatingBackend
from vllm_adamas.evaluate.engine import Engine, local_model

QUERIES = 64  #: decode steps at the end of a window whose queries are recorded
MEMORY_SHARE = 0.2  #: of the host, for the KV cache of one window


class KeyRecorder(DelegatingBackend):
    """Keeps the keys and decode queries of one request, in the order of its positions.

    Args:
        number: index of the layer.
        record: keys ``[T, Hkv, D]`` and queries ``[1, Hq, D]`` of every layer, added to.
    """

    def __init__(self, inner, number: int, record: dict[int, tuple[list, list]]):
        super().__init__(inner)
        self.keys, self.queries = record.setdefault(number, ([], []))

    def append(self, layer, key, value, slot_mapping):
        self.inner.append(layer, key, value, slot_mapping)
        self.keys.append(key[: len(slot_mapping)][slot_mapping >= 0].float())

    def decode(self, layer, query, batch, output, stats):
        self.inner.decode(layer, query, batch, output, stats)
        self.queries.append(query[: len(batch.seq_lens)].float())


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("--heads", nargs="+", required=True, help="LAYER:KV_HEAD of each head")
    parser.add_argument("--text", nargs="+", required=True, help="plain text files")
    parser.add_argument("--context", type=int, default=8192, help="tokens of a window")
    parser.add_argument(
        "--keep", type=int, help=f"tokens kept, the first {keys.FIRST} and the last; default: all"
    )
    return parser.parse_args()


def record_window(engine: Engine, request, heads: list[tuple[int, int]]) -> tuple:
    """Keys ``[T, S, D]`` and queries ``[QUERIES, S, G, D]`` of a window.

    Raises:
        AdamasError: the model does not have such a layer or KV head.
    """
    record: dict[int, tuple[list, list]] = {}
    engine.use({"token_budget": 1.0, "num_dense_layers": 0}, partial(KeyRecorder, record=record))
    engine.run([request], progress="window")
    found = []
    for layer, head in heads:
        key, query = (
            torch.cat(list(parts)) for parts in record.get(layer, ([torch.empty(0, 0)],) * 2)
        )
        if head >= key.shape[1]:
            raise AdamasError(
                f"the model has no KV head {head} in a layer {layer}: give heads of its {len(record)} layers."
            )
        query = query.unflatten(1, (key.shape[1], -1))  # [QUERIES, Hkv, G, D]
        found.append((key[:, head], query[:, head]))
    return tuple(torch.stack(parts, 1) for parts in zip(*found, strict=True))


def kept(key: torch.Tensor, tokens: int | None) -> torch.Tensor:
    """The first tokens of a window and the last ones, ``tokens`` in all: ``[tokens, S, D]``."""
    if tokens is None or tokens >= len(key):
        return key
    return torch.cat((key[: keys.FIRST], key[keys.FIRST - tokens :]))


def main() -> None:
    args = parse_args()
    heads = [tuple(map(int, text.split(":"))) for text in args.heads]
    sources = texts.read(args.text)
    engine = Engine(
        local_model(args.model), args.context, max_num_seqs=1, gpu_memory_utilization=MEMORY_SHARE
    )
    windows = []
    for source in sources:
        (request,) = texts.windows(engine.tokenizer, [source], args.context, QUERIES, 1)
        key, query = record_window(engine, request, heads)
        windows.append((kept(key, args.keep), query))
    engine.close()
    key, query = (torch.stack(parts) for parts in zip(*windows, strict=True))
    model = Path(args.model).name
    about = {
        "model": model,
        "heads": [{"layer": layer, "kv_head": head} for layer, head in heads],
        "context": args.context - 1,
        "positions": f"the first {keys.FIRST} and the last {key.shape[1] - keys.FIRST}",
        "queries": f"of the last {QUERIES} positions",
        "texts": {source.name: source.sha256 for source in sources},
        "keys": "after RoPE, 8 bits with a scale per token and head",
        "environment": Environment.capture(Path(__file__).parent).record(),
    }
    path = keys.RECORDINGS / f"keys_{model}.npz"
    keys.save(path, key, query, about)
    print(
        f"wrote {path}: keys {list(key.shape)}, queries {list(query.shape)}, {path.stat().st_size} bytes"
    )


if __name__ == "__main__":
    try:
        main()
    except AdamasError as error:
        sys.exit(str(error))

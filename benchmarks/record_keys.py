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
from vllm_adamas.evaluate.engine import Engine, Request, local_model

QUERIES = 64  #: decode steps at the end of a window whose queries are recorded
MEMORY_SHARE = 0.2  #: of the host, for the KV cache of one window


class KeyRecorder(DelegatingBackend):
    """Keeps the keys and decode queries of one request, in the order of its positions.

    Layers with a sliding window are left out, since they do not select.

    Args:
        number: index of the layer.
        record: keys ``[T, Hkv, D]`` and queries ``[1, Hq, D]`` of every layer, added to.
    """

    def __init__(self, inner, number: int, record: dict[int, tuple[list, list]]):
        super().__init__(inner)
        self.keys, self.queries = record.setdefault(number, ([], []))

    def append(self, layer, key, value, slot_mapping):
        self.inner.append(layer, key, value, slot_mapping)
        if not layer.params.sliding_window:
            self.keys.append(key[: len(slot_mapping)][slot_mapping >= 0].float())

    def decode(self, layer, query, batch, output, stats):
        self.inner.decode(layer, query, batch, output, stats)
        if not layer.params.sliding_window:
            self.queries.append(query[: len(batch.seq_lens)].float())


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument(
        "--heads", nargs="+", required=True, type=head_of, help="LAYER:KV_HEAD of each head"
    )
    parser.add_argument("--text", nargs="+", required=True, help="plain text files")
    parser.add_argument("--context", type=int, default=8192, help="tokens of a window")
    parser.add_argument(
        "--keep", type=int, help=f"tokens kept, the first {keys.FIRST} and the last; default: all"
    )
    args = parser.parse_args()
    if args.keep is not None and args.keep <= keys.FIRST:
        parser.error(
            f"--keep {args.keep} leaves nothing but the first tokens: give more than {keys.FIRST}."
        )
    return args


def head_of(text: str) -> tuple[int, int]:
    """Layer and KV head of a text such as ``15:1``."""
    layer, _, head = text.partition(":")
    if not (layer.isdecimal() and head.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no head: give LAYER:KV_HEAD, as in 15:1.")
    return int(layer), int(head)


def record_window(
    engine: Engine, request: Request, heads: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a window and returns :func:`heads_of` it."""
    record: dict[int, tuple[list, list]] = {}
    engine.use({"token_budget": 1.0, "num_dense_layers": 0}, partial(KeyRecorder, record=record))
    engine.run([request], progress="window")
    return heads_of(record, heads)


def heads_of(
    record: dict[int, tuple[list, list]], heads: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``[T, S, D]`` and queries ``[P, S, G, D]`` of S (layer, KV head).

    Raises:
        AdamasError: the model does not have such a layer or KV head.
    """
    found = []
    for layer, head in heads:
        recorded = {number for number, (parts, _) in record.items() if parts}
        if layer not in recorded or head >= record[layer][0][0].shape[1]:
            raise AdamasError(
                f"the model has no KV head {head} in layer {layer} with full attention: give "
                f"LAYER:KV_HEAD of its layers {', '.join(map(str, sorted(recorded)))}."
            )
        key, query = map(torch.cat, record[layer])
        query = query.unflatten(1, (key.shape[1], -1))  # [P, Hkv, G, D]
        found.append((key[:, head], query[:, head]))
    taken, asked = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
    return taken, asked


def kept(key: torch.Tensor, tokens: int | None) -> torch.Tensor:
    """The first tokens of a window and the last ones, ``tokens`` in all: ``[tokens, S, D]``."""
    if tokens is None or tokens >= len(key):
        return key
    return torch.cat((key[: keys.FIRST], key[keys.FIRST - tokens :]))


def main() -> None:
    args = parse_args()
    sources = texts.read(args.text)
    engine = Engine(
        local_model(args.model), args.context, max_num_seqs=1, gpu_memory_utilization=MEMORY_SHARE
    )
    windows = []
    for source in sources:
        (request,) = texts.windows(engine.tokenizer, [source], args.context, QUERIES, 1)
        key, query = record_window(engine, request, args.heads)
        windows.append((kept(key, args.keep), query))
    engine.close()
    key, query = (torch.stack(parts) for parts in zip(*windows, strict=True))
    model = Path(args.model).name
    about = {
        "model": model,
        "heads": [{"layer": layer, "kv_head": head} for layer, head in args.heads],
        "context": args.context - 1,
        "positions": f"the first {keys.FIRST} and the last {key.shape[1] - keys.FIRST}",
        "queries": f"of the last {QUERIES} positions",
        "texts": {source.name: source.sha256 for source in sources},
        "keys": "after RoPE, 8 bits",
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

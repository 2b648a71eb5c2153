"""Calibration: mean keys and what each setting keeps of the attention, from a few thousand tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from vllm_adamas import __version__
from vllm_adamas import profile as profiles
from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate import texts
from vllm_adamas.evaluate.engine import Engine, Request
from vllm_adamas.evaluate.shadow import KeyCapture, KeyRecord, MassRecord, Shadow

BUDGETS = (32, 64, 128, 256, 512, 1024)
#: What a profile holds a table of. Options beside the profile; None is without it.
SETTINGS = {
    "dot": {"score": "dot", "selection": "kv_head"},
    "dot, per query head": {"score": "dot", "selection": "query_head"},
    "manhattan": {"score": "manhattan", "selection": "query_head"},
    "dot, not centred": {"score": "dot", "selection": "kv_head", "profile": None},
}
ORACLE = "oracle"
STEPS = 32  #: decode steps per window
MAX_DENSE_LAYERS = 4


def calibrate(
    model: str,
    sources: Sequence[texts.Text],
    *,
    tokens: int = 12288,
    context: int = 4096,
    wanted_recall: float = 0.95,
    **engine_options,
) -> profiles.Profile:
    """Runs the model densely over the texts for its mean keys, then measures each setting with them.

    Args:
        tokens: at most so many are read, in windows of ``context``.
        wanted_recall: share of the oracle's attention mass that the suggested budget shall keep.

    Raises:
        AdamasError: texts shorter than a window, or a model that the backend cannot serve.
    """
    budgets = tuple(b for b in BUDGETS if b <= context // 2)
    if not budgets:
        raise AdamasError(f"--context {context} is too short to calibrate on: give at least 64.")
    engine = Engine(model, context + 64, **engine_options)
    windows = texts.windows(
        engine.tokenizer, sources, context, min(STEPS, context // 4), max(1, tokens // context)
    )
    keys = KeyRecord()
    engine.use({"token_budget": 1.0}, partial(KeyCapture, record=keys))
    engine.run(windows, progress="mean keys")
    identity = profiles.identify(engine.model_config)
    layers = [_layer(keys, layer) for layer in sorted(keys.tokens)]
    made = profiles.Profile(
        created_by=f"vllm-adamas {__version__}",
        model=identity,
        tokens=len(windows) * context,
        texts={text.name: text.sha256 for text in sources},
        context=context,
        suggestion=profiles.Suggestion(
            wanted_recall=wanted_recall, token_budget=1, num_dense_layers=0, reached=False
        ),
        layers=layers,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        made.save(path)
        tables = {
            name: _measure(engine, windows, {"profile": str(path), **options}, budgets, name)
            for name, options in SETTINGS.items()
        }
    layers = [
        layer.model_copy(update={"mass": _masses(tables, number)})
        for number, layer in enumerate(layers)
    ]
    engine.close()
    suggestion = suggest(layers, wanted_recall)
    return made.model_copy(update={"layers": layers, "suggestion": suggestion})


def _layer(keys: KeyRecord, layer: int) -> profiles.LayerProfile:
    count = keys.tokens[layer]
    mean, squares = keys.sum[layer] / count, keys.squares[layer] / count  # [Hkv, D], [Hkv]
    return profiles.LayerProfile(
        key_mean=profiles.encode_mean(mean),
        key_rms=_rounded((squares / mean.shape[1]).sqrt()),
        mean_share=_rounded(mean.square().sum(1) / squares),
    )


def _measure(
    engine: Engine, windows: list[Request], options: dict, budgets: tuple[int, ...], name: str
) -> MassRecord:
    record = MassRecord(budgets)
    engine.use(
        {"token_budget": 1.0, **options},  # dense, so that all settings see the same queries
        partial(Shadow, record=record, stride=4),
    )
    engine.run(windows, progress=name)
    return record


def _masses(tables: dict[str, MassRecord], layer: int) -> dict[str, dict[str, float]]:
    if layer not in next(iter(tables.values())).layers():
        return {}  # a sliding window: dense
    masses = {}
    for name, record in tables.items():
        for what, title in (("mass", name), ("oracle", ORACLE)):
            if title not in masses:
                row = record.layers().index(layer)
                masses[title] = {
                    str(b): round(float(record.mean(what, b)[row].mean()), 4)
                    for b in record.budgets
                }
    return masses


def suggest(layers: list[profiles.LayerProfile], wanted: float, name: str = "dot"):
    """Smallest budget that keeps ``wanted`` of the oracle's mass, averaged over the sparse layers.

    First layers stay dense as long as they keep less than that with the largest budget measured.
    """
    sparse = [(n, layer.mass) for n, layer in enumerate(layers) if layer.mass]
    recall = {
        n: {int(b): mass[name][b] / mass[ORACLE][b] for b in mass[name]} for n, mass in sparse
    }
    budgets = sorted(next(iter(recall.values())))
    dense = 0
    for n in list(recall)[: min(MAX_DENSE_LAYERS, len(recall) - 1)]:
        if recall[n][budgets[-1]] >= wanted:
            break
        dense = n + 1
    kept = [by_budget for n, by_budget in recall.items() if n >= dense]
    means = {b: sum(r[b] for r in kept) / len(kept) for b in budgets}
    reached = [b for b in budgets if means[b] >= wanted]
    return profiles.Suggestion(
        wanted_recall=wanted,
        token_budget=reached[0] if reached else budgets[-1],
        num_dense_layers=dense,
        reached=bool(reached),
    )


def _rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]

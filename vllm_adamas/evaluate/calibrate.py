"""Calibration: balance, mean keys and kept attention mass, measured on a few thousand tokens."""

from __future__ import annotations

import bisect
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from vllm_adamas import __version__
from vllm_adamas import profile as profiles
from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate import texts
from vllm_adamas.evaluate.engine import Engine, Request, check_profile
from vllm_adamas.evaluate.recorders import Capture, ChannelRecord, MassRecord, Shadow
from vllm_adamas.identity import identify

BUDGETS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Settings that a profile holds tables for, as options besides the profile; None runs without it.
SETTINGS = {
    "dot": {"score": "dot", "selection": "kv_head"},
    "dot, per query head": {"score": "dot", "selection": "query_head"},
    "manhattan": {"score": "manhattan", "selection": "query_head", "profile": None},
    "dot, no profile": {"score": "dot", "selection": "kv_head", "profile": None},
    "dot, per query head, no profile": {
        "score": "dot",
        "selection": "query_head",
        "profile": None,
    },
}
ORACLE = "oracle"
STEPS = 32  #: decode steps per window
REGULAR = 1e-3  #: share of the mean energy that is added to every channel's energy


def calibrate(
    model: str,
    sources: Sequence[texts.Text],
    *,
    tokens: int = 12288,
    context: int = 4096,
    wanted_recall: float = 0.95,
    token_budget: int | None = None,
    **engine_options,
) -> profiles.Profile:
    """Runs the model densely over the texts for the channels' statistics, then measures each setting.

    Args:
        tokens: maximum number of tokens read, in windows of ``context`` tokens.
        wanted_recall: share of the oracle's attention mass that the suggested budget is to keep.
        token_budget: the budget to suggest the rest for, instead of the one that keeps this share.

    Raises:
        AdamasError: the texts are shorter than a window, the budget is not measured, or the backend cannot serve
            the model.
    """
    budgets = tuple(b for b in BUDGETS if b <= context // 2)
    if not budgets:
        raise AdamasError(f"--context {context} is too short to calibrate on: give at least 64.")
    if token_budget is not None and token_budget not in budgets:
        raise AdamasError(
            f"--token-budget {token_budget} is not measured with --context {context}: give one of "
            f"{', '.join(map(str, budgets))}."
        )
    check_profile(model, **engine_options)
    engine = Engine(model, context, **engine_options)
    windows = texts.windows(
        engine.tokenizer, sources, context, min(STEPS, context // 4), max(1, tokens // context)
    )
    channels = ChannelRecord()
    engine.use({"token_budget": 1.0, "num_dense_layers": 0}, partial(Capture, record=channels))
    engine.run(windows, progress="channels of keys and queries")
    identity = identify(engine.model_config)
    layers = [_layer(channels, layer) for layer in sorted(channels.tokens)]
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
    suggestion = suggest(layers, wanted_recall, token_budget)
    by_layer = suggest_layers(_errors(tables["dot"]), suggestion)
    suggestion = suggestion.model_copy(update={"layer_budgets": by_layer})
    return made.model_copy(update={"layers": layers, "suggestion": suggestion})


def _layer(record: ChannelRecord, layer: int) -> profiles.LayerProfile:
    count = record.tokens[layer]
    mean, squares = record.key[layer] / count, record.key_squares[layer] / count  # [Hkv, D]
    rows, exponents = record.rows[layer], torch.zeros_like(mean)
    if rows:  # else the layer is always dense, and the device decodes it elsewhere
        exponents = balance(record.query_squares[layer] / rows, squares - mean.square())
    return profiles.LayerProfile(
        key_mean=profiles.encode_mean(mean),
        balance=profiles.encode_balance(exponents),
        key_rms=_rounded(squares.mean(1).sqrt()),
        mean_share=_rounded(
            mean.square().sum(1) / squares.sum(1).clamp_min(torch.finfo(squares.dtype).tiny)
        ),
    )


def balance(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Exponents of two for the key channels, from mean squares of queries and centred keys ``[Hkv, D]``.

    The quantisation error of a Hadamard-transformed key is about equal in every dimension and
    proportional to the key's norm. With factors s, the error of q.k has the variance
    ||q / s||^2 ||k s||^2 / D up to a constant. It is minimal at s^4 = E[q^2] / E[k^2] per channel.
    """
    least = torch.finfo(keys.dtype).tiny  # of a head whose keys or queries are all zero
    queries, keys = (
        (x + REGULAR * x.mean(-1, keepdim=True)).clamp_min(least) for x in (queries, keys)
    )
    wanted = (queries.log2() - keys.log2()) / 4
    limit = profiles.MAX_EXPONENT
    return (wanted - wanted.mean(-1, keepdim=True)).round().clamp(-limit, limit)


def _measure(
    engine: Engine, windows: list[Request], options: dict, budgets: tuple[int, ...], name: str
) -> MassRecord:
    record = MassRecord(budgets)
    engine.use(
        # Dense rows, so that all settings see the same queries, in layers that are recorded everywhere.
        {"token_budget": 1.0, "num_dense_layers": 0, **options},
        partial(Shadow, record=record, stride=4),
    )
    engine.run(windows, progress=name)
    return record


def _masses(tables: dict[str, MassRecord], layer: int) -> dict[str, dict[str, float]]:
    if layer not in next(iter(tables.values())).layers():
        return {}  # a sliding-window layer is dense
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


def suggest(
    layers: list[profiles.LayerProfile],
    wanted: float,
    token_budget: int | None = None,
    name: str = "dot",
) -> profiles.Suggestion:
    """Smallest budget that keeps the share ``wanted`` of the oracle's mass, averaged over sparse layers.

    The first layers, at most an eighth of all, stay dense as long as they keep less than that share.

    Args:
        token_budget: one of the measured budgets, to suggest the rest for it.
    """
    recall = {
        n: {int(b): layer.mass[name][b] / layer.mass[ORACLE][b] for b in layer.mass[name]}
        for n, layer in enumerate(layers)
        if layer.mass
    }
    sparse = list(recall)
    for dense in range(1 + len(sparse) // 8):
        kept = [recall[n] for n in sparse[dense:]]
        means = {b: sum(by_budget[b] for by_budget in kept) / len(kept) for b in kept[0]}
        enough = [b for b in sorted(means) if means[b] >= wanted]
        budget = token_budget or (enough[0] if enough else max(means))
        if kept[0][budget] >= wanted:
            break
    return profiles.Suggestion(
        wanted_recall=wanted,
        token_budget=budget,
        num_dense_layers=sparse[dense - 1] + 1 if dense else 0,
        reached=means[budget] >= wanted,
    )


def _errors(record: MassRecord) -> dict[int, dict[int, float]]:
    """Mean error of the output over rows, all heads of a layer together, by layer and budget."""
    means = {b: record.mean("together", b).tolist() for b in record.budgets}
    return {layer: {b: means[b][row] for b in means} for row, layer in enumerate(record.layers())}


def suggest_layers(
    errors: dict[int, dict[int, float]], suggestion: profiles.Suggestion
) -> dict[int, int]:
    """Budgets of the layers that need more or fewer tokens than the suggested ``token_budget``.

    The layers share the tokens that ``token_budget`` would give them so that the sum of their squared errors is least:
    every layer begins with a quarter of ``token_budget``, and each further quarter goes to the layer whose error falls
    most by it. Finer steps would give more distinct budgets, each of which a server prepares at every step. Layers that
    are suggested to be dense have no part in it.

    Args:
        errors: by layer and budget.
    """
    usual = suggestion.token_budget
    shared = {
        layer: _Falling(by_budget)
        for layer, by_budget in errors.items()
        if layer >= suggestion.num_dense_layers
    }
    step = max(1, usual // 4)
    budgets = {layer: max(step, falling.least) for layer, falling in shared.items()}
    for _ in range((usual * len(shared) - sum(budgets.values())) // step):
        gains = {
            layer: falling.square(budgets[layer]) - falling.square(budgets[layer] + step)
            for layer, falling in shared.items()
            if budgets[layer] + step <= falling.most
        }
        if not gains:
            break
        budgets[max(gains, key=gains.__getitem__)] += step
    return {layer: budget for layer, budget in budgets.items() if budget != usual}


class _Falling:
    """The error of a layer between the budgets at which it was measured: powers of the budget."""

    def __init__(self, by_budget: dict[int, float]):
        self._budgets = sorted(by_budget)
        self._logs = [math.log(max(by_budget[b], 1e-6)) for b in self._budgets]
        self.least, self.most = self._budgets[0], self._budgets[-1]

    def square(self, budget: int) -> float:
        """The square of the error with a budget between ``least`` and ``most``."""
        right = max(1, bisect.bisect_left(self._budgets, budget))
        ends = self._budgets[right - 1 : right + 1]
        if len(ends) < 2:
            return math.exp(2 * self._logs[-1])
        at = math.log(budget / ends[0]) / math.log(ends[1] / ends[0])
        return math.exp(2 * ((1 - at) * self._logs[right - 1] + at * self._logs[right]))


def _rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]

"""The commands `vllm-adamas eval` and `vllm-adamas calibrate`: parsed arguments in, files out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm_adamas import profile as profiles
from vllm_adamas import tables
from vllm_adamas.config import AdamasConfig
from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate import report, texts
from vllm_adamas.evaluate.calibrate import calibrate as make_profile
from vllm_adamas.evaluate.engine import local_model
from vllm_adamas.evaluate.study import DEFAULT, FAMILIES, TASKS, Arm, Settings, Study
from vllm_adamas.evaluate.tasks import check_names

BUDGETS = (32, 64, 128, 256, 512, 1024)
QUICK_ARMS, QUICK_BUDGETS = (DEFAULT, "manhattan"), (64, 256)
QUICK_TASKS = ("perplexity", "agreement", "passkey", "single", "multikey")
QUICK = {"context": 2048, "windows": 8, "steps": 48, "prompts": 6, "stride": 8, "answer_tokens": 32}
#: KV cache bytes for --quick unless the user gives --kv-cache-gib: enough for its prompts.
QUICK_CACHE = 2 << 30


def evaluate(args, configs: list[dict], engine_options: dict) -> int:
    """`vllm-adamas eval`."""
    model = local_model(args.model)
    given = {
        name: getattr(args, name)
        for name in ("context", "windows", "steps", "prompts", "seed")
        if getattr(args, name) is not None
    }
    for name, value in given.items():
        if value < (0 if name == "seed" else 1):
            raise AdamasError(f"--{name} {value} is impossible: give a whole number above 0.")
    values = {**(QUICK if args.quick else {}), **given}
    names = _split(args.tasks) or (QUICK_TASKS if args.quick else TASKS)
    check_names(names, TASKS)
    budgets = _numbers(args.budgets) or (QUICK_BUDGETS if args.quick else BUDGETS)
    families = _split(args.arms) or (QUICK_ARMS if args.quick else tuple(FAMILIES))
    arms = [Arm.of(family, budget) for family in families for budget in budgets]
    for number, options in enumerate(configs, 1):
        budget, name = AdamasConfig.parse(options).token_budget, f"config-{number}"
        at = budget if isinstance(budget, int) else 0
        arms.append(Arm(name, name, at, options, batched=False))
    if args.profile:
        profiles.load(args.profile)
        arms += [
            Arm.of(family, budget, args.profile)
            for family in families
            for budget in budgets
            if FAMILIES.get(family, {}).get("score") == "dot"
        ]
    settings = Settings(model, tasks=tuple(names), **values)
    if settings.steps + 2 > settings.context:
        raise AdamasError(
            f"--steps {settings.steps} does not fit into --context {settings.context}: give fewer steps."
        )
    if args.quick:
        engine_options.setdefault("kv_cache_memory_bytes", QUICK_CACHE)
    sources = texts.read(args.text) if args.text else [texts.packaged(calibration=False)]
    folder = Path(args.output)
    study = Study(settings, sources, folder / "results.json")
    result = study.run(arms, **engine_options)
    return write_report(result, folder)


def write_report(result: dict, folder: Path, stem: str = "report") -> int:
    """Writes ``stem``.md and ``stem``.png into the folder and prints the table; returns exit status 0."""
    table = report.markdown(result)
    drawn = report.plot(result, folder / f"{stem}.png")
    (folder / f"{stem}.md").write_text(table + (f"\n![plot]({stem}.png)\n" if drawn else ""))
    print(table)
    if not drawn:
        print("vllm-adamas: no plot, because matplotlib is not installed.", file=sys.stderr)
    return 0


def calibrate(args, engine_options: dict) -> int:
    """`vllm-adamas calibrate`."""
    if not 0 < args.recall <= 1:
        raise AdamasError(f"--recall {args.recall} is impossible: give a share above 0, at most 1.")
    path = Path(args.output)
    if not path.parent.is_dir():
        raise AdamasError(
            f"the folder {path.parent} does not exist: make it or name another --output."
        )
    sources = texts.read(args.text) if args.text else [texts.packaged(calibration=True)]
    profile = make_profile(
        local_model(args.model),
        sources,
        tokens=args.tokens,
        context=args.context,
        wanted_recall=args.recall,
        **engine_options,
    )
    profile.save(path)
    print(profile_table(profile))
    return 0


def profile_table(profile: profiles.Profile) -> str:
    """A readable summary of a profile: mass kept by setting and budget, and the suggestion."""
    sparse = [layer for layer in profile.layers if layer.mass]
    budgets = list(next(iter(sparse)).mass["dot"])
    share = max(max(layer.mean_share) for layer in sparse)
    lines = [
        f"{profile.model.name}: {profile.tokens} tokens, {len(sparse)} layers without a sliding window; "
        f"the mean key holds up to {100 * share:.0f}% of the keys' energy",
    ]
    rows = []
    for name in sparse[0].mass:
        means = (sum(layer.mass[name][b] for layer in sparse) / len(sparse) for b in budgets)
        rows.append([name, *(f"{mean:.3f}" for mean in means)])
    lines.append(tables.plain(["attention mass kept", *budgets], rows))
    hint = profile.suggestion
    what = f"{hint.wanted_recall:.0%} of the oracle's mass"
    lines.append(
        f"for {what}: token_budget {hint.token_budget}, num_dense_layers {hint.num_dense_layers}"
        if hint.reached
        else f"{what} is out of reach: token_budget {hint.token_budget} is the largest that was measured"
    )
    if hint.layer_budgets:
        budgets = [
            hint.layer_budgets.get(n, hint.token_budget)
            for n, layer in enumerate(profile.layers)
            if layer.mass and (n >= hint.num_dense_layers or n in hint.layer_budgets)
        ]
        lines.append(
            f"for errors like the median layer's: layer_budgets {json.dumps(hint.layer_budgets)}, "
            f"{sum(budgets) / len(budgets):.0f} tokens per sparse layer on average"
        )
    return "\n".join(lines)


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def _numbers(text: str | None) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in _split(text))
    except ValueError:
        raise AdamasError(
            f"--budgets {text} are not whole numbers: write --budgets 64,256."
        ) from None
    if any(number < 1 for number in numbers):
        raise AdamasError(f"--budgets {text} are impossible: give numbers of tokens above 0.")
    return numbers

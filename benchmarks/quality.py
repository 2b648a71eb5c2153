"""The quality study of docs/quality.md: every configuration, selector and budget on one model.

Results go to benchmarks/results/quality_<model>.json, from which an interrupted run resumes, with the
report and the plot next to it. A study can be split into runs of some families or tasks, each with its own
--output; --merge merges their results.

    python benchmarks/quality.py MODEL --text FILE ... --families dot manhattan --output one
    python benchmarks/quality.py MODEL --text FILE ... --families oracle quest=64,256 --output two
    python benchmarks/quality.py MODEL --merge one/quality_MODEL.json two/quality_MODEL.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from records import RESULTS

from vllm_adamas import profile as profiles
from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate import report, texts
from vllm_adamas.evaluate.command import BUDGETS
from vllm_adamas.evaluate.study import DEFAULT, FAMILIES, TASKS, Arm, Settings, Study, load, merge

#: Budgets for which retrieval is measured; text quality is measured for every budget.
RETRIEVAL_BUDGETS = (64, 128, 256, 512)
#: Tasks that the reference selectors run.
SELECTOR_TASKS = ("perplexity", "passkey", "single", "multikey")
PROFILE = "+profile"
PROFILE_FAMILIES = ("dot", "dot-query-head")
#: Families with fewer or more dense first layers than the default.
VARIANTS = {
    f"{family}-dense{layers}": {**FAMILIES[family], "num_dense_layers": layers}
    for family in PROFILE_FAMILIES
    for layers in (0, 2)
}
#: Families whose layer 0 has a budget of its own; they run if they are named.
LAYER_0 = {
    f"{family}-layer0-{tokens}": {**FAMILIES[family], "layer_budgets": {"0": tokens}}
    for family in PROFILE_FAMILIES
    for tokens in (1024, 2048)
}


def arms(families: list[str], budgets: list[int], profile: str | None) -> list[Arm]:
    """Every family with the budgets; ``<family>=64,256`` sets a family's own budgets."""
    made = []
    for entry in families:
        family, _, own = entry.partition("=")
        made += [arm(family, int(b), profile) for b in (own.split(",") if own else budgets)]
    return made


def arm(family: str, budget: int, profile: str | None) -> Arm:
    """A family or variant with a budget; ``<family>+profile`` uses the profile."""
    for variants, batched in ((VARIANTS, True), (LAYER_0, False)):  # one budget per request, or not
        if family in variants:
            options = {**variants[family], "token_budget": budget}
            return Arm(f"{family}-{budget}", family, budget, options, batched=batched)
    if not family.endswith(PROFILE):
        return Arm.of(family, budget)
    if profile is None:
        raise AdamasError(f"{family} needs a profile: give --profile.")
    return Arm.of(family.removesuffix(PROFILE), budget, profile)


def calibrated(file: str) -> Arm:
    """The default with a profile and the budgets of layers that it suggests."""
    hint = profiles.load(file).suggestion
    options = {
        **FAMILIES[DEFAULT],
        "token_budget": hint.token_budget,
        "profile": file,
        "layer_budgets": hint.layer_budgets,
    }
    return Arm(
        f"calibrated-{hint.token_budget}", "calibrated", hint.token_budget, options, batched=False
    )


def study(args, path: Path) -> dict:
    settings = Settings(
        args.model,
        context=args.context,
        windows=args.windows,
        steps=args.steps,
        prompts=args.prompts,
        tasks=tuple(args.tasks),
        answer_tokens=48,
    )
    engine = {"max_num_seqs": args.max_num_seqs}
    if args.max_num_batched_tokens:
        engine["max_num_batched_tokens"] = args.max_num_batched_tokens
    if args.kv_cache_gib:
        engine["kv_cache_memory_bytes"] = int(args.kv_cache_gib * 2**30)
    families = args.families or [
        *FAMILIES,
        *VARIANTS,
        *(family + PROFILE for family in PROFILE_FAMILIES if args.profile),
    ]
    sources = texts.read(args.text)
    return Study(settings, sources, path, args.retrieval_budgets, SELECTOR_TASKS).run(
        [*arms(families, args.budgets, args.profile), *map(calibrated, args.calibrated)], **engine
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--name", help="name in the result files; default: the model's folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+", metavar="FILE")
    what.add_argument("--merge", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--families", nargs="+")
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS)
    parser.add_argument("--retrieval-budgets", nargs="+", type=int, default=RETRIEVAL_BUDGETS)
    parser.add_argument("--profile", help="profile of <family>+profile")
    parser.add_argument(
        "--calibrated",
        nargs="*",
        default=[],
        metavar="PROFILE",
        help="also the default with each profile and its suggested token_budget and layer_budgets",
    )
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--kv-cache-gib", type=float)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    stem = f"quality_{args.name or Path(args.model).name}"
    path = args.output / f"{stem}.json"
    try:
        if args.merge:
            result = merge([load(part) for part in args.merge])
            path.write_text(json.dumps(result) + "\n")
        else:
            result = study(args, path)
    except AdamasError as error:
        sys.exit(f"quality.py: {error}")
    table = report.markdown(result)
    drawn = report.plot(result, args.output / f"{stem}.png")
    path.with_suffix(".md").write_text(table + (f"\n![plot]({stem}.png)\n" if drawn else ""))
    print(table)


if __name__ == "__main__":
    main()

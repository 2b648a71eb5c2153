"""The quality study of docs/quality.md: every configuration, selector and budget on one model.

Results go to benchmarks/results/quality_<model>.json, where an interrupted run is continued; the report
and the plot beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import RESULTS

from vllm_adamas.evaluate import texts
from vllm_adamas.evaluate.command import BUDGETS, write_report
from vllm_adamas.evaluate.study import FAMILIES, PERPLEXITY, TASKS, Arm, Settings, Study

#: Retrieval is measured for these; text quality for every budget.
RETRIEVAL_BUDGETS = (64, 128, 256)
PROFILE_FAMILIES = ("dot", "dot-query-head")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--name", help="default: the model's folder")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS)
    parser.add_argument("--profile", help="its families run with it too, as <family>+profile")
    parser.add_argument("--retrieval-budgets", nargs="+", type=int, default=RETRIEVAL_BUDGETS)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--kv-cache-gib", type=float)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    settings = Settings(
        args.model,
        context=args.context,
        windows=args.windows,
        steps=args.steps,
        prompts=args.prompts,
        stride=64,
        tasks=tuple(args.tasks),
        answer_tokens=48,
    )
    engine = {"max_num_seqs": args.max_num_seqs}
    if args.max_num_batched_tokens:
        engine["max_num_batched_tokens"] = args.max_num_batched_tokens
    if args.kv_cache_gib:
        engine["kv_cache_memory_bytes"] = int(args.kv_cache_gib * 2**30)
    name = args.name or Path(args.model).name
    path = args.output / f"quality_{name}.json"
    study = Study(settings, texts.read(args.text), path, args.retrieval_budgets, (PERPLEXITY,))
    arms = [Arm.of(family, budget) for family in args.families for budget in args.budgets]
    if args.profile:
        arms += [Arm.of(f, b, args.profile) for f in PROFILE_FAMILIES for b in args.budgets]
    write_report(study.run(arms, **engine), args.output, f"quality_{name}")


if __name__ == "__main__":
    main()

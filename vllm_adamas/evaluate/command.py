"""The commands `vllm-adamas eval` and `vllm-adamas calibrate`: parsed arguments in, files out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_adamas import page, tables
from vllm_adamas import profile as profiles
from vllm_adamas.config import AdamasConfig
from vllm_adamas.errors import INTERRUPTED, AdamasError
from vllm_adamas.evaluate import findings, longbench, report, ruler, suites, texts
from vllm_adamas.evaluate.calibrate import calibrate as make_profile
from vllm_adamas.evaluate.engine import local_model
from vllm_adamas.evaluate.study import DEFAULT, FAMILIES, TASKS, Arm, Settings, Study
from vllm_adamas.evaluate.tasks import check_names
from vllm_adamas.identity import fingerprint, model_folder

BUDGETS = (32, 64, 128, 256, 512, 1024)
QUICK_ARMS, QUICK_BUDGETS = (DEFAULT, "manhattan"), (64, 256)
QUICK_TASKS = ("perplexity", "agreement", "passkey", "single", "multikey")
QUICK = {"context": 2048, "windows": 8, "steps": 48, "prompts": 6, "stride": 8, "answer_tokens": 32}
#: KV cache bytes for --quick unless the user gives --kv-cache-gib: enough for its prompts.
QUICK_CACHE = 2 << 30

SUITES = ("ruler", "longbench", "agreement")
SUITE_BUDGETS, SUITE_LENGTHS, SUITE_BOUND = (128, 256, 512, 1024), (4096,), 2.0
SUITE_DEFAULTS = {"prompts": 20, "seed": 0, "steps": 256}
ALONE = ("quick", "context", "windows")  #: options of `eval` without a suite
OF_SUITES = ("lengths", "bound", "squad", "hotpotqa")  #: options of `eval` with one
#: The suites that read an option, where not all do.
OWNERS = {
    "steps": ("agreement",),
    "squad": ("ruler",),
    "hotpotqa": ("ruler",),
    "text": ("ruler", "agreement"),
}


def evaluate(args, configs: list[dict], engine_options: dict) -> int:
    """`vllm-adamas eval`."""
    if args.suite is not None:
        return suite(args, configs, engine_options)
    model = local_model(args.model)
    if name := _first_given(args, OF_SUITES):
        raise AdamasError(f"--{name} belongs to a suite: give --suite or leave it out.")
    given = _given(args, ("context", "windows", "steps", "prompts", "seed"))
    values = {**(QUICK if args.quick else {}), **given}
    names = _split(args.tasks) or (QUICK_TASKS if args.quick else TASKS)
    check_names(names, TASKS)
    budgets = _numbers("--budgets", args.budgets) or (QUICK_BUDGETS if args.quick else BUDGETS)
    families = _split(args.arms) or (QUICK_ARMS if args.quick else tuple(FAMILIES))
    arms = [Arm.of(family, budget) for family in families for budget in budgets]
    arms += _configured(configs)
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
    sources, folder = _sources(args), Path(args.output)
    page.held(folder, Path(model).name)  # refuses what the report could not be written to
    study = Study(settings, sources, folder / "results.json")
    result = study.run(arms, **engine_options)
    return write_report(result, folder)


def suite(args, configs: list[dict], engine_options: dict) -> int:
    """`vllm-adamas eval --suite`."""
    from transformers import AutoTokenizer

    if args.suite not in SUITES:
        raise AdamasError(f"{args.suite} is not a suite: choose among {', '.join(SUITES)}.")
    model = local_model(args.model)
    if name := _first_given(args, ALONE):
        raise AdamasError(
            f"--{name} does not go with --suite: give --lengths, --prompts and --budgets instead."
        )
    others = [name for name, owners in OWNERS.items() if args.suite not in owners]
    if name := _first_given(args, others):
        raise AdamasError(f"--{name} does not belong to the suite {args.suite}: leave it out.")
    values = {**SUITE_DEFAULTS, **_given(args, ("steps", "prompts", "seed"))}
    lengths = _numbers("--lengths", args.lengths) or SUITE_LENGTHS
    bound = SUITE_BOUND if args.bound is None else args.bound
    if not 0 < bound <= 100:
        raise AdamasError(f"--bound {bound:g} is impossible: give points above 0, at most 100.")
    arms = _arms(args, configs, max(lengths))
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        raise AdamasError(
            f"{model} has no tokenizer that transformers can read: give the folder or the hub name of a model."
        ) from None
    sources = _sources(args) if args.suite in OWNERS["text"] else []
    seed, names = values["seed"], _split(args.tasks)
    if args.suite == "ruler":
        chosen = _ruler(args, names, tokenizer, sources, seed)
    elif args.suite == "longbench":
        chosen = longbench.suite(tokenizer, names)
    else:
        check_names(names, ("agreement",))
        chosen = suites.agreement(tokenizer, sources, values["steps"], seed)
    folder, weights = Path(args.output), model_folder(model)
    page.held(folder, Path(model).name)  # refuses what the report could not be written to
    settings = {
        "suite": args.suite,
        "model": Path(model).name,
        "fingerprint": fingerprint(weights) if weights else "",
        "seed": seed,
        "steps": values["steps"] if args.suite in OWNERS["steps"] else None,
        "dtype": engine_options["dtype"],
        "texts": {text.name: text.sha256 for text in sources},
    }
    ledger = suites.Ledger(folder / f"{args.suite}.jsonl", settings)
    for task, why in chosen.left_out.items():
        print(f"left out: {task}, because {why}", file=sys.stderr)
    batch = engine_options["max_num_seqs"]
    run = suites.Run(
        chosen, model, tokenizer, arms, lengths, values["prompts"], batch, engine_options
    )
    try:
        run.into(ledger)
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from {ledger.path}", file=sys.stderr)
        return INTERRUPTED
    found = findings.record(ledger.path, chosen.left_out, bound / 100)
    print("\n".join([*page.text(found), "", f"report: {page.put(found, folder)}"]))
    return 0


def _ruler(args, names, tokenizer, sources, seed: int) -> suites.Suite:
    check_names(names, ruler.TASKS)
    files = {"qa_1": (args.squad, ruler.squad), "qa_2": (args.hotpotqa, ruler.hotpotqa)}
    left_out = {
        task: f"{ruler.TASKS[task].data} was not given"
        for task, (path, _) in files.items()
        if path is None
    }
    for task in names:
        if task in left_out:
            raise AdamasError(
                f"the task {task} needs its data: give {ruler.TASKS[task].data} FILE."
            )
    wanted = tuple(names) or tuple(task for task in ruler.TASKS if task not in left_out)
    questions = {task: read(path) for task, (path, read) in files.items() if path}
    prose = "\n\n".join(text.content for text in sources)
    material = ruler.Material.of(prose, questions)

    def samples(task: str, length: int, count: int):
        return ruler.samples(tokenizer, task, length, count, seed, material)

    return suites.Suite("ruler", wanted, samples, {} if names else left_out)


def _arms(args, configs: list[dict], longest: int) -> list[Arm]:
    """The configurations of a suite."""
    budgets = _numbers("--budgets", args.budgets)
    for budget in budgets:
        if budget >= longest:
            raise AdamasError(
                f"a budget of {budget} covers every context of --lengths {longest}: give a smaller one or longer "
                "lengths."
            )
    if args.profile:
        profiles.load(args.profile)
    families = _split(args.arms) or (DEFAULT,)
    budgets = budgets or tuple(budget for budget in SUITE_BUDGETS if budget < longest)
    arms = [Arm.of(family, budget, args.profile) for family in families for budget in budgets]
    return [*(arm for arm in arms if arm.fits()), *_configured(configs)]


def _configured(configs: list[dict]) -> list[Arm]:
    """The configurations given with --config."""
    arms = []
    for number, options in enumerate(configs, 1):
        budget, name = AdamasConfig.parse(options).token_budget, f"config-{number}"
        at = budget if isinstance(budget, int) else 0
        arms.append(Arm(name, name, at, options, batched=False))
    return arms


def _sources(args) -> list[texts.Text]:
    return texts.read(args.text) if args.text else [texts.packaged(calibration=False)]


def _given(args, names: Sequence[str]) -> dict:
    """The whole numbers that were given, checked."""
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, value in given.items():
        if value < (0 if name == "seed" else 1):
            raise AdamasError(f"--{name} {value} is impossible: give a whole number above 0.")
    return given


def _first_given(args, names: Sequence[str]) -> str | None:
    """The first of these options that was given."""
    return next((name for name in names if getattr(args, name) not in (None, False)), None)


def write_report(result: dict, folder: Path) -> int:
    """Writes report.md, report.png and the record of report.html, and prints the tables; returns exit status 0."""
    table = report.markdown(result)
    drawn = report.plot(result, folder / "report.png")
    (folder / "report.md").write_text(table + ("\n![plot](report.png)\n" if drawn else ""))
    page.put(report.record(result), folder)
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
        token_budget=args.token_budget,
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
        else f"{what} is out of reach with token_budget {hint.token_budget}"
    )
    if hint.layer_budgets:
        budgets = [
            hint.layer_budgets.get(n, hint.token_budget)
            for n, layer in enumerate(profile.layers)
            if layer.mass and n >= hint.num_dense_layers
        ]
        lines.append(
            f"for the least error: layer_budgets {json.dumps(hint.layer_budgets)}, "
            f"{sum(budgets) / len(budgets):.0f} tokens per sparse layer on average"
        )
    return "\n".join(lines)


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in _split(text))
    except ValueError:
        raise AdamasError(
            f"{option} {text} are not whole numbers: write {option} 64,256."
        ) from None
    if any(number < 1 for number in numbers):
        raise AdamasError(f"{option} {text} are impossible: give numbers of tokens above 0.")
    return tuple(dict.fromkeys(numbers))

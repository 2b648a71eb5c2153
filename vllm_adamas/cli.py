"""The ``vllm-adamas`` command."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from types import SimpleNamespace

from vllm_adamas import __version__, tables
from vllm_adamas.config import AdamasConfig
from vllm_adamas.doctor import host
from vllm_adamas.errors import AdamasError
from vllm_adamas.identity import Heads, count_of, text_config


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
    info.add_argument(
        "--kv-cache-dtype",
        metavar="DTYPE",
        help="bfloat16, float16, float32 or fp8; default: the model's dtype, or bfloat16",
    )
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)
    _add_eval(commands)
    _add_calibrate(commands)
    _add_bench(commands)
    _add_storm(commands)
    _add_loadtest(commands)
    _add_doctor(commands)
    argv = sys.argv[1:] if argv is None else argv
    own = argv[: argv.index("--")] if "--" in argv else argv
    args = parser.parse_args(own)
    args.server_args = argv[len(own) + 1 :]
    if args.server_args and args.command != "loadtest":
        parser.error("arguments after -- are those of the servers of loadtest")
    try:
        return args.run(args)
    except AdamasError as error:
        print(f"vllm-adamas: {error}", file=sys.stderr)
        return 2


def _options(text: str) -> dict:
    """Parses and validates the options given with ``--config``."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdamasError(
            f"--config is not JSON ({error}): quote it as '{{\"token_budget\": 256}}'."
        ) from None
    AdamasConfig.parse(options)
    return options


def _info(args) -> int:
    from vllm_adamas import profile

    config = AdamasConfig.parse(_options(args.config))
    if config.profile is not None:
        profile.load(config.profile)
    model = {} if args.model is None else text_config(args.model)
    shape, config = _model_shape(args, model), _resolved(args, model, config)
    report = {
        "versions": host.versions(),
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
        print(textwrap.indent(tables.plain([], list(section.items()), align="left"), "  "))
    return 0


def _add_eval(commands) -> None:
    command = commands.add_parser(
        "eval",
        help="quality of sparse decode against dense, through the real engine",
        description="Runs tasks under several configurations and writes results.json, report.md and "
        "report.png; with --suite published tasks beside vLLM's stock backend. Both write report.html, which `bench` "
        "shares. An interrupted run resumes where it stopped.",
    )
    command.add_argument("model", metavar="MODEL", help="folder or hub name")
    command.add_argument(
        "--suite",
        metavar="NAME",
        help="ruler, longbench or agreement: published tasks, or long greedy texts, answered by vLLM's stock backend "
        "and by adamas",
    )
    command.add_argument("--output", metavar="DIR", default="adamas-eval")
    command.add_argument(
        "--quick", action="store_true", help="a few minutes on a CPU: short contexts, few samples"
    )
    command.add_argument("--tasks", help="comma-separated; default: all")
    command.add_argument(
        "--arms",
        help="comma-separated configurations besides dense, such as dot or quest; default: all, or default in a suite",
    )
    command.add_argument("--budgets", help="comma-separated, in tokens")
    command.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="JSON",
        help="one more configuration: the options you would give under 'adamas'",
    )
    command.add_argument(
        "--profile",
        metavar="FILE",
        help="calibration profile: configurations with score dot also run with it",
    )
    command.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="default: the part of the packaged book that calibration does not read",
    )
    for name, what in (
        ("context", "tokens per window or prompt"),
        ("windows", "maximum number of text windows"),
        ("steps", "scored tokens per window; in the suite agreement, generated tokens per prompt"),
        ("prompts", "prompts per retrieval task; in a suite, per task and length"),
        ("seed", "seed of the retrieval tasks and of the suites"),
    ):
        command.add_argument(f"--{name}", type=int, metavar="N", help=what)
    command.add_argument(
        "--lengths",
        metavar="N,...",
        help="in a suite: tokens of a prompt with its answer; default: 4096",
    )
    command.add_argument(
        "--bound",
        type=float,
        metavar="POINTS",
        help="in a suite: largest loss, of 100 points, that counts as none; default: 2",
    )
    command.add_argument("--squad", metavar="FILE", help="data of RULER's qa_1: dev-v2.0.json")
    command.add_argument(
        "--hotpotqa", metavar="FILE", help="data of RULER's qa_2: hotpot_dev_distractor_v1.json"
    )
    _add_engine(command)
    command.set_defaults(run=_eval)


def _add_calibrate(commands) -> None:
    command = commands.add_parser(
        "calibrate",
        help="make a calibration profile of a model",
        description="Measures mean keys and the attention mass that each setting keeps, and writes a "
        "profile for the option 'profile'.",
    )
    command.add_argument("model", metavar="MODEL", help="folder or hub name")
    command.add_argument("--output", metavar="FILE", required=True)
    command.add_argument(
        "--text", nargs="+", metavar="FILE", help="default: a part of the packaged book"
    )
    command.add_argument("--tokens", type=int, default=12288, help="maximum number of tokens read")
    command.add_argument("--context", type=int, default=4096, help="tokens per window")
    command.add_argument(
        "--recall", type=float, default=0.95, help="target share of the oracle's attention mass"
    )
    command.add_argument(
        "--token-budget",
        type=int,
        help="suggest layer_budgets for this token budget; default: the one that --recall needs",
    )
    _add_engine(command)
    command.set_defaults(run=_calibrate)


def _add_bench(commands) -> None:
    from vllm_adamas.bench import command as benchmark

    command = commands.add_parser(
        "bench",
        help="speed of adamas against vLLM's own attention, with your model on this device",
        description="Times a decode step of one layer, then the tokens of engines with each backend, and writes "
        "bench.json and report.html, which `eval` shares. An interrupted run resumes where it stopped.",
    )
    benchmark.add_arguments(command)
    _add_dtype_and_cache(command)
    command.set_defaults(run=lambda args: benchmark.bench(args, _options(args.config)))


def _add_storm(commands) -> None:
    from vllm_adamas.serving.storm import command as storm

    command = commands.add_parser(
        "storm",
        help="seeded traffic against a live server, its answers checked",
        description="Keeps a server busy with many kinds of requests, then checks greedy answers "
        "against a replay on the idle server, or against a second server. Exit status 0 if all agree.",
    )
    storm.add_arguments(command)
    command.set_defaults(run=storm.storm)


def _add_loadtest(commands) -> None:
    from vllm_adamas.serving.loadtest import command as loadtest

    command = commands.add_parser(
        "loadtest",
        help="adamas and the stock backend under the same traffic on this host",
        description="Starts a server of each backend in turn, sends both the traffic of a scenario, checks their "
        "counters against the requests and writes a report. Exit status 0 if all is well, 1 with problems.",
        epilog="Arguments after -- are those of `vllm serve`, for both servers.",
    )
    loadtest.add_arguments(command)
    command.set_defaults(run=lambda args: loadtest.loadtest(args, _options(args.config)))


def _add_doctor(commands) -> None:
    from vllm_adamas.doctor import command as doctor

    command = commands.add_parser(
        "doctor",
        help="check this host before traffic: installation, kernels, from where on sparse decode gains",
        description="Prints what runs here, tests the kernels against the reference and times one layer's decode "
        "attention, in less than a minute. Exit status 0 if all is well, 1 with problems.",
    )
    doctor.add_arguments(command)
    command.set_defaults(run=lambda args: doctor.doctor(args, _options(args.config)))


def _add_engine(command) -> None:
    command.add_argument("--max-num-seqs", type=int, default=16, help="requests in one step")
    _add_dtype_and_cache(command)


def _add_dtype_and_cache(command) -> None:
    command.add_argument("--dtype", default="auto", help="as vLLM's --dtype")
    command.add_argument(
        "--kv-cache-gib", type=float, help="memory for the KV cache; default: vLLM's choice"
    )


def _engine_options(args) -> dict:
    options = {"dtype": args.dtype, "max_num_seqs": args.max_num_seqs}
    if args.kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(args.kv_cache_gib * 2**30)
    return options


def _eval(args) -> int:
    from vllm_adamas.evaluate import command

    return command.evaluate(args, [_options(text) for text in args.config], _engine_options(args))


def _calibrate(args) -> int:
    from vllm_adamas.evaluate import command

    return command.calibrate(args, _engine_options(args))


def _kernels(config: AdamasConfig) -> dict[str, str]:
    from vllm_adamas.backends.registry import available

    found = available(host.device())
    told = host.described(found)
    try:
        told["used here"] = host.chosen(found, config.kernels, host.device()).description
    except AdamasError as error:
        if config.kernels != "auto":
            raise
        told["used here"] = f"not available: {error}"
    return told


def _resolved(args, model: dict, config: AdamasConfig) -> AdamasConfig:
    """The configuration with the defaults that a server of the model would take."""
    from vllm_adamas.serving.checks import resolve

    if not model:
        return config.resolved()
    text = SimpleNamespace(**{"model_type": "", **model})
    read = SimpleNamespace(
        model=args.model,
        revision=None,
        hf_text_config=text,
        get_total_num_hidden_layers=lambda: model.get("num_hidden_layers", 1),
    )
    return resolve(read, config)


def _model_shape(args, model: dict) -> dict:
    from vllm_adamas.dtypes import ELEMENTS

    shape = {
        "head_size": args.head_size,
        "num_kv_heads": args.num_kv_heads,
        "num_layers": args.num_layers,
        "dtype": args.kv_cache_dtype or "bfloat16",
    }
    if not model:
        return shape
    dtype = model.get("dtype") or model.get("torch_dtype")
    if args.kv_cache_dtype is None and dtype in ELEMENTS:
        shape["dtype"] = dtype
    try:
        heads = Heads.of(model)
        shape["head_size"], shape["num_kv_heads"] = heads.size, heads.kv
        shape["num_layers"] = count_of(model, "num_hidden_layers")
    except KeyError as missing:
        raise AdamasError(
            f"{args.model}/config.json has no {missing}: give --head-size, --num-kv-heads and --num-layers instead of --model."
        ) from None
    return shape


def _page(shape: dict) -> dict:

    from vllm_adamas.dtypes import ELEMENTS, FP8
    from vllm_adamas.layout import PageLayout, coded_size, overhead, token_bytes

    name = FP8[0] if shape["dtype"] == "fp8" else shape["dtype"]
    if name not in ELEMENTS:
        raise AdamasError(
            f"--kv-cache-dtype {name} is not an element type of pages: give fp8 or one of "
            f"{', '.join(ELEMENTS)}."
        )
    dtype = ELEMENTS[name].storage
    size = shape["head_size"]
    PageLayout(size, 32, dtype)  # refuses an unsupported head size
    dense = 2 * size * dtype.itemsize
    content = token_bytes(size, dtype)
    tokens = shape["num_kv_heads"] * shape["num_layers"]
    return {
        **shape,
        "K and V": f"{dense} bytes per token and KV head",
        "signature": f"{coded_size(size) // 4} bytes of codes + 2 bytes of scale",
        "total": f"{content} bytes per token and KV head (+{100 * overhead(size, dtype):.1f}%)",
        "per token, all layers": f"{content * tokens / 1024:.1f} KiB",
        "capacity": f"{100 * dense / content:.1f}% of a dense KV cache's tokens",
    }


if __name__ == "__main__":
    sys.exit(main())

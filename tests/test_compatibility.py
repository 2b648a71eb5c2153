"""docs/compatibility.md says of every argument of vLLM what becomes of it, and each claim has its test."""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from common import MODEL, refused
from test_checks import ARGUMENTS

from vllm_adamas.plugin import register

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "compatibility.md"
VERDICTS = ("works", "refused", "no effect", "not tested")


class Row(NamedTuple):
    names: tuple[str, ...]
    verdict: str
    reason: str


def sections() -> dict[str, list[Row]]:
    """The tables under the heading "Arguments", by the title above each."""
    text = DOCUMENT.read_text().split("\n## Arguments\n")[1].split("\n## ")[0]
    tables = {}
    for section in text.split("\n### ")[1:]:
        title, *lines = section.splitlines()
        cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
        rows = [(names, verdict, *reason) for names, verdict, *reason in cells]
        tables[title] = [
            Row(tuple(names.replace("`", "").split(", ")), verdict, reason[0].strip(" |") if reason else "")
            for names, verdict, *reason in rows
        ]
    return tables


def rows() -> list[Row]:
    return [row for table in sections().values() for row in table]


def option(action) -> str:
    return next(name for name in action.option_strings if name.startswith("--"))


def options_of(config: type, prefix: str) -> list[str]:
    """What may be written behind a dot: the fields of a configuration that are arguments of it."""
    from vllm.config import PassConfig

    fields = {field.name for field in dataclasses.fields(config) if field.init}
    nested = {f"pass_config.{field.name}" for field in dataclasses.fields(PassConfig)}
    if "pass_config" in fields:
        fields = fields - {"pass_config"} | nested
    return [f"{prefix}.{name}" for name in fields]


def test_every_argument_has_one_row() -> None:
    from vllm.config import AttentionConfig, CompilationConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    register()
    engine = {field.name for field in dataclasses.fields(EngineArgs)}
    expected = {
        group.title: [option(action) for action in group._group_actions if action.dest in engine]
        for group in EngineArgs.add_cli_args(FlexibleArgumentParser())._action_groups
    }
    for prefix, config in (
        ("--attention-config", AttentionConfig),
        ("--compilation-config", CompilationConfig),
    ):
        expected[prefix] = options_of(config, prefix)
    tables = sections()
    whole = [name for row in tables.pop("Groups") for name in row.names]
    command = [name for row in tables.pop("Command") for name in row.names]
    assert sorted([*tables, *whole]) == sorted(title for title, names in expected.items() if names)
    for title, table in tables.items():
        named = [name for row in table for name in row.names]
        assert sorted(named) == sorted(expected[title]), title
    server = make_arg_parser(FlexibleArgumentParser())
    assert set(command) <= {name for action in server._actions for name in action.option_strings}


def test_verdicts() -> None:
    assert {row.verdict for row in rows()} == set(VERDICTS)


def test_what_is_refused_is_refused_in_the_tests() -> None:
    refusals = {name for row in rows() if "refused" in row.verdict + row.reason for name in row.names}
    assert refusals == ARGUMENTS.keys()


@pytest.mark.parametrize("row", [row for row in rows() if row.verdict == "works"], ids=str)
def test_what_works_has_a_test(row: Row) -> None:
    tests = re.findall(r"`(test_\w+)::(test_\w+)`", row.reason)
    assert tests
    for file, name in tests:
        assert f"\ndef {name}(" in (TESTS / f"{file}.py").read_text(), f"{file}::{name}"

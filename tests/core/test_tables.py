"""Tables: what a cell says stays as it is, whatever it looks like."""

from vllm_adamas.tables import markdown, plain

ROWS = [["a", "1.50", 3], ["long name", "010", "1e3"]]


def test_markdown_is_what_github_reads() -> None:
    assert markdown(["x", "µs", "n"], ROWS) == [
        "| x         | µs   | n   |",
        "|-----------|------|-----|",
        "| a         | 1.50 | 3   |",
        "| long name | 010  | 1e3 |",
    ]


def test_a_table_without_rows_has_its_header() -> None:
    assert markdown(["x", "y"], []) == ["| x   | y   |", "|-----|-----|"]
    assert plain([], []) == ""


def test_plain_columns_are_aligned() -> None:
    assert plain(["x", "µs", "n"], ROWS).splitlines() == [
        "x            µs    n",
        "a          1.50    3",
        "long name   010  1e3",
    ]
    assert plain([], ROWS, align="left").splitlines() == [
        "a          1.50  3",
        "long name  010   1e3",
    ]

"""The acceptance list: a row that is due has a test, an id in a test's name a row, and the page is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.acceptance import PAGE, ShownBy, find_tests, gaps_in_numbers, ids_in, load_rows, problems, write_page

ROWS_OF_SECTION = {"A": 29, "B": 103, "C": 38, "D": 23, "E": 88}


def test_the_list_is_whole() -> None:
    accepted = load_rows()
    counts = {letter: sum(1 for row in accepted.rows if row.startswith(letter)) for letter in accepted.sections}
    assert counts == ROWS_OF_SECTION
    assert gaps_in_numbers(accepted) == []
    assert {kind for kind, _ in accepted.rows.values()} == set(accepted.kinds)


def test_every_row_that_is_due_has_a_test_and_every_id_a_row() -> None:
    assert problems(load_rows(), find_tests()) == []


def test_the_page_is_up_to_date() -> None:
    written = PAGE.read_text("utf-8")
    assert written == write_page(load_rows(), find_tests()), "run: python -m tests.acceptance"


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("test_A13_saves", ["A13"]),
        ("test_A05_A11_saves", ["A05", "A11"]),
        ("test_both_ends_B103", ["B103"]),
        ("test_e01_is_no_id", []),
        ("test_F01_is_of_no_section", []),
        ("test_A1_is_too_short", []),
        ("test_the_A13th_thing", []),
    ],
)
def test_a_name_carries_ids_between_underscores(name: str, ids: list[str]) -> None:
    assert ids_in(name) == ids


def _write(tests: Path, source: str) -> None:
    tests.mkdir()
    (tests / "test_some.py").write_text(source)
    (tests / "some.py").write_text("def test_A09_no_test_file(): ...")


def test_tests_are_found_wherever_they_stand(tmp_path: Path) -> None:
    _write(
        tmp_path / "tests",
        "async def test_A01_A02_both(): ...\n"
        "class TestThings:\n    def test_A03_in_a_class(self): ...\n"
        "class Other:\n    def test_A04_no_test(self): ...\n"
        "@pytest.mark.skip\ndef test_A05_skipped(): ...\n"
        "@pytest.mark.xfail(reason='x')\ndef test_A06_expected_to_fail(): ...\n"
        "@pytest.mark.slow\n@pytest.mark.parametrize('x', [1])\ndef test_A07_marked(x): ...\n"
        "def helper_A08(): ...\n",
    )
    found = find_tests(tmp_path / "tests")
    assert set(found) == {"A01", "A02", "A03", "A07"}
    assert found["A01"] == [ShownBy("tests/test_some.py", "test_A01_A02_both")]


def test_a_row_without_a_test_and_a_test_without_a_row_are_told(tmp_path: Path) -> None:
    _write(tmp_path / "tests", "def test_A30_no_such_row(): ...\ndef test_A01_known(): ...\n")
    accepted, shown = load_rows(), find_tests(tmp_path / "tests")
    told = problems(accepted, shown)
    assert told[0] == "tests/test_some.py: test_A30_no_such_row names A30, and there is no such row"
    assert not any(line.startswith("A01 ") for line in told)
    assert any(line.startswith("A02 is due and has no test: ") for line in told)
    page = write_page(accepted, shown)
    assert "| A01 | behaviour | " in page
    assert "[test_A01_known](../tests/test_some.py) |" in page
    assert f"| A02 | behaviour | {accepted.rows['A02'][1]} | no test yet |" in page
    assert "\n1 of 281 rows have a test.\n" in page  # the test without a row counts for none

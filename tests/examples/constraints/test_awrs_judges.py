# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest

judges = pytest.importorskip("awrs_judges")

DUMP = """
CREATE TABLE singer (name TEXT, age REAL);
INSERT INTO singer VALUES ('Ann', 30), ('Bo', 20), ('Cy', 30);
"""


@pytest.mark.parametrize(
    ("query", "valid", "accurate"),
    [
        ("SELECT name FROM singer WHERE age = 30", True, True),
        ("SELECT name FROM singer WHERE age > 25 ORDER BY name DESC", True, True),
        ("SELECT name FROM singer", True, False),
        ("SELECT name, age FROM singer WHERE age = 30", True, False),
        ("SELECT nam FROM singer", False, False),
        ("DELETE FROM singer", False, False),
        ("", True, False),
    ],
)
def test_queries_are_judged_by_their_results(query: str, valid: bool, accurate: bool) -> None:
    found = judges.judge_sql(query, "SELECT name FROM singer WHERE age = 30", DUMP)
    assert (found.valid, found.accurate) == (valid, accurate)


def test_order_counts_where_the_reference_orders() -> None:
    gold = "SELECT name FROM singer ORDER BY name"
    assert judges.judge_sql("SELECT name FROM singer ORDER BY 1;", gold, DUMP).accurate
    assert not judges.judge_sql("SELECT name FROM singer ORDER BY 1 DESC", gold, DUMP).accurate


def test_rows_count_as_often_as_they_come() -> None:
    gold = "SELECT age FROM singer"
    assert not judges.judge_sql("SELECT DISTINCT age FROM singer", gold, DUMP).accurate


def test_an_endless_query_is_cut_off() -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT count(*) FROM n"
    assert judges.execute(endless, DUMP) is None


FACTS = ["(on-table b1)", "(on b2 b1)", "(clear b2)"]


@pytest.mark.parametrize(
    ("text", "valid", "accurate"),
    [
        (" (on-table b1) (on b2 b1) (clear b2))))", True, True),
        (" (clear b2) (on b2 b1) (on-table b1))))", True, True),
        (" (clear b2) (on b2 b1))))", True, False),
        (" (clear b2) (on b2 b1) (on-table b1) (clear b1))))", True, False),
        (" (clear b3))))", False, False),
        (" (above b1 b2))))", False, False),
        (")))", False, False),
    ],
)
def test_goals_are_judged_as_sets_of_facts(text: str, valid: bool, accurate: bool) -> None:
    found = judges.judge_goal(text, FACTS, 2)
    assert (found.valid, found.accurate) == (valid, accurate)


def test_patterns_must_match_from_end_to_end() -> None:
    assert judges.judge_pattern("abab", r"(ab)\1").accurate
    assert not judges.judge_pattern("ababx", r"(ab)\1").accurate


def test_catastrophic_backtracking_counts_as_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "_MATCH_SECONDS", 0.01)
    assert not judges.judge_pattern("a" * 64 + "!", r"(?:(a|a)*\1?)*(?<=b)").valid


def test_json_is_judged_by_a_validator() -> None:
    schema = {"type": "array", "uniqueItems": True}
    assert judges.judge_json(" [1, 2]", schema).accurate
    assert not judges.judge_json("[1, 1]", schema).valid
    assert not judges.judge_json("[1, 2", schema).valid


@pytest.mark.parametrize(
    ("engines", "understood"),
    [
        ({"llguidance": "ok", "xgrammar": "no"}, True),
        ({"llguidance": "no", "xgrammar": "ok", "xgr_valid_accepted": "1/1"}, True),
        ({"llguidance": "no", "xgrammar": "ok", "xgr_valid_accepted": "1/2"}, False),
        ({"llguidance": "no", "xgrammar": "ok", "xgr_invalid_rejected": "0/1"}, False),
        ({"llguidance": "no", "xgrammar": "no"}, False),
    ],
)
def test_which_schemas_are_beyond_masks(engines: dict[str, str], understood: bool) -> None:
    assert judges.understood(engines) is understood


def test_a_grammar_is_wrapped_into_another() -> None:
    renamed = judges.rename_root('root ::= "a" root | rooted\nrooted ::= "b"', "inner")
    assert renamed == 'inner ::= "a" inner | rooted\nrooted ::= "b"'


def test_molecules() -> None:
    pytest.importorskip("rdkit")
    pytest.importorskip("partialsmiles")
    given = ["CCO"]
    assert judges.judge_molecule(" CCN", given).accurate
    assert judges.judge_molecule(" CCN", given).score > 0.0
    same = judges.judge_molecule(" OCC", given)
    assert same.valid
    assert not same.accurate
    assert not judges.judge_molecule(" C1CC", given).valid
    assert not judges.judge_molecule("", given).valid


def test_the_smiles_predicate_accepts_all_beginnings_of_molecules() -> None:
    pytest.importorskip("partialsmiles")
    sys.path.insert(0, str(Path(judges.__file__).parent / "smiles"))
    try:
        from smiles_predicate import SmilesPredicate  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    predicate = SmilesPredicate()
    for smiles in ("c1ccccc1C(=O)N", "C[C@H](N)C(=O)[O-]", "C1CC%10CC1CC%10", "N#CC=C/Cl"):
        text = " " + smiles
        assert all(predicate.prefix(text[:i]) for i in range(len(text) + 1)), smiles
        assert predicate.complete(text)
    for wrong in ("", " ", "C C", "C>>C", "C(C)(C)(C)(C)C", "C%", "C\n", "\u00e9"):
        assert not predicate.complete(wrong), wrong
    for hopeless in ("C(C)(C)(C)(C)C", "C C", "C>", "Cx", "  C"):
        assert not predicate.prefix(hopeless), hopeless
    with pytest.raises(ValueError, match="no argument"):
        SmilesPredicate("x")

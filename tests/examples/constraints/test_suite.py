# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

suite = pytest.importorskip("suite")


def test_a_journal_resumes_and_forgets_a_line_cut_off_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first = suite.Journal(path, {"n": 1, "of": ("a",)})
    first.add("a", {"value": 1})
    first.add("b", {"value": 2})
    path.write_text(path.read_text()[:-3])
    again = suite.Journal(path, {"n": 1, "of": ("a",)})
    assert "a" in again
    assert "b" not in again
    again.add("b", {"value": 3})
    final = suite.Journal(path, {"n": 1, "of": ("a",)}).entries
    assert {key: entry["value"] for key, entry in final.items()} == {"a": 1, "b": 3}


def test_a_journal_of_other_settings_is_refused(tmp_path: Path) -> None:
    suite.Journal(tmp_path / "j.jsonl", {"n": 1}).add("a", {})
    with pytest.raises(ValueError, match="another journal"):
        suite.Journal(tmp_path / "j.jsonl", {"n": 2})


def test_rows_may_hold_unusual_line_separators(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\u0085c"}, {"text": "d"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    assert suite.read_rows(tmp_path / "rows.jsonl") == rows


def test_quantiles_and_shares() -> None:
    assert suite.quantiles([1.0, 2.0, 3.0], 10.0) == {
        "n": 3,
        "mean": 20.0,
        "median": 20.0,
        "p90": 28.0,
    }
    assert suite.quantiles([])["median"] is None
    half = suite.share(5, 10)
    assert half["share"] == 0.5
    assert half["low"] == pytest.approx(0.2366, abs=1e-4)  # Wilson's interval of 5 of 10
    assert half["high"] == pytest.approx(0.7634, abs=1e-4)
    assert suite.share(0, 0)["share"] is None


def test_the_spread_of_a_mean() -> None:
    part = suite.mean_spread([0.0, 1.0] * 50)
    assert part["mean"] == 0.5
    # The standard error is 0.05.
    assert part["low"] == pytest.approx(0.4, abs=0.03)
    assert part["high"] == pytest.approx(0.6, abs=0.03)
    assert suite.mean_spread([2.0, 2.0])["low"] == 2.0


def test_a_single_value_is_shown_without_an_interval() -> None:
    assert suite.mean_spread([0.987])["low"] is None
    assert suite.show_mean(suite.mean_spread([0.987]), 3) == "0.987"
    assert suite.show_mean(suite.mean_spread([]), 3) == "-"
    assert suite.show_mean(suite.mean_spread([1.0, 1.0]), 1) == "1.0 [1.0, 1.0]"


def test_paths_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/x/run.py", "--data", "/secret/gad/dev.jsonl", "--model=/secret/m", "--out", "b/c"]
    monkeypatch.setattr("sys.argv", words)
    command = suite.environment("/secret/m")["command"]
    assert command == ["run.py", "--data", "gad/dev.jsonl", "--model=m", "--out", "c"]


def test_a_report_is_written_twice(tmp_path: Path) -> None:
    result = {"environment": suite.environment("m", "float32"), "value": 1}
    suite.write_report(tmp_path / "r", result, "Title", suite.markdown_table(["a"], [["x|y"]]))
    assert json.loads((tmp_path / "r.json").read_text())["value"] == 1
    text = (tmp_path / "r.md").read_text()
    assert text.startswith("# Title\n")
    assert "m, float32" in text
    assert "| x\\|y |" in text

# SPDX-License-Identifier: Apache-2.0
"""Tasks of the AWRS paper (arXiv 2504.05410) from rows of data, and independent judges of answers.

Beside them, JSON schemas that mask engines cannot express.

A judge knows nothing of the constraint: it parses, matches or executes the answer by itself. All
prompts are plain text without a chat template, and the engine takes a line break for the end of an
answer; what each task changes in its rows' prompts is said where it does.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import regex  # type: ignore[import-untyped]
import suite

from logits_processors.compilation import Spec

_SQL_STEPS = 1_000_000
_MATCH_SECONDS = 1.0
_GOAL_END = ")))"  # closes `and`, `:goal` and `define`, as in the prompt's examples
_FACT = re.compile(r"\((arm-empty|(?:clear|holding|on-table) b\d|on b\d b\d)\)")


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer.

    Attributes:
        valid: well formed by an independent check.
        accurate: right.
        score: a graded quality where the task has one.
    """

    valid: bool
    accurate: bool
    score: float | None = None


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        id: of its row.
        prompt: plain text.
        spec: the constraint for AWRS.
        mask_spec: the constraint for masking; ``None`` where no mask engine can express it.
        max_tokens: longest answer.
        judge: of the answer's text.
    """

    id: str
    prompt: str
    spec: Spec
    mask_spec: Spec | None
    max_tokens: int
    judge: Callable[[str], Verdict]


def pattern_matching(folder: Path) -> list[Task]:
    """Write a string that matches a regular expression; masks where xgrammar compiles it.

    In the prompt's examples each answer moves to a line of its own: behind ``Output:`` a model
    writes a space first, which most of the expressions forbid. Tasks with and without a mask take
    turns as long as there are both, so that the first few hold both.
    """
    tasks = [
        Task(
            row["id"],
            row["prompt"].replace("\nOutput: ", "\nOutput:\n") + "\n",
            Spec("regex_partial", row["regex"]),
            # xgrammar takes a property in brackets for the letter p, so it is refused.
            Spec("regex", row["regex"])
            if row["xgrammar"] and "\\p" not in row["regex"].lower()
            else None,
            32,
            lambda text, row=row: judge_pattern(text, row["regex"]),  # type: ignore[misc]
        )
        for row in suite.read_rows(folder / "dev.jsonl")
    ]
    with_mask = [task for task in tasks if task.mask_spec is not None]
    without = [task for task in tasks if task.mask_spec is None]
    pairs = [task for pair in zip(with_mask, without, strict=False) for task in pair]
    return pairs + with_mask[len(without) :] + without[len(with_mask) :]


def judge_pattern(text: str, expression: str) -> Verdict:
    """Match the whole text; an answer that matches is right."""
    try:
        matches = regex.fullmatch(expression, text, timeout=_MATCH_SECONDS) is not None
    except TimeoutError:
        matches = False
    return Verdict(matches, matches)


def text_to_sql(folder: Path) -> list[Task]:
    """Answer a question by a query; one grammar per database for both methods."""
    databases = {row["db_id"]: row for row in suite.read_rows(folder / "databases_dev.jsonl")}
    tasks = []
    for row in suite.read_rows(folder / "dev.jsonl"):
        database = databases[row["db_id"]]
        spec = Spec("ebnf", database["grammar_ebnf"])
        dump = database["sqlite_dump_synthetic"]
        tasks.append(
            Task(
                row["id"],
                row["prompt"],
                spec,
                spec,
                64,
                lambda text, dump=dump, row=row: judge_sql(  # type: ignore[misc]
                    text, row["gold"], dump
                ),
            )
        )
    return tasks


def judge_sql(text: str, gold: str, dump: str) -> Verdict:
    """Execute both queries: valid if it runs, accurate if the results are equal.

    The order of rows counts where the reference query orders them.
    """
    wanted, found = execute(gold, dump), execute(text, dump)
    if found is None or wanted is None:
        return Verdict(found is not None, False)
    if re.search(r"\border\s+by\b", gold, re.IGNORECASE):
        return Verdict(True, wanted == found)
    return Verdict(True, Counter(map(repr, wanted)) == Counter(map(repr, found)))


def execute(query: str, dump: str) -> list[tuple[Any, ...]] | None:
    """Return the rows of a query on a fresh database; ``None`` if it fails or takes too long."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(dump)
        connection.execute("PRAGMA query_only = ON")
        connection.set_progress_handler(lambda: 1, _SQL_STEPS)
        return connection.execute(query).fetchall()
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return None
    finally:
        connection.close()


def goal_inference(folder: Path) -> list[Task]:
    """Write the facts of a Blocksworld goal, and the parentheses that close the problem."""
    grammar = (folder / "goal.ebnf").read_text(encoding="utf-8")
    spec = Spec("ebnf", f'root ::= goal "{_GOAL_END}"\n{rename_root(grammar, "goal")}')
    return [
        Task(
            row["id"],
            row["prompt"],
            spec,
            spec,
            112,
            lambda text, row=row: judge_goal(  # type: ignore[misc]
                text, row["goal_facts"], row["n_blocks"]
            ),
        )
        for row in suite.read_rows(folder / "dev.jsonl")
    ]


def rename_root(grammar: str, name: str) -> str:
    """Return ``grammar`` with its rule ``root`` called ``name``."""
    return re.sub(r"\broot\b", name, grammar)


def judge_goal(text: str, facts: Sequence[str], blocks: int) -> Verdict:
    """Valid: only facts about existing blocks; accurate: exactly the wanted set of facts."""
    body = text.strip().removesuffix(_GOAL_END)
    names = {f"b{i + 1}" for i in range(blocks)}
    valid = not _FACT.sub("", body).strip() and set(re.findall(r"b\d", body)) <= names
    found = {match.group() for match in _FACT.finditer(body)}
    return Verdict(valid and bool(found), valid and found == set(facts))


def molecular(folder: Path) -> list[Task]:
    """Write one more molecule; masks by a grammar of SMILES, which knows no valences."""
    grammar = (folder / "smiles_generic.ebnf").read_text(encoding="utf-8")
    mask_spec = Spec("ebnf", f'root ::= " "? molecule\n{rename_root(grammar, "molecule")}')
    return [
        Task(
            row["id"],
            row["prompt"],
            Spec("predicate", "smiles"),
            mask_spec,
            48,
            lambda text, row=row: judge_molecule(  # type: ignore[misc]
                text, row["molecules"]
            ),
        )
        for row in suite.read_rows(folder / "dev.jsonl")
    ]


def judge_molecule(text: str, known: Sequence[str]) -> Verdict:
    """Valid by partialsmiles; accurate if RDKit reads it and it is not a given one; score: QED."""
    from rdkit import Chem, rdBase  # type: ignore[import-not-found, unused-ignore]
    from rdkit.Chem import QED  # type: ignore[import-not-found, unused-ignore]
    from smiles.smiles_predicate import SmilesPredicate

    smiles = text.strip()
    valid = SmilesPredicate().complete(smiles)
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles) if smiles else None
        if molecule is None:
            return Verdict(valid, False)
        canonical = Chem.MolToSmiles(molecule)
        given = {Chem.MolToSmiles(m) for m in map(Chem.MolFromSmiles, known) if m is not None}
        return Verdict(valid, valid and canonical not in given, QED.default(molecule))


_JSON_PROMPT = """Under each schema stands a JSON value that satisfies it, on one line.
Schema: {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
JSON:
{"name": "Ada"}
Schema: {"type": "array", "items": {"type": "integer"}, "minItems": 2}
JSON:
[4, 7]
Schema: %s
JSON:
"""
_LONGEST_SCHEMA = 2000  # characters


def beyond_masks(folder: Path) -> list[Task]:
    """Write a value for a schema that both mask engines refuse or misread, by a validator."""
    tasks = []
    for row in suite.read_rows(folder / "dev.jsonl"):
        schema, engines = json.dumps(row["schema"]), row["engines"]
        satisfiable = any(test["valid"] for test in row["tests"])
        skipped = row.get("optional") or row.get("uses_remote") or not satisfiable
        if not (skipped or understood(engines) or len(schema) > _LONGEST_SCHEMA):
            tasks.append(
                Task(
                    row["id"],
                    _JSON_PROMPT % schema,
                    Spec("json_validate", schema),
                    None,
                    192,
                    lambda text, row=row: judge_json(text, row["schema"]),  # type: ignore[misc]
                )
            )
    return tasks


def understood(engines: Mapping[str, Any]) -> bool:
    """Tell whether a mask engine compiled a schema and agreed with all its labelled instances."""
    for engine, short in (("llguidance", "llg"), ("xgrammar", "xgr")):
        counts = [
            engines.get(f"{short}_{kind}", "0/0") for kind in ("valid_accepted", "invalid_rejected")
        ]
        if engines[engine] == "ok" and all(a == b for a, b in (c.split("/") for c in counts)):
            return True
    return False


def judge_json(text: str, schema: Any) -> Verdict:
    """Validate the value; formats are annotations, as the specification has it."""
    try:
        value = json.loads(text)
    except ValueError:
        return Verdict(False, False)
    dialect = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    valid = bool(dialect(schema).is_valid(value))
    return Verdict(valid, valid)


SUITES: Mapping[str, Callable[[Path], list[Task]]] = {
    "awrs_pattern_matching": pattern_matching,
    "awrs_text_to_sql": text_to_sql,
    "awrs_goal_inference": goal_inference,
    "awrs_molecular": molecular,
    "jsonschemabench": beyond_masks,
    "json_schema_test_suite": beyond_masks,
}
"""The suites by the name of their folder."""

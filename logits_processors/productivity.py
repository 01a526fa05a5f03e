# SPDX-License-Identifier: Apache-2.0
"""Does a context-free grammar generate any string at all?

``root ::= "a" root`` parses, compiles and has a first token, yet no text ever completes it: a
request would run to its length limit. The textbook fixed point finds such grammars: a rule is
productive when one of its alternatives consists of productive symbols only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

_RULE_REF, _SEQUENCE, _CHOICES, _REPEAT = 4, 5, 6, 8
_KNOWN_LAYOUTS = frozenset({"v16"})


def generates_nothing(serialized_grammar: str) -> bool:
    """Tell whether no finite text belongs to a grammar.

    Args:
        serialized_grammar: ``xgrammar.Grammar.serialize_json()``. Expressions of kinds that this
            module does not know count as productive, and of a layout that it does not know the
            whole grammar does: the answer ``True`` is certain, ``False`` is not.
    """
    grammar = json.loads(serialized_grammar)
    if grammar.get("__VERSION__") not in _KNOWN_LAYOUTS:
        return False
    data: list[int] = grammar["grammar_expr_data"]
    offsets: list[int] = grammar["grammar_expr_indptr"]
    bodies: list[int] = [rule[1] for rule in grammar["rules"]]
    productive = [False] * len(bodies)

    def expression(index: int) -> tuple[int, Sequence[int]]:
        start = offsets[index]
        return data[start], data[start + 2 : start + 2 + data[start + 1]]

    def is_productive(index: int) -> bool:
        kind, arguments = expression(index)
        if kind == _RULE_REF:
            return productive[arguments[0]]
        if kind == _REPEAT:
            return arguments[1] == 0 or productive[arguments[0]]
        if kind == _SEQUENCE:
            return all(is_productive(part) for part in arguments)
        if kind == _CHOICES:
            return any(is_productive(part) for part in arguments)
        return True

    changed = True
    while changed:
        changed = False
        for rule, body in enumerate(bodies):
            if not productive[rule] and is_productive(body):
                productive[rule] = changed = True
    return not productive[grammar["root_rule_id"]]

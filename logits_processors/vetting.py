# SPDX-License-Identifier: Apache-2.0
"""Compiling a stranger's constraint where it can do no harm.

A short grammar can keep an engine busy for hours (nested repetitions, ambiguous recursion) or
exhaust its memory, and a thread inside C++ cannot be stopped. So a constraint is first compiled in
a child process that dies when its processor time is up (on a busy machine the clock on the wall
would refuse honest constraints); what passed there is then compiled again, in bounded time, where
it is needed. A few tokens are walked as well, because some grammars compile at
once and explode at the first token. The child stays for the next constraint.
"""

from __future__ import annotations

import base64
import json
import resource
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from .bitmask import unpack
from .constraint import CompiledConstraint, ConstraintError, ConstraintRuntimeError
from .limits import DEFAULT_LIMITS, STARVED, Limits, limit_named
from .race import uniforms
from .vocabulary import Vocabulary

_START_SECONDS = 120.0
_WALK_TOKENS = 64
_ALMOST_ONE = np.nextafter(1.0, 0.0)
_OUT_OF_MEMORY = "bad_alloc"
_STATM = Path("/proc/self/statm")


class Vetter:
    """Compiles constraints in a child process, one at a time.

    Predicates are not vetted: they are installed code.

    Args:
        vocabulary: the model's vocabulary.
        limits: bounds for every constraint.
    """

    def __init__(self, vocabulary: Vocabulary, limits: Limits = DEFAULT_LIMITS) -> None:
        self._vocabulary = vocabulary
        self._limits = limits
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    def __enter__(self) -> Vetter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, kind: str, source: str) -> None:
        """Return if the constraint compiles within the limits.

        Raises:
            ConstraintError: what the compilation raised, or that it ran out of time or memory.
        """
        with self._lock:
            if self._child is not None and self._child.poll() is not None:
                self.close()  # it died between two checks, which says nothing about this one
            child = self._child or self._start()
            seconds = STARVED * self._limits.compile_seconds
            reply = self._ask(child, {"kind": kind, "source": source}, seconds)
        if reply is None:
            raise ConstraintError(
                f"{kind}: the compilation did not finish within {self._limits.compile_seconds} s "
                f"of processor time and {self._limits.compile_memory_mb} MB; simplify nested "
                "repetitions and ambiguous recursion "
                f"({limit_named('compile_seconds', 'compile_memory_mb')})"
            )
        if reply["error"]:
            raise ConstraintError(reply["error"])

    def close(self) -> None:
        """End the child process; the next check starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._child = child
        tokens = [base64.b85encode(text).decode() for text in self._vocabulary.tokens]
        hello = {
            "tokens": tokens,
            "eos_ids": self._vocabulary.eos_ids,
            "limits": self._limits.model_dump(),
        }
        if self._ask(child, hello, _START_SECONDS) is None:
            raise RuntimeError("the process that vets constraints did not start")
        return child

    def _ask(
        self, child: subprocess.Popen[bytes], message: dict[str, Any], seconds: float
    ) -> dict[str, Any] | None:
        """Return the child's reply; ``None``, and no child, when it gave none in time."""
        assert child.stdin is not None
        assert child.stdout is not None
        deadline = time.monotonic() + seconds
        line = b""
        try:
            child.stdin.write(json.dumps(message).encode() + b"\n")
            child.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(child.stdout, selectors.EVENT_READ)
                while not line.endswith(b"\n"):
                    if not selector.select(max(0.0, deadline - time.monotonic())):
                        break
                    part = child.stdout.read1()  # type: ignore[attr-defined]
                    if not part:
                        break
                    line += part
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            self.close()
            return None
        reply: dict[str, Any] = json.loads(line)
        return reply


def _serve() -> None:
    """Read constraints from standard input and answer each with its error, or none."""
    hello = json.loads(sys.stdin.readline())
    tokens = tuple(base64.b85decode(text) for text in hello["tokens"])
    vocabulary = Vocabulary(tokens, tuple(hello["eos_ids"]))
    limits = Limits(**hello["limits"])
    # Imported here and warmed up, so that a check is charged for its own constraint only.
    from .compilation import Spec, compile_constraint

    compile_constraint(Spec("ebnf", "root ::= [^x]*"), vocabulary, limits)
    _bound_memory(limits.compile_memory_mb)
    print(json.dumps({"error": ""}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        error = ""
        # The signal's own action ends the process, inside C++ too.
        signal.setitimer(signal.ITIMER_PROF, limits.compile_seconds)
        try:
            _rehearse(compile_constraint(Spec(**request), vocabulary, limits))
        except (ConstraintError, ConstraintRuntimeError) as refusal:
            error = str(refusal)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        if _OUT_OF_MEMORY in error:
            sys.exit(1)
        print(json.dumps({"error": error}), flush=True)


def _rehearse(compiled: CompiledConstraint) -> None:
    """Walk some tokens; constraints without a cheap mask bound their own checks by time.

    Two walks repeat the first and the last allowed token, for repetition is what makes ambiguity
    explode; one varies. What explodes elsewhere is ended while generating, by ``check_seconds``.
    """
    varied = uniforms(seed=0, position=0, count=_WALK_TOKENS)
    for noise in (np.zeros(_WALK_TOKENS), np.full(_WALK_TOKENS, _ALMOST_ONE), varied):
        constraint = compiled.start()
        for uniform in noise:
            mask = constraint.mask()
            if mask is None:
                return
            allowed = np.flatnonzero(unpack(mask, compiled.vocabulary.size))
            if allowed.size == 0:
                break
            constraint.accept(int(allowed[int(uniform * allowed.size)]))


def _bound_memory(megabytes: int) -> None:
    """Let the process grow by ``megabytes`` of address space from here, where the OS tells it."""
    if not _STATM.exists():
        return
    pages = int(_STATM.read_text(encoding="ascii").split()[0])
    bound = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


if __name__ == "__main__":
    _serve()

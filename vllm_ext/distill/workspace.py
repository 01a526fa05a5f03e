# SPDX-License-Identifier: Apache-2.0
"""The output folder: whose draft it holds, and what is done already.

While a draft is made, everything unfinished is in the hidden folder `.distill`: batches, the
checkpoint, and a journal of what is decided once (`identity`, evaluations, budgets). The report is
written last; a folder with a report is finished and has no `.distill`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_ext.distill.errors import DistillError

REPORT = "distill.json"
_HIDDEN = ".distill"


class Workspace:
    """An output folder that belongs to one target, one set of texts and one set of settings.

    Args:
        out: the folder; made if it is not there.
        identity: what the draft is made of, as plain JSON types.

    Raises:
        DistillError: if the folder holds something else.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out = out
        self.hidden = out / _HIDDEN
        self._journal_path = self.hidden / "journal.json"
        if out.exists() and not out.is_dir():
            raise DistillError(f"--out {out} is a file: give a folder")
        report = self.report()
        if report is not None:
            self._check(report.get("identity", {}), identity)
            # A kill right after the report leaves it.
            shutil.rmtree(self.hidden, ignore_errors=True)
        elif self._journal_path.exists():
            self._check(self._journal().get("identity", {}), identity)
        else:
            if out.exists() and any(path.name != _HIDDEN for path in out.iterdir()):
                raise DistillError(f"--out {out} holds other files: give a new or empty folder")
            self.hidden.mkdir(parents=True, exist_ok=True)
            self._write({"identity": identity})

    def report(self) -> dict[str, Any] | None:
        """The report of a finished draft, else `None`."""
        return _load(self.out / REPORT) if (self.out / REPORT).exists() else None

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first asked for under `name`: plain JSON types."""
        journal = self._journal()
        if name not in journal:
            # Through JSON, so that a first run goes on with what a second one would read.
            journal[name] = json.loads(json.dumps(make()))
            self._write(journal)
        return journal[name]

    def finish(self, report: dict[str, Any]) -> dict[str, Any]:
        """Write the report and take away what only an unfinished draft needs; what was written."""
        _replace(self.out / REPORT, {"identity": self._journal()["identity"], **report})
        shutil.rmtree(self.hidden)
        return _load(self.out / REPORT)

    def _check(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        # Through JSON, as what was found went.
        wanted = json.loads(json.dumps(wanted))
        names = [name for name in wanted if found.get(name) != wanted[name]]
        if names:
            shown = "; ".join(f"{n}: {found.get(n)} there, {wanted[n]} now" for n in names)
            raise DistillError(
                f"--out {self.out} holds a draft that was made otherwise ({shown}): give another "
                "folder, or remove this one"
            )

    def _journal(self) -> dict[str, Any]:
        return _load(self._journal_path)

    def _write(self, journal: dict[str, Any]) -> None:
        _replace(self._journal_path, journal)


def files_hash(files: Sequence[Path]) -> str:
    """32 hex digits for the contents of `files`, in their order.

    Raises:
        DistillError: if one cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DistillError(f"input {path}: {error}") from error
        digest.update(f"{len(content)};".encode())
        digest.update(content)
    return digest.hexdigest()


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DistillError(f"{path} cannot be read ({error}): remove {path.parent}") from error
    if not isinstance(found, dict):
        raise DistillError(f"{path} is no object: remove {path.parent}")
    return found


def _replace(path: Path, content: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)

# SPDX-License-Identifier: Apache-2.0
"""What the evaluation scripts in this folder share: rows, resumable journals, numbers, reports."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from scipy.stats import binomtest, bootstrap

from logits_processors.vocabulary import Vocabulary
from vllm_ext.cli.environment import describe, installed_version

ENGINE_PACKAGES = ("xgrammar", "llguidance", "jsonschema", "regex", "partialsmiles", "rdkit")
_RESAMPLES = 2000


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    # Not splitlines: JSON strings may hold U+2028 and the like as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


class Journal:
    """Finished pieces of a long run, one JSON line each, so that it can be cut off and resumed.

    Args:
        path: the file; made on the first entry. A last line cut off by a kill is dropped.
        settings: what all entries depend on; an existing journal must have been made with the same.

    Raises:
        ValueError: the file was made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self.entries: dict[str, dict[str, Any]] = {}
        whole: list[str] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if not line.endswith("\n"):
                    break
                whole.append(line)
        wanted = json.loads(json.dumps(settings))
        if whole:
            found = json.loads(whole[0])["settings"]
            if found != wanted:
                raise ValueError(
                    f"{path} was made with settings {found}, now they are {wanted}; "
                    "name another journal or delete this one"
                )
            for line in whole[1:]:
                entry = json.loads(line)
                self.entries[entry["key"]] = entry
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = [json.dumps({"settings": wanted}) + "\n"]
        path.write_text("".join(whole), encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Write down that the piece ``key`` is done, with its result in plain JSON types."""
        stored = {"key": key, **entry}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(stored) + "\n")
        self.entries[key] = stored


def load_vocabulary(model: str) -> tuple[Any, Vocabulary]:
    """Return the tokenizer of ``model`` (a folder or a Hugging Face name) and its byte table."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    size = AutoConfig.from_pretrained(model).vocab_size
    ids: set[int] = {tokenizer.eos_token_id}
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = None
    if ends is not None:
        ids.update(ends if isinstance(ends, list) else [ends])
    return tokenizer, Vocabulary.from_tokenizer(tokenizer, size, sorted(ids))


def open_engine(
    model: str,
    *,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    line_ends_text: bool,
    **options: Any,
) -> Any:
    """Start an eager vLLM engine with prefix caching.

    Args:
        model: a folder or a Hugging Face name.
        dtype: of weights and activations.
        max_model_len: prompt and text together.
        max_num_seqs: requests in a batch.
        line_ends_text: let a line break end a text beside the model's own end of text. A plain
            few-shot prompt asks for one line, and the model ends it so; its end-of-text token has a
            probability of 1e-3 to 1e-6 there, which would be most of what is measured.
        options: more arguments of ``vllm.LLM``.
    """
    from transformers import GenerationConfig
    from vllm import LLM

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if line_ends_text:
        tokenizer, vocabulary = load_vocabulary(model)
        [line_break] = tokenizer.encode("\n", add_special_tokens=False)
        folder = tempfile.mkdtemp(prefix="generation-config-")
        GenerationConfig(eos_token_id=[*vocabulary.eos_ids, line_break]).save_pretrained(folder)
        options["generation_config"] = folder
    return LLM(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        enforce_eager=True,
        enable_prefix_caching=True,
        disable_log_stats=True,
        **options,
    )


def quantiles(values: Sequence[float] | NDArray[np.float64], scale: float = 1.0) -> dict[str, Any]:
    """Return ``n``, ``mean``, ``median`` and ``p90`` of ``values`` times ``scale``."""
    data = np.asarray(values, dtype=np.float64) * scale
    if data.size == 0:
        return {"n": 0, "mean": None, "median": None, "p90": None}
    return {
        "n": int(data.size),
        "mean": float(data.mean()),
        "median": float(np.median(data)),
        "p90": float(np.quantile(data, 0.9)),
    }


def share(hits: int, total: int) -> dict[str, Any]:
    """Return a proportion with its 95% Wilson interval."""
    if total == 0:
        return {"hits": 0, "n": 0, "share": None, "low": None, "high": None}
    interval = binomtest(hits, total).proportion_ci(method="wilson")
    return {
        "hits": hits,
        "n": total,
        "share": hits / total,
        "low": float(interval.low),
        "high": float(interval.high),
    }


def mean_spread(values: Sequence[float]) -> dict[str, Any]:
    """Return a mean with its 95% percentile bootstrap interval over ``values``.

    One value says nothing about its spread: its interval is ``None``.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return {"n": 0, "mean": None, "low": None, "high": None}
    mean = float(data.mean())
    if data.size == 1:
        return {"n": 1, "mean": mean, "low": None, "high": None}
    if np.ptp(data) == 0.0:
        return {"n": int(data.size), "mean": mean, "low": mean, "high": mean}
    interval = bootstrap(
        (data,),
        np.mean,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {
        "n": int(data.size),
        "mean": mean,
        "low": float(interval.low),
        "high": float(interval.high),
    }


def show_share(part: dict[str, Any]) -> str:
    """Write the result of :func:`share` as ``hits/n = percent [low, high]``."""
    if not part["n"]:
        return "-"
    low, high = 100 * part["low"], 100 * part["high"]
    return f"{part['hits']}/{part['n']} = {100 * part['share']:.1f}% [{low:.0f}, {high:.0f}]"


def show_mean(part: dict[str, Any], digits: int = 2) -> str:
    """Write the result of :func:`mean_spread` as ``mean [low, high]``, one value as itself."""
    if part["mean"] is None:
        return "-"
    if part["n"] == 1:
        return f"{part['mean']:.{digits}f}"
    return f"{part['mean']:.{digits}f} [{part['low']:.{digits}f}, {part['high']:.{digits}f}]"


def show_quantiles(part: dict[str, Any], digits: int = 0) -> str:
    """Write the result of :func:`quantiles` as ``median / p90``."""
    if not part["n"]:
        return "-"
    return f"{part['median']:.{digits}f} / {part['p90']:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a markdown table, the first column left- and the others right-aligned."""
    lines = [list(map(str, header)), ["---", *["---:"] * (len(header) - 1)]]
    lines += [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def environment(model: str, dtype: str | None = None) -> dict[str, Any]:
    """What a result depends on, with every path shortened to its name."""
    found = describe()
    found["command"] = [_name(word) for word in sys.argv]
    found["versions"] |= {name: installed_version(name) for name in ENGINE_PACKAGES}
    found["model"] = Path(model).name
    if dtype is not None:
        found["dtype"] = dtype
    return found


def _name(word: str) -> str:
    option, equals, value = word.partition("=")
    if equals and option.startswith("-"):
        return option + equals + _name(value)
    if "/" not in word:
        return word
    # A data file's folder says which set it is.
    return "/".join(Path(word).parts[-2:]) if word.endswith(".jsonl") else Path(word).name


def header_lines(found: dict[str, Any]) -> str:
    """Return the markdown lines that name the machine, versions and command of a result."""
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items() if v is not None)
    commit = found["git_commit"] or "unknown"
    return (
        f"- Model: {found['model']}"
        + (f", {found['dtype']}" if "dtype" in found else " (its tokenizer only)")
        + f"\n- Machine: {found['cores']} cores of {found['cpu']}, {found['memory_gib']} GiB; "
        f"GPU: {', '.join(found['gpu']) or 'none'}; load {found['load_average'][0]:.1f}\n"
        f"- Versions: Python {found['python']}, {versions}\n"
        f"- Command: `{' '.join(found['command'])}`\n- Date: {found['date']}, commit {commit}\n"
    )


def write_report(out: Path, result: dict[str, Any], title: str, body: str) -> None:
    """Write ``out`` with the suffixes ``.json`` (everything) and ``.md`` (for reading)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = f"# {title}\n\n{header_lines(result['environment'])}\n{body}"
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
    """Show a progress bar on standard error; it also works where that is a file."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield bar, bar.add_task(what, total=total)

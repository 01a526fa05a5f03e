# SPDX-License-Identifier: Apache-2.0
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_ext.cli.counters import Counters

VLLMS = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
OURS = ("vllm_ext:drafting_seconds", "vllm_ext:steps")


OUTPUTS = ("vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds")


def registry(*amounts: float, outputs: tuple[int, int] = (0, 0)) -> CollectorRegistry:
    made = CollectorRegistry()
    for name, count in zip(OUTPUTS, outputs, strict=True):
        histogram = Histogram(name, "doc", registry=made)
        for _ in range(count):
            histogram.observe(0.1)
    for name, amount in zip([*VLLMS, *OURS], amounts, strict=False):
        Counter(name, "doc", registry=made).inc(amount)
    return made


def test_a_registry_and_its_text_say_the_same() -> None:
    made = registry(9, 4, 0.125, 5, outputs=(2, 5))
    expected = Counters(9, 4, 7, 0.125, 5)
    assert Counters.read(made.collect()) == expected
    text = generate_latest(made).decode()
    assert Counters.read(text_string_to_metric_families(text)) == expected


def test_labels_are_summed() -> None:
    made = CollectorRegistry()
    counter = Counter(VLLMS[0], "doc", ["engine"], registry=made)
    for engine in range(3):
        counter.labels(engine).inc(2)
    assert Counters.read(made.collect()).draft_tokens == 6


def test_without_the_plugin_its_counts_are_unknown_not_zero() -> None:
    counters = Counters.read(registry(9, 4).collect())
    assert (counters.drafting_s, counters.engine_steps) == (None, None)
    result = counters.since(counters).result([], 1.0)
    assert (result.draft_tokens, result.drafting_s, result.engine_steps) == (0, None, None)


def test_what_was_counted_since() -> None:
    before, after = Counters(9, 4, 20, 0.125, 5), Counters(12, 5, 22, 0.5, 7)
    assert after.since(before) == Counters(3, 1, 2, 0.375, 2)
    # Collectors of the plugin may appear after the first look.
    assert after.since(Counters()) == after

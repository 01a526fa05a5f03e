# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from vllm_ext.cli.stats import median_ratio, quantiles_ms, spread_of_median


def test_ratio_is_how_many_times_faster_the_arm_is() -> None:
    spread = median_ratio([[0.3], [0.6], [0.9]], [[0.1], [0.2], [0.3]])
    assert spread.as_dict() == pytest.approx({"median": 3.0, "low": 3.0, "high": 3.0})


def test_ratio_pairs_within_groups_and_rounds() -> None:
    # The machine was ten times slower in the second round and on the second group; every pair
    # still has the ratio 2. Ratios of averages over unpaired data would not show that.
    baseline = [[0.2, 2.0], [2.0, 20.0]]
    arm = [[0.1, 1.0], [1.0, 10.0]]
    assert median_ratio(baseline, arm).median == pytest.approx(2.0)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(60):
        values = np.exp(rng.normal(np.log(1.4), 0.2, size=40))
        spread = spread_of_median(list(values))
        assert spread.low <= spread.median <= spread.high
        covered += spread.low <= 1.4 <= spread.high
    # Binomial(60, 0.95): below 50 has probability 2e-4; an interval of half the width covers ~40.
    assert covered >= 50


def test_interval_narrows_with_more_groups() -> None:
    rng = np.random.default_rng(3)
    few, many = (spread_of_median(list(rng.normal(1.0, 0.1, size=n))) for n in (10, 400))
    assert many.high - many.low < (few.high - few.low) / 2


def test_one_group_has_no_spread() -> None:
    assert spread_of_median([1.5]).as_dict() == {"median": 1.5, "low": 1.5, "high": 1.5}


@pytest.mark.parametrize(
    ("baseline", "arm"),
    [([], []), ([[1.0]], [[1.0], [2.0]]), ([[1.0, 2.0]], [[1.0]]), ([[0.0]], [[1.0]])],
)
def test_unpaired_or_impossible_times_are_refused(
    baseline: list[list[float]], arm: list[list[float]]
) -> None:
    with pytest.raises(ValueError, match=r"same groups|positive"):
        median_ratio(baseline, arm)


def test_quantiles_are_in_milliseconds() -> None:
    assert quantiles_ms([0.1, 0.2, 0.3])["median"] == pytest.approx(200.0)
    assert quantiles_ms([])["p90"] is None

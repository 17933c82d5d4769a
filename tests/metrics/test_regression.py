import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_squared_error

from lora_cli.metrics.regression import regression_metrics


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ties", [False, True])
def test_scores_are_those_of_scipy_and_scikit_learn(seed: int, ties: bool) -> None:
    generator = np.random.default_rng(seed)
    actual = generator.normal(3, 2, 20 + seed)
    predicted = actual + generator.normal(0, 2, len(actual))
    if ties:
        actual, predicted = actual.round(), predicted.round()
    assert regression_metrics(predicted.tolist(), actual.tolist()) == pytest.approx(
        {
            "pearson": pearsonr(predicted, actual).statistic,
            "spearman": spearmanr(predicted, actual).statistic,
            "mse": mean_squared_error(actual, predicted),
        }
    )


def test_what_is_constant_says_nothing() -> None:
    found = regression_metrics([2.0, 2.0, 2.0], [1.0, 2.0, 3.0])
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)
    assert regression_metrics([1.0], [2.0])["pearson"] == 0.0


def test_no_rows() -> None:
    assert set(regression_metrics([], []).values()) == {0.0}

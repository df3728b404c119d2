"""The artifact judge of features against scipy and numpy, on Gaussians whose artifact rate is known."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from lbdt.evaluation.metrics.feature_distances import DirectionJudge, FeatureJudge
from lbdt.runs.files import tensor_bytes
from lbdt.testing import assert_close
from tests.repeats import repeats

WIDTH = 8


def gaussians(count, seed, width=WIDTH):
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) @ mixing + 3


@pytest.fixture(scope="module")
def judge():
    return FeatureJudge.fit(gaussians(4000, 0))


def test_distances_are_scipys_with_the_shrunk_covariance_of_numpy(judge):
    fitted = gaussians(4000, 0).double().numpy()
    covariance = np.cov(fitted, rowvar=False, bias=True)
    shrunk = 0.99 * covariance + 0.01 * np.diag(covariance).mean() * np.eye(WIDTH)
    inverse = np.linalg.inv(shrunk)
    given = gaussians(5, 1)
    expected = [mahalanobis(row, fitted.mean(0), inverse) for row in given.double().numpy()]
    assert judge.distances(given).tolist() == pytest.approx(expected)
    assert judge.distances(given).dtype == torch.float64


def test_about_one_new_picture_in_a_hundred_is_called_an_artifact(judge):
    rate = judge.artifacts(gaussians(20_000, 2)).double().mean()
    assert 0.006 < rate < 0.015


def test_few_pictures_of_many_features_do_not_call_the_most_of_new_ones_artifacts():
    """The threshold is of held-out pictures: distances of the fitted ones themselves are far too small."""
    judge = FeatureJudge.fit(gaussians(200, 0, width=64))
    assert judge.artifacts(gaussians(4000, 2, width=64)).double().mean() < 0.05
    assert judge.artifacts(gaussians(200, 0, width=64)).double().mean() < 0.005


def test_planted_outliers_are_all_artifacts(judge):
    away = 10 * gaussians(500, 0).std(0)
    planted = gaussians(100, 3)
    planted[::2] += away
    planted[1::2, 4] -= 100
    assert judge.artifacts(planted).all()


def test_the_order_of_the_pictures_hardly_matters_and_fits_repeat():
    features = gaussians(400, 5)
    first, again, other = (FeatureJudge.fit(x) for x in (features, features, features.flip(0)))
    assert repeats([first.threshold, first.precision], [again.threshold, again.precision])
    assert 0.8 < other.threshold / first.threshold < 1.25


def test_dimensions_that_never_move_are_allowed():
    features = gaussians(400, 0)
    features[:, 3] = 7
    judge = FeatureJudge.fit(features)
    fresh = gaussians(400, 1)
    fresh[:, 3] = 7
    assert judge.artifacts(fresh).double().mean() < 0.05
    fresh[:, 3] = 70
    assert judge.artifacts(fresh).all()


def test_pictures_that_are_all_equal_leave_only_themselves_clean():
    judge = FeatureJudge.fit(torch.full((8, 3), 0.1))
    assert not judge.artifacts(torch.full((2, 3), 0.1)).any()
    assert judge.artifacts(torch.full((2, 3), 0.2)).all()


def test_saved_and_loaded_it_judges_alike(judge, tmp_path):
    judge.save(tmp_path / "judge.safetensors")
    loaded = FeatureJudge.load(tmp_path / "judge.safetensors")
    assert torch.equal(loaded.mean, judge.mean) and torch.equal(loaded.precision, judge.precision)
    given = gaussians(50, 4)
    assert_close(loaded.distances(given), judge.distances(given), "encode_topk")
    assert loaded.threshold == judge.threshold
    assert [path.name for path in tmp_path.iterdir()] == ["judge.safetensors"]


@pytest.mark.parametrize(
    "features",
    [torch.zeros(7, 3), torch.zeros(8), torch.full((8, 3), torch.inf), torch.tensor([[torch.nan]] * 9)],
    ids=["seven-pictures", "one-dimension", "infinite", "nan"],
)
def test_what_cannot_be_fitted_is_refused(features):
    with pytest.raises(ValueError, match=r"finite \[n >= 8, F\]"):
        FeatureJudge.fit(features)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(2, WIDTH + 1), r"expected \[n, 8\], got \[2, 9\]"),
        (torch.zeros(WIDTH), r"expected \[n, 8\], got \[8\]"),
        (torch.full((2, WIDTH), torch.nan), "finite"),
    ],
    ids=["width", "one-dimension", "nan"],
)
def test_other_features_are_refused(judge, features, message):
    with pytest.raises(ValueError, match=message):
        judge.distances(features)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mean": torch.zeros(3), "threshold": torch.ones(1)}, "missing tensor precision"),
        (
            {"mean": torch.zeros(3), "precision": torch.zeros(2, 2), "threshold": torch.ones(1)},
            r"precision: expected shape \[3, 3\], got \[2, 2\]",
        ),
        (
            {"mean": torch.zeros(3), "precision": torch.zeros(3, 3), "threshold": torch.ones(2)},
            r"threshold: expected shape \[1\]",
        ),
    ],
    ids=["missing", "not-square", "two-thresholds"],
)
def test_another_file_is_refused_by_name(tmp_path, tensors, message):
    (tmp_path / "judge.safetensors").write_bytes(tensor_bytes(tensors, None))
    with pytest.raises(ValueError, match=f"judge.safetensors: .*{message}"):
        FeatureJudge.load(tmp_path / "judge.safetensors")


def test_a_damaged_file_is_refused_by_name(judge, tmp_path):
    path = tmp_path / "judge.safetensors"
    judge.save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="judge.safetensors"):
        FeatureJudge.load(path)


def test_a_direction_judge_calls_one_in_a_hundred_unedited_pictures_an_artifact_and_no_cleaner_one():
    direction = torch.arange(WIDTH) - 2.0
    judge = DirectionJudge.fit(gaussians(4000, 0), direction)
    assert 0.003 < float(judge.artifacts(gaussians(4000, 1)).double().mean()) < 0.02
    far = 100 * direction
    assert judge.artifacts(torch.stack([far, -far, torch.zeros(WIDTH)])).tolist() == [True, False, False]
    across = torch.zeros(1, WIDTH)
    across[0, 2] = 1e6  # where the direction is 0
    assert not judge.artifacts(across).any()


def test_a_saved_direction_judge_is_the_same(tmp_path):
    judge = DirectionJudge.fit(gaussians(50, 0), torch.ones(WIDTH))
    judge.save(tmp_path / "judge.safetensors")
    loaded = DirectionJudge.load(tmp_path / "judge.safetensors")
    assert torch.equal(loaded.direction, judge.direction) and loaded.threshold == judge.threshold


@pytest.mark.parametrize(
    ("features", "direction", "message"),
    [
        (torch.zeros(7, 3), torch.ones(3), r"finite \[n >= 8, F\]"),
        (torch.full((8, 3), torch.nan), torch.ones(3), r"finite \[n >= 8, F\]"),
        (torch.zeros(8, 3), torch.ones(4), r"direction: expected finite \[3\], got \[4\]"),
        (torch.zeros(8, 3), torch.full((3,), torch.inf), "direction: expected finite"),
    ],
    ids=["seven-pictures", "nan", "another-width", "infinite-direction"],
)
def test_a_direction_judge_that_cannot_be_fitted_is_refused(features, direction, message):
    with pytest.raises(ValueError, match=message):
        DirectionJudge.fit(features, direction)


def test_a_direction_judge_refuses_other_features_and_files(judge, tmp_path):
    fitted = DirectionJudge.fit(gaussians(50, 0), torch.ones(WIDTH))
    with pytest.raises(ValueError, match=r"expected \[n, 8\], got \[2, 9\]"):
        fitted.artifacts(torch.zeros(2, WIDTH + 1))
    judge.save(tmp_path / "judge.safetensors")
    with pytest.raises(ValueError, match="judge.safetensors: .*missing tensor direction"):
        DirectionJudge.load(tmp_path / "judge.safetensors")

"""Distances between sets of pictures, held against scipy, closed forms and double loops."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from transformers import AutoModel

from diffusion.errors import GazeError
from pipelines.judges.features import compare, distance_of, enough, feature_network, frechet, nearest_judge
from pipelines.judges.interval import GROUPS, of_distance
from tests.judges import small_judges

ALL = np.ones(GROUPS, dtype=bool)


def cloud(seed, n, width=5, scale=1.0, mean=0.0):
    random = np.random.default_rng(seed)
    return mean + scale * random.normal(size=(n, width)) @ np.random.default_rng(99).normal(size=(width, width))


def by_scipy(x, y):
    """As the formula stands."""
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    apart = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return apart + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T)) - 2 * np.trace(root).real


@pytest.mark.parametrize("seed", range(3))
def test_frechet_is_the_formula(seed):
    x, y = cloud(seed, 60), cloud(seed + 10, 45, scale=1.5, mean=0.3)
    assert frechet(x, y) == pytest.approx(by_scipy(x, y), rel=1e-9)


def test_frechet_of_known_gaussians():
    """Of covariances that commute it is the sum of squared differences of means and of standard deviations."""
    corners = np.array([[i, j] for i in (-1.0, 1.0) for j in (-1.0, 1.0)] * 5)
    deviation = np.sqrt(20 / 19)
    x, y = corners * [2, 3] + [1, 0], corners * [5, 1] + [0, 4]
    assert frechet(x, y) == pytest.approx(1 + 16 + deviation**2 * (9 + 4), rel=1e-12)
    assert frechet(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet(x, x + np.array([3, 4])) == pytest.approx(25, rel=1e-12)


def test_frechet_keeps_its_digits_where_features_hardly_vary():
    """A product of covariances loses half of the digits of its small eigenvalues, and its root may be complex."""
    x, y = cloud(0, 60), cloud(1, 60)
    small = np.array([1, 1, 1, 1e-7, 1e-7])
    assert frechet(x * small, x * small) < 1e-12
    assert frechet(x[:, :3] * 1e-6, y[:, :3] * 1e-6) == pytest.approx(1e-12 * frechet(x[:, :3], y[:, :3]), rel=1e-6)


def test_kernel_distance_is_the_double_loop():
    x, y = cloud(0, 41), cloud(1, 50, scale=1.2, mean=0.2)

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    def within(z):
        return np.mean([kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    between = np.mean([kernel(a, b) for a in x for b in y])
    assert distance_of("kid", x, y)(ALL) == pytest.approx(within(x) + within(y) - 2 * between, rel=1e-10)


def test_kernel_distance_is_unbiased():
    """Of two draws from one distribution the mean is 0, and some are below."""
    scores = [distance_of("kid", cloud(2 * i, 40), cloud(2 * i + 1, 40))(ALL) for i in range(40)]
    assert abs(np.mean(scores)) < 4 * np.std(scores) / np.sqrt(40)
    assert min(scores) < 0


@pytest.mark.parametrize("kind", ["fid", "kid"])
def test_what_is_left_out_is_left_out(kind):
    """The distance without some groups is that of the pictures of the others."""
    from pipelines.judges.interval import deal

    x, y = cloud(0, 80), cloud(1, 90, mean=0.5)
    kept = np.arange(GROUPS) % 2 == 0
    x_N, y_N = deal(80, 7), deal(90, 8)
    fewer = x[kept[x_N]], y[kept[y_N]]
    assert distance_of(kind, x, y, seed=7)(kept) == pytest.approx(distance_of(kind, *fewer)(ALL), rel=1e-9)


@pytest.mark.parametrize("kind", ["fid", "kid"])
def test_the_interval_is_as_wide_as_scores_vary(kind):
    scores, widths = [], []
    for i in range(30):
        found = of_distance(distance_of(kind, cloud(2 * i, 120), cloud(2 * i + 1, 100, scale=1.3, mean=0.5)))
        scores.append(found["score"])
        widths.append(found["high"] - found["low"])
    varied = 2 * 1.96 * np.std(scores, ddof=1)
    assert 0.6 < np.median(widths) / varied < 1.7


def test_the_interval_of_a_squared_distance_ends_at_nothing():
    found = compare("fid", cloud(0, 40), cloud(1, 40))
    assert (found["low"], found["n"]) == (0, 40)
    assert compare("kid", cloud(0, 40), cloud(1, 40))["low"] < 0 < found["score"] < found["high"]


def test_too_few_pictures_are_named():
    enough("fid", 19 + 1, 20, 18)  # 19 are left, of 18 features
    for kind, real, made, width, says in (
        ("fid", 19, 50, 3, "19 real pictures"),  # a picture for each of the 20 groups
        ("fid", 20, 19, 18, "19 made pictures are too few for a covariance of 18 features"),
        ("fid", 19, 2000, 18, "19 real pictures"),
        ("kid", 39, 50, 500, "39 real pictures are too few for the interval of kid"),
    ):
        with pytest.raises(GazeError, match=says) as error:
            enough(kind, real, made, width)
        assert "at least" in error.value.hint
    x = cloud(0, 20, width=18)
    assert np.linalg.matrix_rank(np.cov(x[: 20 - 1].T)) == 18, "as many as are left when one group is"
    with pytest.raises(GazeError, match="19 made"):
        distance_of("fid", x, x[:19])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 44 real pictures of noise in blocks, some larger than others."""
    folder, random = tmp_path_factory.mktemp("real"), np.random.default_rng(0)
    for number in range(44):
        levels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(levels).resize((32, 32 + number % 3)).save(folder / f"{number:02}.png")
    return folder


@pytest.mark.parametrize("make", [small_judges.dinov2, small_judges.resnet, small_judges.clip])
def test_features_are_the_pooled_output(make, tmp_path, pictures):
    folder = str(make(tmp_path))
    look, about = feature_network(folder)
    images = [Image.open(pictures / f"{number:02}.png") for number in (0, 3, 6)]
    model, processor = AutoModel.from_pretrained(folder).eval(), small_judges.images()
    with torch.no_grad():
        inputs = processor(images=images, return_tensors="pt")
        by_clip = hasattr(model, "get_image_features")
        found = (model.get_image_features if by_clip else model)(**inputs).pooler_output.flatten(1)
    features = look(images)
    assert features.dtype == np.float64
    assert features.shape == (3, small_judges.WIDTH)
    assert features == pytest.approx(found.numpy(), abs=1e-5)
    assert about["size"] == {"shortest_edge": small_judges.SIDE}
    assert (about["resample"], about["do_center_crop"]) == ("bicubic", True)
    assert about["network"] == type(model).__name__


def test_a_pooler_without_weights_is_refused(tmp_path):
    with pytest.raises(GazeError, match="pooler"):
        feature_network(str(small_judges.without_pooler(tmp_path)))


def test_the_nearest_real_picture():
    real, made = cloud(0, 30), []
    judge = nearest_judge(lambda images: np.stack(images), real, [f"{i}.png" for i in range(30)], made)
    verdicts = judge(["", ""], [real[7], real[3] + 0.01])
    assert [verdict.said["nearest"] for verdict in verdicts] == ["7.png", "3.png"]
    assert [verdict.score for verdict in verdicts] == pytest.approx([0, -0.01 * np.sqrt(5)])
    assert np.concatenate(made) == pytest.approx(np.stack([real[7], real[3] + 0.01]))


@pytest.mark.parametrize("kind", ["fid", "kid"])
def test_the_commands(kind, gaze, pictures, tmp_path):
    judge = small_judges.dinov2(tmp_path / "dinov2")
    made = tmp_path / "made"
    made.mkdir()
    for path in sorted(pictures.iterdir())[:41]:
        with Image.open(path) as image:
            image.rotate(90).save(made / path.name)
    options = ["evaluate", kind, "--judge", judge, "--real", pictures, "--pictures", made]
    code, out, err = gaze(*options, "--json", "--page", "worst.html")
    assert (code, err) == (0, "")
    report = json.loads(out)
    look, _ = feature_network(str(judge))
    x, y = (
        np.concatenate([look([Image.open(path)]) for path in sorted(folder.iterdir())]) for folder in (pictures, made)
    )
    expected = by_scipy(x, y) if kind == "fid" else distance_of("kid", x, y)(ALL)
    assert report["score"] == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert report["low"] < report["score"] < report["high"]
    assert report["n"] == 41
    assert (report["settings"]["features"], report["settings"]["real_pictures"]) == (small_judges.WIDTH, 44)
    assert (tmp_path / "worst.html").read_text().count("<figure>") == 40
    line = gaze(*options)[1].splitlines()[1].split()
    assert line == [kind, f"{report['score']:.4f}", f"{report['low']:.4f}", "to", f"{report['high']:.4f}", "41"]


@pytest.mark.parametrize("kind", ["fid", "kid"])
def test_too_few_pictures_are_an_error_before_any_is_drawn(kind, gaze, model, tmp_path):
    judge = small_judges.resnet(tmp_path / "resnet")
    (tmp_path / "real").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "real" / "1.png")
    (tmp_path / "prompts.txt").write_text("a cat\n" * 50)
    options = ["--judge", judge, "--real", "real", "--prompts", "prompts.txt", "--model", model]
    code, out, err = gaze("evaluate", kind, *options, "--steps", 10**6)
    assert (code, out) == (1, "")
    assert "1 real pictures are too few" in err
    assert "at least" in err

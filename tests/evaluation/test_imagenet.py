"""ImageNet's metrics against closed forms, scipy and brute force; its files; the whole of it with other features."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import linalg, stats

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.imagenet.dit_sampling import Mode
from rmoe_megatron.evaluation.imagenet.evaluate import (
    Settings,
    class_labels,
    evaluate_imagenet,
    write_npz,
)
from rmoe_megatron.evaluation.imagenet.features import Features, Inception
from rmoe_megatron.evaluation.imagenet.metrics import (
    Gaussian,
    RunningGaussian,
    frechet_distance,
    inception_score,
    precision_and_recall,
)
from rmoe_megatron.evaluation.imagenet.reference import open_reference
from rmoe_megatron.inference.generation import Sampling
from tests.hf.test_pipelines import recurrent_dit
from tests.support.sd3_pipeline import save_pipeline

RNG = np.random.default_rng(0)


def test_running_statistics_are_numpys_in_any_batches() -> None:
    features = RNG.standard_normal((500, 7)) * [1, 2, 3, 4, 5, 6, 7] + 1e6
    running = RunningGaussian(7)
    for batch in np.split(features, [1, 60, 61, 300]):
        running.add(batch)
    found = running.result()
    np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-8)


def test_frechet_distance_in_closed_form() -> None:
    # With diagonal covariances it is |m1 - m2|^2 + sum (s1 - s2)^2.
    one, other = (Gaussian(RNG.standard_normal(5), np.diag(RNG.uniform(0.1, 3, 5) ** 2)) for _ in range(2))
    deviations = (np.sqrt(np.diag(each.covariance)) for each in (one, other))
    expected = np.square(one.mean - other.mean).sum() + np.square(np.subtract(*deviations)).sum()
    assert frechet_distance(one, other) == pytest.approx(expected)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_that_of_scipys_matrix_root() -> None:
    factors = [RNG.standard_normal((12, 12)) for _ in range(2)]
    one, other = (Gaussian(RNG.standard_normal(12), factor @ factor.T) for factor in factors)
    root = linalg.sqrtm(one.covariance @ other.covariance).real
    difference = one.mean - other.mean
    expected = difference @ difference + np.trace(one.covariance + other.covariance - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    # Fewer images than dimensions: a covariance of rank 3, of which the product's root is not unique.
    few = [np.cov(RNG.standard_normal((4, 12)), rowvar=False) for _ in range(2)]
    found = frechet_distance(Gaussian(np.zeros(12), few[0]), Gaussian(np.zeros(12), few[1]))
    # tr (C1 C2)^(1/2) is the sum of the singular values of A^T B for C1 = A A^T, C2 = B B^T.
    halves = [vectors * np.sqrt(np.clip(values, 0, None)) for values, vectors in map(np.linalg.eigh, few)]
    singular = np.linalg.svd(halves[0].T @ halves[1], compute_uv=False).sum()
    assert found == pytest.approx(np.trace(few[0]) + np.trace(few[1]) - 2 * singular, rel=1e-6)


def test_inception_score() -> None:
    certain = np.eye(4)[np.arange(40) % 4]
    assert inception_score([certain[:15], certain[15:]], split=40) == pytest.approx(4)  # every class as often
    assert inception_score([np.full((8, 5), 0.2)]) == pytest.approx(1)
    random = RNG.dirichlet(np.ones(6), 30)
    parts = [
        np.exp(np.mean([stats.entropy(row, part.mean(axis=0)) for row in part]))
        for part in (random[:20], random[20:])
    ]
    assert inception_score([random], split=20) == pytest.approx(np.mean(parts))


def brute_force_share(points: NDArray[np.float64], manifold: NDArray[np.float64]) -> float:
    radii = [sorted(np.linalg.norm(manifold - each, axis=1))[3] for each in manifold]
    inside = [
        any(np.linalg.norm(point - each) <= radius for each, radius in zip(manifold, radii, strict=True))
        for point in points
    ]
    return float(np.mean(inside))


def test_precision_and_recall_by_brute_force() -> None:
    real, fake = RNG.standard_normal((60, 3)), RNG.standard_normal((50, 3)) * 0.5 + 1.5
    precision, recall = precision_and_recall(real, fake, torch.device("cpu"))
    assert precision == brute_force_share(fake, real)
    assert recall == brute_force_share(real, fake)
    assert 0 < recall < precision < 1
    assert precision_and_recall(real, real + 100, torch.device("cpu")) == (0, 0)


def half_distances(points: NDArray[np.floating], others: NDArray[np.floating]) -> NDArray[np.float32]:
    """Squared distances as ADM's evaluation takes them, every operation rounded to float16 but the sums over features."""
    points, others = points.astype(np.float16), others.astype(np.float16)
    found = np.empty((len(points), len(others)), dtype=np.float16)
    for row, point in enumerate(points):
        for column, other in enumerate(others):
            squares = [
                np.float16(
                    np.sum([np.float32(np.float16(value * value)) for value in each], dtype=np.float32)
                )
                for each in (point, other)
            ]
            product = np.float16(np.dot(point.astype(np.float32), other.astype(np.float32)))
            inner = np.float16(squares[0] - np.float16(np.float16(2) * product))
            found[row, column] = max(np.float16(inner + squares[1]), np.float16(0))
    return found.astype(np.float32)


def test_precision_and_recall_in_float16_by_brute_force() -> None:
    """Far from the origin float16 has few values, so that many neighbours are equally far."""
    real, fake = RNG.standard_normal((40, 3)) + 14, RNG.standard_normal((30, 3)) * 0.7 + 14.8
    expected = []
    for points, manifold in ((fake, real), (real, fake)):
        radii = np.sort(half_distances(manifold, manifold), axis=1)[:, 3]
        expected.append((half_distances(points, manifold) <= radii).any(axis=1).mean())
    cpu = torch.device("cpu")
    official = precision_and_recall(real, fake, cpu, half=True)
    assert official == pytest.approx(expected)
    assert official != precision_and_recall(real, fake, cpu)
    # Beyond 65504 there is no float16: then float32 is taken, as there.
    large = (1000 * real, 1000 * fake)
    assert precision_and_recall(*large, cpu, half=True) == precision_and_recall(*large, cpu)


def test_classes(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path, tmp_path, num_images=50, num_classes=10, balanced=True)
    assert (np.bincount(class_labels(settings, 0)) == 5).all()
    assert (
        class_labels(replace(settings, balanced=None, mode=Mode.pipeline), 0) == class_labels(settings, 0)
    ).all()
    drawn = class_labels(replace(settings, balanced=None), 0)
    assert set(drawn) <= set(range(10))
    assert len(set(np.bincount(drawn))) > 1


def test_the_archive_is_numpys(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    parts = [tmp_path / f"{number}.npy" for number in range(2)]
    for part, some in zip(parts, (images[:4], images[4:]), strict=True):
        np.save(part, some)
    write_npz(tmp_path / "samples.npz", parts, 7)
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"]
        assert (file["arr_0"] == images).all()


def test_references_of_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no file"):
        open_reference(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "grey.npz", arr_0=np.zeros((2, 4, 4), dtype=np.uint8))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{"a": 1}], dtype=object))
    for name in ("text", "grey", "objects"):
        with pytest.raises(UserError, match=f"{name}.npz"):
            open_reference(tmp_path / f"{name}.npz")


def colours(images: NDArray[np.uint8]) -> Features:
    """Features that a test can follow: mean colours, corners, and a distribution over three classes."""
    scaled = images.astype(np.float32) / 255
    means = scaled.mean(axis=(1, 2))
    return Features(means, scaled[:, 0, 0], means / means.sum(axis=1, keepdims=True))


def test_the_whole(tmp_path: Path) -> None:
    recurrent_dit(tmp_path / "model")
    images = RNG.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    settings = Settings(tmp_path / "out", tmp_path / "reference.npz", tmp_path / "none", 12, num_classes=3)
    sampling = Sampling(str(tmp_path / "model"), 2, 1.5, 0, 5)
    evaluate_imagenet(sampling, settings, lambda title: None, extract=colours)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["differences"][0] == "12 images: not FID-50K"
    with np.load(tmp_path / "out" / "samples.npz") as file:
        samples = file["arr_0"]
    assert samples.shape[0] == 12
    found, real = colours(samples), colours(images)
    for name, some in (("fid", "pool"), ("sfid", "spatial")):
        one, other = (getattr(each, some).astype(np.float64) for each in (found, real))
        gaussians = [Gaussian(each.mean(axis=0), np.cov(each, rowvar=False)) for each in (one, other)]
        assert results[name] == pytest.approx(frechet_distance(*gaussians), rel=1e-4)
    halves = precision_and_recall(real.pool, found.pool, torch.device("cpu"), half=True)
    assert (results["precision"], results["recall"]) == halves
    assert results["classes"] == "random"
    assert results["sampling"]["mode"] == "dit"
    assert results["sampling"]["sampler"]["variance_type"] == "learned_range"
    # Statistics of the file take the place of those of its images.
    np.savez(
        tmp_path / "reference.npz",
        arr_0=images,
        mu=np.zeros(3),
        sigma=np.eye(3),
        mu_s=np.zeros(3),
        sigma_s=np.eye(3),
    )
    with pytest.raises(UserError, match="another evaluation .judge reference_sha256"):
        evaluate_imagenet(sampling, settings, lambda title: None, extract=colours)
    evaluate_imagenet(sampling, replace(settings, again=True), lambda title: None, extract=colours)
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    pool = found.pool.astype(np.float64)
    expected = frechet_distance(
        Gaussian(pool.mean(axis=0), np.cov(pool, rowvar=False)), Gaussian(np.zeros(3), np.eye(3))
    )
    assert again["fid"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="--inception"):
        evaluate_imagenet(sampling, settings, lambda title: None)
    # The same images as files give the same scores.
    (tmp_path / "given").mkdir()
    for number, image in enumerate(samples):
        Image.fromarray(image).save(tmp_path / "given" / f"{number:03d}.png")
    given = replace(sampling, model=str(tmp_path / "given"))
    evaluate_imagenet(
        given, replace(settings, out=tmp_path / "from_files"), lambda title: None, extract=colours
    )
    assert json.loads((tmp_path / "from_files" / "results.json").read_text())["fid"] == again["fid"]
    # And so does the archive, which ADM's and DiT's scripts write.
    archive = replace(sampling, model=str(tmp_path / "out" / "samples.npz"))
    from_npz = replace(settings, out=tmp_path / "from_npz", num_images=None)
    evaluate_imagenet(archive, from_npz, lambda title: None, extract=colours)
    results = json.loads((tmp_path / "from_npz" / "results.json").read_text())
    assert (results["fid"], results["classes"], results["images"]) == (again["fid"], "given", 12)


def test_samples_are_never_left_out_in_silence(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    (tmp_path / "given").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "given" / f"{number}.png")  # 10.png comes after 2.png
    for name in ("samples.npz", "given"):
        sampling = Sampling(str(tmp_path / name), 1, 1.5, 0, 5)
        for asked, words in (
            (13, "12 images, fewer than --num-images 13"),
            (8, "12 images, more than --num-images 8"),
        ):
            settings = Settings(tmp_path / f"{name}{asked}", tmp_path / "reference.npz", tmp_path, asked)
            with pytest.raises(UserError, match=words):
                evaluate_imagenet(sampling, settings, lambda title: None, extract=colours)
            assert not settings.out.exists()
            evaluate_imagenet(
                sampling, replace(settings, allow_incomplete=True), lambda title: None, extract=colours
            )
            results = json.loads((settings.out / "results.json").read_text())
            assert (results["incomplete"], results["images"]) == (
                {"given": 12, "asked": asked},
                min(asked, 12),
            )
            with np.load(settings.out / "samples.npz") as file:
                assert (file["arr_0"] == images[:asked]).all()


def test_samples_that_are_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", arr_0=np.zeros((8, 8, 8, 3), dtype=np.uint8))
    np.savez(tmp_path / "floats.npz", arr_0=np.full((8, 8, 8, 3), np.nan))
    (tmp_path / "empty").mkdir()
    (tmp_path / "sizes").mkdir()
    for number in range(8):
        Image.new("RGB", (8 + number, 8)).save(tmp_path / "sizes" / f"{number}.png")
    save_pipeline(tmp_path / "captions")
    for name, words in (
        ("floats.npz", "holds no images uint8"), ("empty", "nor PNG files"), ("sizes", "samples are of one size"),
        ("captions", "draws captions, not classes"), ("nothing", "not a diffusers folder"),
    ):  # fmt: skip
        settings = Settings(tmp_path / f"out_{name}", tmp_path / "reference.npz", tmp_path, 8)
        with pytest.raises(UserError, match=words):
            evaluate_imagenet(
                Sampling(str(tmp_path / name), 1, 1.5, 0, 8), settings, lambda title: None, extract=colours
            )


def test_a_reference_is_read_in_parts(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "reference.npz", arr_0=images, arr_1=np.arange(9))
        reference = open_reference(tmp_path / "reference.npz")
        assert reference.shape == images.shape
        assert (reference.images(2, 6) == images[2:6]).all()
        assert (reference.images(6, 99) == images[6:]).all()


def test_features_are_torch_fidelitys(tmp_path: Path) -> None:
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="the eval extra is not installed"
    )
    extractor = module.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    original = extractor.load_state_dict
    # A network of random weights in the published form: made by the class itself, without its download.
    extractor.load_state_dict = lambda self, state: None  # type: ignore[method-assign]
    try:
        torch.save({}, weights)
        network = extractor("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    finally:
        extractor.load_state_dict = original  # type: ignore[method-assign]
    torch.save(network.state_dict(), weights)
    images = RNG.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    found = Inception(weights, torch.device("cpu"))(images)
    assert found.pool.shape == (2, 2048)
    assert found.spatial.shape == (2, 17 * 17 * 7)
    assert found.probabilities.sum(axis=1) == pytest.approx([1, 1], rel=1e-4)
    (pool,) = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    np.testing.assert_allclose(found.pool, pool.numpy(), rtol=1e-5)
    torch.save({"another": torch.zeros(3)}, weights)
    with pytest.raises(UserError, match="does not hold the weights"):
        Inception(weights, torch.device("cpu"))

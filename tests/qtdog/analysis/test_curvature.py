import csv
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from qtdog.analysis import curvature
from qtdog.analysis.probe import gaussian
from qtdog.cli import main
from qtdog.models import build_model


def read(file):
    with file.open() as lines:
        return list(csv.DictReader(lines))


def symmetric(size):
    drawn = torch.randn(size, size, dtype=torch.float64)
    return drawn + drawn.T


def quadratic(hessian):
    """Two parameters w, the loss w.Hw / 2 in two terms, and the product with its Hessian."""
    parameters = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)]
    parameters[1].requires_grad_()

    def terms():
        for share in (0.25, 0.75):
            w = torch.cat([p.flatten() for p in parameters])
            yield share * 0.5 * w @ hessian @ w

    return parameters, partial(curvature.hessian_product, terms, parameters)


def test_a_quadratic_has_a_known_hessian():
    hessian = symmetric(10)
    parameters, product = quadratic(hessian)
    vector = [torch.randn_like(p) for p in parameters]
    got = torch.cat([p.flatten() for p in product(vector)])
    torch.testing.assert_close(got, hessian @ torch.cat([v.flatten() for v in vector]))

    values, vectors = torch.linalg.eigh(hessian)
    top = values[values.abs().argmax()].item()
    value, residual, products = curvature.top_eigenvalue(product, vector, 5000, 1e-6)
    assert value == pytest.approx(top, rel=1e-9) and residual <= 1e-6 * abs(top) and 1 < products < 5000
    # An eigenvector is its own proof, and one product finds it.
    start = vectors[:, 3]
    start = [start[:6].view(2, 3), start[6:]]
    value, residual, products = curvature.top_eigenvalue(product, start, 5, 1e-6)
    assert value == pytest.approx(values[3].item()) and residual < 1e-12 and products == 1


def test_power_iteration_that_stops_early_bounds_its_error():
    hessian = symmetric(10)
    parameters, product = quadratic(hessian)
    value, residual, products = curvature.top_eigenvalue(product, [torch.ones_like(p) for p in parameters], 3, 1e-9)
    assert products == 3 and residual > 0
    assert (torch.linalg.eigvalsh(hessian) - value).abs().min() <= residual


def test_a_flat_loss_has_no_curvature():
    parameters, product = quadratic(torch.zeros(10, 10, dtype=torch.float64))
    assert curvature.top_eigenvalue(product, [torch.ones_like(p) for p in parameters], 5, 0.1)[:2] == (0, 0)


def test_hutchinson_is_exact_for_a_diagonal_and_unbiased_else():
    diagonal = torch.arange(10, dtype=torch.float64)
    parameters, product = quadratic(torch.diag(diagonal))
    assert curvature.trace_sample(product, parameters, 0, 0) == pytest.approx(diagonal.sum().item())
    hessian = symmetric(10)
    parameters, product = quadratic(hessian)
    samples = torch.tensor([curvature.trace_sample(product, parameters, 0, k) for k in range(400)])
    assert (samples.mean() - hessian.trace()).abs() < 4 * samples.std() / math.sqrt(400)


class Images(list):
    """Batches (images, labels) as `EvaluationImages` gives them."""

    @property
    def part(self):
        return type("Part", (), {"indices": range(sum(len(labels) for _, labels in self))})


@pytest.mark.slow
def test_the_full_hessian_of_a_tiny_net():
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randn(40, 1, 3, 3), torch.randint(3, (40,))
    names, parameters = zip(*net.named_parameters(), strict=True)
    sizes = [p.numel() for p in parameters]

    def loss(flat):
        pieces = {n: f.view_as(p) for n, f, p in zip(names, flat.split(sizes), parameters, strict=True)}
        return F.cross_entropy(functional_call(net, pieces, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in parameters])
    full = torch.autograd.functional.hessian(loss, flat)
    images = [Images([(x[:35], y[:35])]), Images([(x[35:], y[35:])])]  # the first is differentiated in two parts
    terms = partial(curvature.loss_terms, net, images, torch.device("cpu"))
    product = partial(curvature.hessian_product, terms, parameters)

    vector = gaussian(parameters, 0, 0)
    got = torch.cat([p.flatten() for p in product(vector)])
    torch.testing.assert_close(got, full @ torch.cat([v.flatten() for v in vector]), rtol=1e-3, atol=1e-4)
    signs = torch.cat([s.flatten() for s in curvature.rademacher(parameters, 0, 0)])
    assert set(signs.tolist()) == {-1, 1}
    sample = curvature.trace_sample(product, parameters, 0, 0)
    assert sample == pytest.approx((signs @ full @ signs).item(), rel=1e-3, abs=1e-4)
    values = torch.linalg.eigvalsh(full)
    value, _, _ = curvature.top_eigenvalue(product, vector, 200, 0.01)
    assert value == pytest.approx(values[values.abs().argmax()].item(), rel=0.01)


def test_attention_can_be_differentiated_twice():
    model = build_model("test_vit", 3, 3, image_size=32)
    images = [Images([(torch.randn(2, 3, 32, 32), torch.tensor([0, 2]))])]
    parameters = list(model.eval().parameters())
    terms = partial(curvature.loss_terms, model, images, torch.device("cpu"))
    with curvature.plain_attention():
        product = curvature.hessian_product(terms, parameters, gaussian(parameters, 0, 0))
    assert all(p.isfinite().all() for p in product) and any(p.abs().max() > 0 for p in product)


@pytest.mark.slow
def test_command_compares_runs(trained, tmp_path, capsys):
    table = tmp_path / "plots" / "c.csv"
    runs = [str(trained / "RotatedMNIST" / "erm"), str(trained / "RotatedMNIST" / "qtdog" / "0" / "trial0_seed1")]
    arguments = ["curvature", *runs, "--vectors", "2", "--iterations", "1", "--max-images", "1", "--device", "cpu"]
    assert main([*arguments, "--output", str(table)]) == 0
    out, rows = capsys.readouterr().out, read(table)
    assert [row["method"] for row in rows] == ["ERM trial 0 seed 0"] * 2 + ["QT-DoG 7 bit trial 0 seed 1"] * 2
    assert [row["side"] for row in rows] == ["source", "target"] * 2
    for row in rows:
        assert f"{float(row['trace']):.4g} +/- {float(row['trace_stderr']):.2g}" in out
        assert f"{float(row['top_eigenvalue']):.4g} (within " in out and row["products"] == "1"
        assert float(row["loss"]) > 0 and float(row["weight_norm"]) > 0


@pytest.mark.slow
def test_interrupted_and_continued_gives_the_same_numbers(trained, tmp_path, monkeypatch):
    arguments = ["curvature", str(trained / "RotatedMNIST" / "erm"), "--vectors", "2", "--iterations", "1",
                 "--max-images", "1", "--device", "cpu", "--output"]  # fmt: skip
    assert main([*arguments, str(tmp_path / "whole.csv")]) == 0
    calls = []
    product = curvature.hessian_product

    def stops_at_the_fifth(*given):
        calls.append(None)
        if len(calls) == 5:  # the target's second random vector
            raise KeyboardInterrupt
        return product(*given)

    monkeypatch.setattr(curvature, "hessian_product", stops_at_the_fifth)
    assert main([*arguments, str(tmp_path / "c.csv")]) == 130
    assert main([*arguments, str(tmp_path / "c.csv")]) == 0
    assert len(calls) == 2 * (2 + 1) + 1
    assert (tmp_path / "c.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / "c.partial.csv").exists()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--vectors", "1"], "--vectors must be at least 2"),
        (["--iterations", "0"], "--iterations must be at least 1"),
        (["--output", "c.png"], "must end in .csv"),
    ],
)
def test_mistakes_are_named(trained, capsys, wrong, told):
    assert main(["curvature", str(trained), *wrong]) == 2
    assert told in capsys.readouterr().err

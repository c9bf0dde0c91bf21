"""What the commands that measure have in common: plain weights, moving them, resuming."""

import pytest
import torch
from torch import nn

import qkernels as qk
from qtdog.analysis import probe
from qtdog.analysis.flatness import FlatnessConfig
from qtdog.analysis.resumable import Partial
from qtdog.errors import UserError
from qtdog.log import Log


def quantized_net():
    """Weights and inputs at 4 bits, with input scales from one training batch."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 4, 3))
    qk.quantize_(net, qk.QConfig(weight_bits=4, act_bits=4, last_layer="same"))
    net.train()(torch.randn(8, 1, 4, 4))
    return net.eval()


def test_plain_weights_give_the_quantized_model_exactly():
    net, images = quantized_net(), 3 * torch.randn(8, 1, 4, 4)
    expected = net(images).detach()
    weights = {name: layer.quantized_weight().detach() for name, layer in net.named_children() if name in "03"}
    plain = probe.plain_(net)
    assert torch.equal(plain(images), expected)
    assert all(torch.equal(plain.get_submodule(name).weight, weight) for name, weight in weights.items())
    assert not any(name.endswith("scale") for name, _ in plain.named_parameters())


def test_rounded_inputs_have_the_straight_through_gradient_and_second_derivatives():
    net, images = quantized_net(), 3 * torch.randn(8, 1, 4, 4)
    net(images).logsumexp(-1).sum().backward()
    expected = net[0].bias.grad.clone()  # the weights' own gradients also pass the weight quantizer
    plain = probe.plain_(net)
    (slope,) = torch.autograd.grad(plain(images).logsumexp(-1).sum(), [plain[0].bias], create_graph=True)
    torch.testing.assert_close(slope, expected)
    (second,) = torch.autograd.grad(slope.sum(), [plain[0].bias])
    assert second.abs().max() > 0


def test_weights_move_and_come_back_exactly():
    parameters = [torch.randn(3, requires_grad=True), torch.randn(2, 2)]
    start = [p.detach().clone() for p in parameters]
    one, two = ([torch.ones_like(p) for p in parameters], [p.detach().clone() for p in parameters])
    with probe.movable(parameters) as move:
        move((2.0, one), (-1.0, two))
        assert all(p.detach() == pytest.approx(2.0) for p in parameters)
        move((0.1, one))
        torch.testing.assert_close(parameters[0].detach(), start[0] + 0.1)
    assert all(torch.equal(p.detach(), s) for p, s in zip(parameters, start, strict=True))


def test_partial_results_survive_a_kill(tmp_path):
    table = tmp_path / "plots" / "x.csv"
    recall = Partial(table).of("a run, with a comma")
    assert recall("one", lambda: [0.1, 1e-300]) == [0.1, 1e-300] and recall("two", lambda: [2]) == [2]
    assert recall("one", lambda: pytest.fail("measured twice")) == [0.1, 1e-300]
    file = tmp_path / "plots" / "x.partial.csv"
    file.write_text(file.read_text() + '"a run, with a comma",three,0.12')  # cut while it was written

    again = Partial(table)
    assert again.of("a run, with a comma")("one", lambda: pytest.fail("forgotten")) == [0.1, 1e-300]
    assert again.of("another run")("one", lambda: [7.0]) == [7.0]
    assert again.of("a run, with a comma")("three", lambda: [0.123]) == [0.123]
    assert len(file.read_text().splitlines()) == 4
    again.forget()
    assert not file.exists() and Partial(table).known == {}


def test_a_damaged_line_is_measured_again(tmp_path):
    """And the others are not: a digit that another one has taken the place of would go unnoticed."""
    for place in range(30):
        table = tmp_path / f"{place}.csv"
        recall = Partial(table).of("run")
        for what in ("one", "two", "three"):
            recall(what, lambda: [0.125, 3.5])
        file = table.with_suffix(".partial.csv")
        first, second, third = file.read_bytes().splitlines(keepends=True)
        damaged = bytearray(second)
        damaged[place % (len(second) - 1)] ^= 1
        file.write_bytes(first + damaged + third)
        again = Partial(table)
        assert again.known == {("run", "one"): [0.125, 3.5], ("run", "three"): [0.125, 3.5]}
        assert file.read_bytes() == first + third
        assert again.of("run")("two", lambda: [0.25]) == [0.25]


def test_a_file_of_something_else_is_not_taken(tmp_path):
    (tmp_path / "x.partial.csv").write_text("name,kind,amount\nscrew,metal,many\n")
    with pytest.raises(UserError, match=r"x\.partial\.csv holds no measurements"):
        Partial(tmp_path / "x.csv")


@pytest.mark.slow
def test_both_sides_of_a_run_and_what_they_are_called(trained):
    runs = [str(trained / "RotatedMNIST" / name) for name in ("erm", "qtdog")]
    found = list(probe.probes(FlatnessConfig(runs, max_images=2, device="cpu"), Log()))
    names = ["ERM trial 0 seed 0", "QT-DoG 7 bit trial 0 seed 0", "QT-DoG 7 bit trial 0 seed 1"]
    assert [each.label for each in found] == names
    assert len({each.key for each in found}) == 3
    sides = found[0].sides
    assert [len(images.part.indices) for images in sides["source"]] == [2] * 5
    assert [images.part.env for images in sides["source"]] == [1, 2, 3, 4, 5]
    assert [images.part.env for images in sides["target"]] == [0]

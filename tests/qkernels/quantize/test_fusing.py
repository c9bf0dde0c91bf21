"""`fuse_weights_` where a forward is not simply followed by its backward."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels.quantize.layers import quantized_layers

W4A4 = qk.QConfig(weight_bits=4, act_bits=4, last_layer="same")


class Net(nn.Module):
    """Three blocks, each under activation checkpointing if asked; a layer that is called only if asked."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3))
        self.extra, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.reentrant, self.calls_extra = reentrant, True

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.extra(x) if self.calls_extra else x)


def grads(model):
    return {n: p.grad for n, p in model.named_parameters()}


def made(config, fused, **arguments):
    model = Net(**arguments)
    qk.quantize_(model, config)
    if fused:
        qk.fuse_weights_(model)
    model(batch(9))
    return model


def batch(seed):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()


CONFIGS = {"weights": qk.QConfig(weight_bits=3, last_layer="same"), "inputs too": W4A4}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("forwards", [1, 2])
def test_activation_checkpointing(config, fused, reentrant, forwards):
    """Of both kinds, also where a second forward comes before the backward."""
    expected, model = made(CONFIGS[config], False), made(CONFIGS[config], fused, reentrant=reentrant)
    for net in (expected, model):
        sum(net(batch(seed)).square().mean() for seed in range(forwards)).backward()
    for name, grad in grads(expected).items():
        torch.testing.assert_close(grads(model)[name], grad, msg=name)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_layer_that_is_not_called_has_no_gradient(config, fused):
    model = made(CONFIGS[config], fused)
    model.calls_extra = False
    model.zero_grad()
    optimizer = torch.optim.AdamW(qk.param_groups(model, lr=0.1, weight_decay=0.5))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(batch(0)).square().mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert (p.grad is None) == torch.equal(p, before[name]) == name.startswith("extra"), name


@pytest.mark.parametrize("fused", [False, True])
def test_modules_that_are_interleaved(fused):
    """A forward that is a generator, and one within another."""

    class Slow(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            for block in self.net.blocks:
                x = block(x)
                yield x

    expected = made(CONFIGS["weights"], False)
    nets = [made(CONFIGS["weights"], False) for _ in range(2)]
    slow = [qk.fuse_weights_(Slow(net)) if fused else Slow(net) for net in nets]
    runs = [module(batch(i)) for i, module in enumerate(slow)]
    results = list(zip(*runs, strict=True))
    for i in range(2):
        torch.testing.assert_close(results[-1][i], list(Slow(expected)(batch(i)))[-1])
    results[-1][0].sum().backward()
    results[-1][1].sum().backward()
    list(Slow(expected)(batch(0)))[-1].sum().backward()
    torch.testing.assert_close(grads(nets[0])["blocks.0.0.weight"], grads(expected)["blocks.0.0.weight"])


def test_nothing_is_left_behind():
    model = made(W4A4, True, reentrant=False)
    model(batch(0)).sum().backward()
    assert all(layer.fused_weight is None and layer.fused_act_scale is None for _, layer in quantized_layers(model))


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_one_compiled_graph_serves_many_sizes(fused):
    """The gradient factor of inputs counts features; no graph may hold their number."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    qk.quantize_(model, W4A4)
    if fused:
        qk.fuse_weights_(model)
    model(torch.randn(2, 3, 16, 16))
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=counting, dynamic=True)
    for size in (9, 10, 12, 14, 15, 17, 20, 21, 25, 30):
        x = torch.randn(2, 3, size, size + 1)
        for net in (compiled, model):
            model.zero_grad()
            net(x).square().mean().backward()
            if net is compiled:
                found = {n: p.grad.clone() for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            torch.testing.assert_close(found[n], p.grad, msg=n)
    assert len(graphs) == 1
    h, w = torch.export.Dim("h", min=6, max=64), torch.export.Dim("w", min=6, max=64)
    exported = torch.export.export(model.eval(), (torch.randn(2, 3, 9, 10),), dynamic_shapes=({2: h, 3: w},)).module()
    for size in (9, 17, 40):
        x = torch.randn(2, 3, size, size + 2)
        torch.testing.assert_close(exported(x), model(x))

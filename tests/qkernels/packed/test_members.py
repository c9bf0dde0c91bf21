"""What a model does to its batch, each member does to its own: nothing mixes members, nor confuses dimensions."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from qkernels.packed import functions


def members(make, count=3, **config):
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = make()
        for p in model.parameters():
            if p.dim() < 2:
                nn.init.normal_(p)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
        qk.quantize_(model, qk.QConfig(first_layer="same", last_layer="same", **config))
        models.append(model.eval())
    return models


def packed_like(models, tmp_path, *images, in_turn=None, example=None):
    """The ensemble answers as the members do, before and after it was saved."""
    ensemble = qk.PackedEnsemble.from_models(models, example)
    assert (ensemble.report.in_turn is None) == (in_turn is None), ensemble.report
    if in_turn is not None:
        assert in_turn in ensemble.report.in_turn
    loaded = qk.PackedEnsemble.load(ensemble.save(tmp_path / "packed"), copy.deepcopy(models[0]))
    for x in images:
        with torch.no_grad():
            expected = torch.stack([model(x) for model in models])
        got = ensemble.member_logits(x)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert torch.equal(loaded.member_logits(x), got)
    return ensemble


class Images(nn.Module):
    """Images through a convolution, `body`, and a head."""

    def __init__(self, body):
        super().__init__()
        self.conv, self.body, self.head = nn.Conv2d(3, 6, 3, padding=1), body, nn.Linear(6, 4)
        self.other = nn.Conv2d(6, 6, 1)
        self.scale, self.row = nn.Parameter(torch.ones(6)), nn.Parameter(torch.randn(1, 6, 1, 1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.head(self.body(self, self.conv(x)).mean((2, 3)))


def of_the_batch(function):
    return lambda self, x: function(x)


BODIES = {
    "less the mean of all": of_the_batch(lambda x: x - x.mean()),
    "less the mean of the batch": of_the_batch(lambda x: x - x.mean(0)),
    "softmax of the batch": of_the_batch(lambda x: x.softmax(0)),
    "softmax of the batch, a function": of_the_batch(lambda x: F.softmax(x, 0)),
    "the first image": of_the_batch(lambda x: x[:1]),
    "without the first image": of_the_batch(lambda x: x[1:]),
    "the last image alone": of_the_batch(lambda x: x[-1].unsqueeze(0)),
    "one after the other": of_the_batch(lambda x: torch.cat([x, x.flip(0)])),
    "views one after the other": of_the_batch(lambda x: torch.cat([x[:, :, ::2], x[:, :, 1::2]], 0)),
    "stacked": of_the_batch(lambda x: torch.stack([x, -x]).flatten(0, 1)),
    "divided by the largest": of_the_batch(lambda x: x / x.amax()),
    "the sum over images": of_the_batch(lambda x: x + x.sum(0, keepdim=True)),
    "cut into images": of_the_batch(lambda x: sum(x.unbind(0))[None]),
    "halves of the batch": of_the_batch(lambda x: torch.cat(x.repeat(2, 1, 1, 1).chunk(2)[::-1])),
    "batch last and back": of_the_batch(lambda x: x.permute(1, 2, 3, 0).softmax(-1).permute(3, 0, 1, 2)),
    "transposed batch": of_the_batch(lambda x: (x.transpose(0, 1) - x.transpose(0, 1).mean(0)).transpose(0, 1)),
    "gram of the batch": of_the_batch(lambda x: (x.flatten(1) @ x.flatten(1).T).softmax(-1)[:, :1, None, None] * x),
    "rolled": of_the_batch(lambda x: x.roll(1, 0)),
    "flat and rolled": of_the_batch(lambda x: x + x.roll(1)),
    "cumulated": of_the_batch(lambda x: x.cumsum(0)),
    "normalized along images": of_the_batch(lambda x: F.normalize(x, dim=0)),
    "deviation of all": of_the_batch(lambda x: x / x.std()),
    "padded batch": of_the_batch(lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))),
    "squeezed": of_the_batch(lambda x: x + x.mean((1, 2, 3), keepdim=True).squeeze()[:, None, None, None]),
    "as many as images": of_the_batch(lambda x: x * x.shape[0]),
    "size of all": of_the_batch(lambda x: x.reshape(-1).reshape(x.size(0), -1).view(x.shape) / x.numel()),
    "in groups": of_the_batch(lambda x: x.view(x.shape[0], 2, 3, *x.shape[2:]).transpose(1, 2).reshape(x.shape)),
    "einsum": of_the_batch(lambda x: torch.einsum("nchw,mchw->nm", x, x)[:, :1, None, None] + x),
    "unbatched": of_the_batch(lambda x: torch.stack([image.softmax(0) for image in x.unbind()])),
    "a parameter without a batch": lambda self, x: x * self.scale[:, None, None],
    "a parameter of one image": lambda self, x: x + self.row,
    "a parameter put together": lambda self, x: torch.cat([x, self.row.expand(x.shape[0], -1, x.shape[2], -1)], 3),
    "a scalar of each member": lambda self, x: x * self.scale.sum(),
    "a parameter of the weight's": lambda self, x: F.conv2d(x, self.row.expand(6, -1, 3, 3), padding=1) + x,
    "dropout": lambda self, x: F.dropout(self.dropout(x), 0.5, self.training),
    "in place": lambda self, x: operator.iadd(x, 1) + x,
    "relu in place, seen elsewhere": lambda self, x: x.relu_() + x,
    "in place through dropout": lambda self, x: x + self.other(F.relu(self.dropout(x), inplace=True)),
    "in place through a view": lambda self, x: self.other(x.flatten(2).relu_().view(x.shape)),
    "layers of one image": lambda self, x: torch.stack([self.other(image) for image in x.unbind()]),
    "no batch statistics": of_the_batch(lambda x: F.instance_norm(x)),
    "batch statistics": of_the_batch(lambda x: F.batch_norm(x, None, None, training=True)),
    "upsampled": of_the_batch(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "pooled": of_the_batch(
        lambda x: (
            F.max_pool2d(F.avg_pool2d(x, 3, 1, 1), 2) + F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, (1, 1))
        )
    ),
    "pooled in one dimension": of_the_batch(
        lambda x: (
            F.avg_pool1d(F.max_pool1d(x.flatten(2), 3, 1, 1), 3, 1, 1).view_as(x)
            + F.adaptive_avg_pool1d(x.flatten(2), 1)[..., None]
            + F.adaptive_max_pool1d(x.flatten(2), 1)[..., None]
        )
    ),
    "pooled in three dimensions": of_the_batch(
        lambda x: (
            F.avg_pool3d(F.max_pool3d(x[:, :, None], (1, 3, 3), 1, (0, 1, 1)), (1, 3, 3), 1, (0, 1, 1))
            + F.adaptive_avg_pool3d(x[:, :, None], 1)
            + F.adaptive_max_pool3d(x[:, :, None], (1, 1, 1))
        )[:, :, 0]
    ),
    "windows": of_the_batch(lambda x: F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(-2, 3, 1).mean((-1, -2))),
    "windows, a function": of_the_batch(
        lambda x: F.unfold(x, 3, padding=1).view(*x.shape[:2], 9, -1).amax(2).view_as(x)
    ),
    "chosen by a list": of_the_batch(lambda x: x[:, [5, 0, 1, 1, 2, 3]] + x[[0]] + x[..., [1]]),
    "chosen by a table": of_the_batch(lambda x: x.index_select(-3, torch.tensor([5, 0, 1, 1, 2, 3]))),
    "where, a method": of_the_batch(lambda x: x.where(x > 0, -1.0) + x.where(other=x * 2, condition=x > 1)),
    "variance by position": of_the_batch(lambda x: x.var(1, False, True) + x.std((0, -1), True)[:, :1, None]),
    "normalized another way": of_the_batch(
        lambda x: (
            torch.layer_norm(x.movedim(1, -1), (6,)).movedim(-1, 1)
            + torch.group_norm(x, 3)
            + x.prelu(x.new_full((1,), 0.1))
        )
    ),
    "filled": of_the_batch(
        lambda x: (
            torch.cat([x, x.new_ones(x.shape[0], 1, *x.shape[2:]), x.new_full((x.shape[0], 1, *x.shape[2:]), 0.5)], 1)[
                :, 2:
            ]
            + torch.zeros_like(x)
            + torch.ones_like(x)
            + torch.full_like(x, 0.5)
        )
    ),
    "largest and smallest": of_the_batch(
        lambda x: x.max() + x.max(1, keepdim=True)[0] + torch.min(x, dim=-1)[0][..., None] + torch.max(x, x.mean())
    ),
    "positions of the largest": of_the_batch(lambda x: x + x.max(2, True).indices * 0.01),
    "classes": of_the_batch(lambda x: x + F.one_hot((x > 0).long(), 3)[..., 1]),
    "made of sizes": of_the_batch(
        lambda x: (
            x
            + torch.zeros(x.shape[0], 1, 1, 1, device=x.device)
            + torch.ones((x.shape[0], 1, 1, x.shape[3]))
            + torch.full((x.shape[2], 1), 0.5)
            + torch.arange(0, 2 * x.shape[3], 2, device=x.device)
        )
    ),
    "norms": of_the_batch(
        lambda x: x.norm(dim=1, keepdim=True) + torch.norm(x, p=1, dim=(0, 2), keepdim=True) + F.normalize(x)
    ),
    "masked": of_the_batch(lambda x: x.masked_fill(x < 0, -1.0) + torch.where(x > 1, x, 0.0)),
}


AS_MANY_STEPS_AS_IMAGES = ("cut into images", "unbatched", "layers of one image")


@pytest.mark.parametrize("body", BODIES)
def test_each_member_has_its_own_batch(body, tmp_path):
    models = members(lambda: Images(BODIES[body]))
    reason = "depends on the number of images" if body in AS_MANY_STEPS_AS_IMAGES else None
    packed_like(models, tmp_path, torch.randn(2, 3, 16, 16), torch.randn(5, 3, 12, 10), in_turn=reason)


class Sequence(nn.Module):
    def __init__(self, *layers, forward=None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.own = forward

    def forward(self, x):
        if self.own is not None:
            return self.own(self, x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_batch_norm_acts_on_the_second_dimension(tmp_path):
    """Also where that has as many elements as the last, to which a linear layer before it gives its features."""
    models = members(lambda: Sequence(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))
    packed_like(models, tmp_path, torch.randn(3, 4, 5), example=torch.randn(2, 4, 5))
    packed_like(models, tmp_path, torch.randn(3, 5), example=torch.randn(2, 5))
    report = qk.PackedEnsemble.from_models(models, torch.randn(2, 5)).report
    assert report.batch_norms == ["layers.1"]


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(6), lambda: nn.LayerNorm([3, 6]), nn.Identity])
def test_sequences_first(norm, tmp_path):
    """[L, N, C]: the first dimension is not the images'."""
    models = members(
        lambda: Sequence(
            nn.Linear(6, 6),
            norm(),
            nn.Linear(6, 6),
            forward=lambda self, x: self.layers[2](
                self.layers[1](self.layers[0](x.transpose(0, 1)).transpose(0, 1)).transpose(0, 1)
            ).mean(0),
        )
    )
    packed_like(models, tmp_path, torch.randn(4, 3, 6), example=torch.randn(2, 3, 6))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_parameter_of_one_row_meets_what_it_meets(length, tmp_path):
    """[1, C] and [L, C] meet the last two dimensions, wherever the images are."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
            self.p = nn.Parameter(torch.randn(length, 4))

        def forward(self, x):
            x = self.first(x).transpose(0, 1)  # [3, N, 4]
            return self.last(torch.cat([x + self.p[:1], x * self.p.sum(0)])).mean(0)

    packed_like(members(Net), tmp_path, torch.randn(2, 3, 4), torch.randn(5, 3, 4), example=torch.randn(2, 3, 4))


def test_hooks_run_and_are_not_dropped(tmp_path):
    def make():
        model = Images(lambda self, x: x)
        model.other.register_forward_hook(lambda module, args, out: out * 2)
        model.conv.register_forward_hook(lambda module, args, out: out * 2)
        model.head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        return model

    models = members(make)
    ensemble = qk.PackedEnsemble.from_models(models)
    x = torch.randn(2, 3, 8, 8)
    assert "conv has a forward hook" in ensemble.report.in_turn
    with torch.no_grad():
        torch.testing.assert_close(ensemble.member_logits(x), torch.stack([model(x) for model in models]))


def test_hooks_of_our_own_are_no_hindrance(tmp_path):
    models = members(lambda: qk.fuse_weights_(Images(lambda self, x: x)))
    packed_like(models, tmp_path, torch.randn(2, 3, 8, 8))


class WithBuffers(nn.Module):
    """Constants of several kinds, of which none is the model's afterwards."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.register_buffer("table", torch.randn(6))
        self.register_buffer("index", torch.arange(6).flip(0), persistent=False)
        self.plain = torch.randn(6)
        self.seen = None

    def forward(self, x):
        self.seen = x.shape
        x = self.conv(x) * (self.table[self.index] + self.plain)[:, None, None]
        x = x + torch.arange(x.shape[-1]) / 10
        return self.head(x.mean((2, 3)) + torch.linspace(0, 1, 6))


def test_models_are_left_as_they_were(tmp_path):
    models = members(WithBuffers)
    before = [
        ({k: v.clone() for k, v in m.state_dict().items()}, {n: dict(vars(s)) for n, s in m.named_modules()})
        for m in models
    ]
    qk.PackedEnsemble.from_models(models)
    for model, (state, variables) in zip(models, before, strict=True):
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        for name, module in model.named_modules():
            assert vars(module).keys() == variables[name].keys()
            assert all(value is variables[name][key] for key, value in vars(module).items() if key != "_backward_hooks")
    packed_like(models, tmp_path, torch.randn(2, 3, 8, 8), torch.randn(2, 3, 9, 12))


def test_what_asks_for_sizes_is_for_images_of_one_size(tmp_path):
    models = members(lambda: Images(lambda self, x: F.pad(x, (0, 1)) if x.shape[-1] % 5 else x))
    ensemble = packed_like(models, tmp_path, torch.randn(3, 3, 13, 13), example=torch.randn(2, 3, 13, 13))
    with pytest.raises(ValueError, match=r"takes images of shape \[3, 13, 13\], not \[3, 15, 15\]"):
        ensemble(torch.randn(1, 3, 15, 15))


def test_a_head_on_flattened_features_takes_what_strides_leave_alike(tmp_path):
    """Images of 25 to 32 pixels become 4 by 4 features: those of 28 are not refused for being tried with 32."""

    def make():
        strided = [nn.Conv2d(width, 8, 3, 2, 1) for width in (1, 8, 8)]
        return nn.Sequential(*strided, nn.Flatten(), nn.Linear(128, 4))

    sizes = [torch.randn(2, 1, size, size) for size in (25, 28, 32)]
    assert packed_like(members(make), tmp_path, *sizes).program.image is None


def test_what_answers_otherwise_runs_in_turn(tmp_path):
    """Computed behind PyTorch's back: the graph knows nothing of it, but the answers tell."""

    def hidden(x):
        with torch._C.DisableTorchFunction():
            return x.mean((0, 2, 3), keepdim=True) * 3

    models = members(lambda: Images(lambda self, x: x + hidden(x)))
    packed_like(models, tmp_path, torch.randn(2, 3, 8, 8), in_turn="depends on the number of images")


def test_one_graph_that_answers_otherwise_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(
        functions.FUNCTIONS["softmax"], "form", lambda call, operands, bound: operands.value(bound["input"])
    )
    models = members(lambda: Images(lambda self, x: F.softmax(x, 1)))
    packed_like(models, tmp_path, torch.randn(2, 3, 8, 8), in_turn="side by side the answers differ by")


def test_images_rearranged_before_the_first_layer(tmp_path):
    """As TResNet's."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(12, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            n, c, h, w = x.shape
            x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).contiguous().view(n, c * 4, h // 2, w // 2)
            return self.head(self.conv(x).mean((2, 3)))

    packed_like(members(Net), tmp_path, torch.randn(3, 3, 16, 12), example=torch.randn(2, 3, 16, 16))


def test_a_table_that_one_member_has_made_already_and_the_others_have_not(tmp_path):
    """As ConViT's relative positions."""

    def body(self, x):
        if not hasattr(self, "table"):
            self.table = torch.arange(x.shape[-1]).float()[None].expand(2, -1).log1p()
        return x + self.table[0]

    models, x = members(lambda: Images(body)), torch.randn(2, 3, 8, 8)
    models[0](x)
    packed_like(models, tmp_path, x, example=x)


@pytest.mark.parametrize("factor", [1.0, 1.05])
def test_one_graph_of_rounded_inputs_is_compared_without_rounding(factor, monkeypatch):
    """With it, a step that is 5 % off could not be told from activations that come to lie in the next of few codes."""
    models, x = (
        members(lambda: Images(lambda self, x: F.softmax(self.other(x), 1)), act_bits=4),
        torch.randn(8, 3, 8, 8),
    )
    for model in models:
        model.train()(x)
        model.eval()
    right = functions.FUNCTIONS["softmax"].form
    monkeypatch.setattr(functions.FUNCTIONS["softmax"], "form", lambda *given: right(*given) * factor)
    report = qk.PackedEnsemble.from_models(models).report
    assert (report.in_turn is None) == (factor == 1), report


FORMED = {
    "add": lambda a, b: a + b,
    "a smaller one": lambda a, b: a * b[0],
    "a larger one": lambda a, b: a[0, 0] - b,
    "softmax": lambda a, b: a.softmax(1) + a.softmax(-2) + F.softmax(a, 0),
    "mean": lambda a, b: a.mean() + a.mean(0) + a.mean((0, -1), keepdim=True),
    "extremes": lambda a, b: a.amax() - a.amin(1, keepdim=True),
    "variance": lambda a, b: a.var(1, keepdim=True, unbiased=False) + a.std(),
    "flatten": lambda a, b: a.flatten().sum() + a.flatten(1) + a.flatten(0, 1).mean(),
    "reshape": lambda a, b: a.reshape(-1, 2, 2) + a.view(a.shape[0] * 3, 2, 2),
    "expand": lambda a, b: a[:, :1].expand(2, -1, 5, -1) + b[:1].expand(3, 2, 1, 3, 4).sum((0, 1))[:, :1],
    "squeeze": lambda a, b: a[:1].squeeze() + a[:, :1].squeeze(1)[0] + a[:1].squeeze(0),
    "unsqueeze": lambda a, b: a.unsqueeze(0) + a.unsqueeze(-1).sum(-1) + a.unsqueeze(2)[:, :, 0],
    "permute": lambda a, b: a.permute(2, 0, 1) + a.permute((-1, 0, 1)),
    "transpose": lambda a, b: a.transpose(0, -1) + a.transpose(0, 2) + a.mT.sum(),
    "parts": lambda a, b: a.chunk(2, 1)[1] + a.split([2, 1], 1)[0] + a.unbind(-1)[2].sum(),
    "items": lambda a, b: a[0] + a[:, 1:2][..., -1:] + a[None, :, 0].sum() + a[-1, 0],
    "matmul": lambda a, b: a @ b.mT + (a @ b[0].T) + (b[0] @ a.mT).mT,
    "matmul of vectors": lambda a, b: a @ b[0, 0] + b[0, 0] @ a.mT,
    "cat": lambda a, b: torch.cat([a, b, a], 1) + torch.cat((a, b)).sum(0)[:1],
    "stack": lambda a, b: torch.stack([a, b], 1).sum(1) + torch.stack([a, b], -1).amax(-1),
    "where": lambda a, b: torch.where(a > b, a, b[0]).clamp(-1, 1),
    "pow": lambda a, b: 2**a + a**2 + 1 / (3 + a.square()) - (1 - b),
    "flip and roll": lambda a, b: a.flip(0) + a.roll((1, 1), (0, 1)) + a.cumsum(0),
    "numbers": lambda a, b: a / a.shape[0] + a.size(-1) - a.numel(),
    "shared": lambda a, b: a * torch.arange(a.shape[-1]) + torch.ones(a.shape),
}


@pytest.mark.parametrize("what", FORMED)
def test_forms_give_what_each_member_gives_alone(what, monkeypatch):
    """Of two values of each member, [N, 3, 4]; without its form each function runs member by member."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return FORMED[what](self.a(x), self.b(x))

    models, x = members(Net), torch.randn(2, 3, 4)
    ensemble = qk.PackedEnsemble.from_models(models, x)
    assert ensemble.report.in_turn is None, ensemble.report
    got = ensemble.member_logits(x)
    for call in functions.CALLS.values():
        monkeypatch.setattr(call, "form", None if call.form is not functions.alone else call.form)
    torch.testing.assert_close(got, ensemble.member_logits(x), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_what_runs_member_by_member_compiles_and_exports(strict):
    def body(self, x):
        rows = torch.einsum("nchw,ndhw->ncd", x, x)[..., None]
        x = rows + F.interpolate(x, scale_factor=2).flatten(2).mean(2)[:, :, None, None]
        return x.roll(1, 1).reshape(x.shape[0], 6, -1, 1) - x.mean(0)

    ensemble, x = qk.PackedEnsemble.from_models(members(lambda: Images(body))), torch.randn(3, 3, 12, 12)
    assert ensemble.report.in_turn is None
    compiled = torch.compile(ensemble, fullgraph=True, backend="aot_eager")
    shapes = ({0: torch.export.Dim("images", min=2, max=8)},)  # more rows take another kernel
    exported = torch.export.export(ensemble, (x,), dynamic_shapes=shapes, strict=strict).module()
    for images in (x, x[:2]):
        torch.testing.assert_close(compiled(images), ensemble(images))
        torch.testing.assert_close(exported(images), ensemble(images))

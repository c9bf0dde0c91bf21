"""Members that run in turn: whatever they take and give, saved and loaded to the same bits."""

import copy
import re
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk


def members(make, count=2, **config):
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = make()
        qk.quantize_(model, qk.QConfig(first_layer="same", last_layer="same", **config))
        models.append(model.eval())
    return models


def in_turn(models, tmp_path, x, example=None):
    """The ensemble, its answers, and those of the one that was saved and loaded."""
    ensemble = qk.PackedEnsemble.from_models(models, x if example is None else example)
    assert ensemble.report.in_turn is not None
    folder = ensemble.save(tmp_path / "packed")
    fresh = copy.deepcopy(models[0])
    for p in [*fresh.parameters(), *fresh.buffers()]:
        if p.is_floating_point():
            p.data.fill_(0.5)
    loaded = qk.PackedEnsemble.load(folder, qk.dequantize_(fresh))
    return ensemble, ensemble.member_logits(x), loaded.member_logits(x)


class Answer(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor


class Output(OrderedDict):
    """As Hugging Face's outputs: made of their entries, which are attributes, too."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__.update(entries)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def features(self, x):
        return F.relu(self.conv(x))


class Decides(Base):
    def forward(self, x):
        x = self.head(self.features(x).mean((2, 3)))
        return x if x.sum() < 1e9 else -x


class Dict(Base):
    def forward(self, pixels, scale=None):
        features = self.features(pixels)
        return {"logits": self.head(features.mean((2, 3)) * scale), "features": features, "size": 3}


def test_mappings(tmp_path):
    models = members(Dict)
    x = {"pixels": torch.randn(2, 3, 8, 8), "scale": torch.rand(2, 1)}
    ensemble, got, again = in_turn(models, tmp_path, x)
    with torch.no_grad():
        expected = [model(**x) for model in models]
    for key in ("logits", "features"):
        torch.testing.assert_close(got[key], torch.stack([answer[key] for answer in expected]))
        assert torch.equal(got[key], again[key])
    assert got["size"] == 3
    torch.testing.assert_close(ensemble(x)["logits"], got["logits"].mean(0))
    with pytest.raises(ValueError, match="no probabilities"):
        ensemble(x, combine="probs")


@pytest.mark.parametrize("kind", [lambda a, b: (a, b), Answer, lambda a, b: Output(logits=a, features=b)])
def test_structures(kind, tmp_path):
    class Net(Base):
        def forward(self, x):
            features = self.features(x)
            return kind(self.head(features.mean((2, 3))), features)

    models, x = members(Net), torch.randn(2, 3, 8, 8)
    ensemble, got, _ = in_turn(models, tmp_path, x)
    assert "not one tensor" in ensemble.report.in_turn
    with torch.no_grad():
        expected = [model(x) for model in models]
    assert type(got) is type(expected[0])
    first = got["logits"] if isinstance(got, dict) else got[0]
    logits = [answer["logits"] if isinstance(got, dict) else answer[0] for answer in expected]
    torch.testing.assert_close(first, torch.stack(logits))
    mean = ensemble(x)
    torch.testing.assert_close(mean.logits if hasattr(mean, "logits") else mean[0], first.mean(0))


def test_what_does_not_stack_is_a_list(tmp_path):
    """As the boxes that detectors find."""

    class Net(Base):
        def forward(self, images):
            scores = [self.head(self.features(image[None]).mean((2, 3)))[0] for image in images]
            return [{"scores": s[s > 0], "labels": (s > 0).nonzero()[:, 0]} for s in scores]

    models, images = members(Net), [torch.randn(3, 8, 8), torch.randn(3, 9, 7)]
    _, got, again = in_turn(models, tmp_path, images)
    assert len(got) == 2 and [set(boxes) for boxes in got[0]] == [{"scores", "labels"}] * 2
    for own, other in zip(got, again, strict=True):
        assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(own, other, strict=True))


def test_tied_and_shared_and_infinite(tmp_path):
    class Net(Base):
        def __init__(self):
            super().__init__()
            self.again = self.conv2 = nn.Conv2d(8, 8, 1)
            self.tied = nn.Linear(8, 8, bias=False)
            self.embedding = nn.Parameter(torch.randn(8, 8))
            self.table = nn.Module()
            self.table.weight = self.embedding
            self.register_buffer("most", torch.tensor(float("inf")))
            self.register_buffer("view", torch.arange(16.0)[::2])

        def forward(self, x):
            x = self.again(self.conv2(self.features(x)))
            x = x.clamp(max=self.most).mean((2, 3)) @ self.table.weight + self.view
            return self.head(self.tied(x)) if x.sum() < 1e9 else x

    models, x = members(Net), torch.randn(2, 3, 8, 8)
    ensemble, got, again = in_turn(models, tmp_path, x)
    with torch.no_grad():
        torch.testing.assert_close(got, torch.stack([model(x) for model in models]), rtol=1e-4, atol=1e-4)
    assert torch.equal(got, again)
    first = ensemble.program.members[0]
    assert first.again is first.conv2


def test_code_that_reads_weights(tmp_path):
    class Net(Base):
        def forward(self, x):
            x = self.features(x.to(self.conv.weight.dtype)).mean((2, 3))
            bias = self.head.bias.clone()
            bias[1:3].zero_()
            x = F.linear(x, self.head.weight, bias)
            return x if x.sum() < 1e9 else -x

    models, x = members(Net), torch.randn(2, 3, 8, 8)
    _, got, again = in_turn(models, tmp_path, x)
    with torch.no_grad():
        torch.testing.assert_close(got, torch.stack([model(x) for model in models]), rtol=1e-4, atol=1e-5)
    assert torch.equal(got, again)


def test_types_without_a_packed_form(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.up = nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 4, 2)
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            x = self.up(self.conv(x)).transpose(1, 2)
            x = self.head(self.attention(x, x, x)[0].mean(1))
            return x if x.sum() < 1e9 else -x

    models, x = members(Net), torch.randn(2, 3, 8)
    ensemble, got, again = in_turn(models, tmp_path, x)
    with torch.no_grad():
        torch.testing.assert_close(got, torch.stack([model(x) for model in models]), rtol=1e-4, atol=1e-5)
    assert torch.equal(got, again)
    assert ensemble.report.packed == ["head"] and "conv" in ensemble.report.floating


def test_inputs_that_nobody_knows_are_not_verified():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(10, 8), nn.Linear(8, 4)

        def forward(self, words):
            return self.head(self.words(words).mean(1))

    models = members(Words)
    assert "not verified" in qk.PackedEnsemble.from_models(models).report.verified
    words = torch.randint(10, (2, 5))
    ensemble = qk.PackedEnsemble.from_models(models, words)
    with torch.no_grad():
        torch.testing.assert_close(ensemble.member_logits(words), torch.stack([model(words) for model in models]))


def test_answers_that_change_are_said_to(tmp_path):
    class Net(Base):
        def forward(self, x):
            return F.dropout(self.head(self.features(x).mean((2, 3))), 0.5, training=True)

    report = qk.PackedEnsemble.from_models(members(Net)).report
    assert report.in_turn is not None and "differ from one time to the next" in report.verified


class Abrupt(Base):
    """Makes a large difference of a small one, as the choice of a detector's boxes does."""

    def forward(self, x):
        features = self.features(x).mean((2, 3))
        return self.head((features * 1e7).remainder(1.0)) if x.sum() < 1e9 else features


def test_rounding_of_which_much_is_made_is_no_fault(tmp_path):
    ensemble, got, again = in_turn(members(Abrupt), tmp_path, torch.randn(2, 3, 8, 8))
    assert torch.equal(got, again)
    assert re.search(r"differ by \d.\de-0[12] .*, those of their layers by \d.\de-0[678]", ensemble.report.verified)


@pytest.mark.parametrize("make", [Abrupt, Decides])
def test_what_does_not_answer_as_the_members_is_refused(make, monkeypatch):
    monkeypatch.setattr(qk.PackedConv2d, "forward", lambda self, x: F.conv2d(x, self.weight))
    with pytest.raises(ValueError, match=r"packed, the members' answers differ by .* of the largest"):
        qk.PackedEnsemble.from_models(members(make))


def test_what_reads_more_than_the_layers_give_is_refused():
    """Each layer answers as its member's; the code that asks for their types does not."""

    class Net(Base):
        def forward(self, x):
            x = self.head(self.features(x).mean((2, 3)))
            return x if isinstance(self.conv, nn.Conv2d) and x.sum() < 1e9 else -x

    with pytest.raises(ValueError, match=r"packed, the members' answers differ by 2.0e"):
        qk.PackedEnsemble.from_models(members(Net))


def test_the_same_bits_where_pytorch_asks_whether_weights_need_gradients(tmp_path):
    class Net(Base):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
            self.probe = nn.Parameter(torch.randn(1, 1, 32))

        def forward(self, x):
            tokens = x.flatten(1).unflatten(1, (-1, 32))
            attended = self.attention(self.probe.expand(len(x), -1, -1), tokens, tokens)[0]
            return {"logits": self.head(self.features(x).mean((2, 3))), "attended": attended}

    _, got, again = in_turn(members(Net), tmp_path, torch.randn(2, 3, 16, 16))
    assert torch.equal(got["attended"], again["attended"])


def test_what_answering_leaves_behind_is_no_difference_of_members():
    """As the scales that a detector's RoI pooling finds with its first images."""

    class Remembers(nn.Module):
        sizes = None

        def forward(self, x):
            self.sizes = tuple(x.shape[2:])
            return x

    class Net(Base):
        def __init__(self):
            super().__init__()
            self.remembers = Remembers()

        def forward(self, x):
            return self.head(self.features(self.remembers(x)).mean((2, 3)))

    models, x = members(Net), torch.randn(2, 3, 8, 8)
    models[0](x)
    with pytest.raises(ValueError, match="sizes None and"):
        qk.PackedEnsemble.from_models(models)
    qk.PackedEnsemble.from_models(models, x)

"""Segments of more than convolutions: real networks, attention, norms, means and gates."""

import pytest
import torch
from segment_cases import assert_same, assert_same_in_every_layout, ensemble_of, images, needs_cpp, parts
from torch import nn

pytestmark = needs_cpp

# What norms, means and attention make of a rounding: floats, and integers, where a code may become another.
ROUNDING = {False: 1e-5, True: 0.05}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(7,), (7, 4, 4)])
@pytest.mark.parametrize(
    "name, most_parts",
    [
        ("resnet18", 4),
        ("tf_efficientnet_lite0", 4),
        ("mobilenetv3_small_100", 4),
        ("convnext_atto", 4),
        ("vit_tiny_patch16_224", 12),
    ],
)
def test_segments_of_real_networks(name, most_parts, bits):
    timm = pytest.importorskip("timm")
    options = {"img_size": 64} if name.startswith("vit") else {}
    ensemble = ensemble_of(lambda: timm.create_model(name, num_classes=7, **options), bits, 64, integer=False)
    exact = name in ("resnet18", "tf_efficientnet_lite0")
    assert_same_in_every_layout(ensemble, 64, 0.0 if exact else ROUNDING[False])
    ensemble.to_integer_([images(2, 64)])
    assert_same_in_every_layout(ensemble, 64, 0.0 if exact else ROUNDING[True])
    assert len(parts(ensemble, images(3, 64))) <= most_parts


class Attention(nn.Module):
    """A block of a transformer whose query, key and value come of one layer, and a few ways to write it."""

    def __init__(self, form="unbind", heads=2, channels=12):
        super().__init__()
        self.form, self.heads = form, heads
        self.stem, self.norm1, self.norm2 = nn.Conv2d(3, channels, 4, 4), nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.fc1, self.fc2, self.head = nn.Linear(channels, 20), nn.Linear(20, channels), nn.Linear(channels, 4)

    def attend(self, x):
        batch, tokens, channels = x.shape
        options = (
            {"scale": x.shape[-1] ** -1}
            if self.form == "scale"
            else {"is_causal": True}
            if self.form == "causal"
            else {}
        )
        if self.form == "chunk":
            parts = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]
        elif self.form == "heads first":
            qkv = self.qkv(x).reshape(batch, tokens, self.heads, 3, -1)
            parts = [qkv[:, :, :, i].transpose(1, 2) for i in range(3)]
        else:
            parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(*parts, **options)
        return y.transpose(1, 2).reshape(batch, tokens, channels)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.proj(self.attend(self.norm1(x))) + x
        x = self.fc2(self.fc1(self.norm2(x)).relu()) + x
        return self.head(x.mean(1))


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("form", ["unbind", "chunk", "scale", "causal", "heads first"])
def test_attention(form, integer):
    """In one segment with what is around it, if it is what the op knows."""
    ensemble = ensemble_of(lambda: Attention(form), integer=integer)
    for count in (1, 4):
        assert_same(ensemble, images(count), ROUNDING[integer])
    assert parts(ensemble, images(4)).count(True) == (1 if form in ("unbind", "chunk", "scale") else 3)


class Gated(nn.Module):
    """An image's means, which become factors for its channels; norms over channels in both layouts."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, channels, 3, 2, 1), nn.LayerNorm(channels)
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.wide, self.narrow = nn.Linear(channels, 16), nn.Linear(16, channels)
        self.last, self.head = nn.Conv2d(channels, 6, 3), nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x * nn.functional.relu6(self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()))
        y = self.narrow(self.wide(self.norm(x.permute(0, 2, 3, 1))).relu()).permute(0, 3, 1, 2)
        x = self.last(y + x).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("integer", [False, True])
def test_gates_norms_and_means(integer):
    ensemble = ensemble_of(Gated, integer=integer)
    for count in (1, 4):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            assert_same(ensemble, images(count).contiguous(memory_format=memory_format), ROUNDING[integer])


class Folded(nn.Module):
    """A mean over the third and fourth dimension of what all members share, which are no image's pixels."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(12, 20), nn.Linear(20, 4)

    def forward(self, x):
        return self.head(self.hidden(x.reshape(x.shape[0], 3, 12, 4, 12).mean((2, 3))).relu()).mean(1)


@pytest.mark.parametrize("integer", [False, True])
def test_a_mean_of_what_is_shared(integer):
    ensemble = ensemble_of(Folded, integer=integer)
    assert_same(ensemble, images(40))


def test_a_changed_norm():
    ensemble, x = ensemble_of(Attention), images()
    assert_same(ensemble, x, ROUNDING[True])
    before, norm = ensemble.member_logits(x), ensemble.program.layer("norm1")
    norm.eps = 0.5
    changed = ensemble.member_logits(x)
    assert not torch.equal(changed, before)
    norm.weight = norm.weight * 2
    assert not torch.equal(ensemble.member_logits(x), changed)
    assert_same(ensemble, x, ROUNDING[True])

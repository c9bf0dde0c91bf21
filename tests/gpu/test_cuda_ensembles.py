"""Packed ensembles on a GPU in CUDA graphs, and under torch.compile with the ops that they call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from on_gpu import DEVICE, captured, needs_gpu


class Small(nn.Module):
    """Convolutions, a residual and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.head = nn.Linear(32, 7)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.conv2(x) + x)
        return self.head(self.conv3(x).mean((2, 3)))


@pytest.fixture(params=["float", "integer"])
def ensemble(request):
    """A PackedEnsemble of three members on the GPU, and images for it."""
    pytest.importorskip("triton")
    if not hasattr(qk, "PackedEnsemble"):
        pytest.skip("no PackedEnsemble here")
    models = []
    for bits in (7, 7, 5):
        model = Small().eval().to(DEVICE)
        qk.quantize_(model, qk.QConfig(weight_bits=bits))
        models.append(model)
    x = torch.randn(4, 3, 40, 40, device=DEVICE)
    packed = qk.PackedEnsemble.from_models(models)
    if request.param == "integer":
        packed.to_integer_([x])
    with torch.no_grad():
        expected = torch.stack([model(x) for model in models])
    tolerance = 1e-4 if request.param == "float" else 0.1
    assert (packed.member_logits(x) - expected).abs().max() <= tolerance * expected.abs().max()
    return packed, x


@needs_gpu
def test_ensemble_in_a_cuda_graph(ensemble):
    packed, x = ensemble
    graph, logits = captured(lambda: packed(x))
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(logits, packed(x))


@needs_gpu
@pytest.mark.filterwarnings("ignore")
def test_ensemble_compiled(ensemble):
    packed, x = ensemble
    compiled = torch.compile(packed, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), packed(x), rtol=1e-3, atol=1e-3)
        x.normal_()

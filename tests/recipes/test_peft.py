"""LoRA on a quantized model: what docs/recipes.md says of it."""

import pytest
import torch
from torch import nn

import qkernels as qk


def test_lora():
    peft = pytest.importorskip("peft")
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)), torch.randn(8, 16)
    qk.quantize_(model, qk.QConfig(weight_bits=4))
    base, before = model[0].latent_weight, model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    assert torch.equal(adapted(x), before) and not list(qk.named_scales(adapted))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(x).square().mean().backward()
        optimizer.step()
    trained = adapted(x)
    assert not torch.allclose(trained, before) and model[0].base_layer.latent_weight is base
    with pytest.raises(RuntimeError, match=r"quantized anew whenever it is read.*qkernels\.dequantize_ first"):
        adapted.merge_adapter()
    assert torch.equal(adapted(x), trained)
    merged = qk.dequantize_(adapted).merge_and_unload()
    torch.testing.assert_close(merged(x), trained)
    assert [layer.name for layer in qk.quantize_(merged, qk.QConfig(weight_bits=4)).quantized] == ["0"]
    for how in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(RuntimeError, match="quantized anew whenever it is read"):
            peft.get_peft_model(nn.Sequential(merged), peft.LoraConfig(target_modules=["0.0"], r=2, **how))

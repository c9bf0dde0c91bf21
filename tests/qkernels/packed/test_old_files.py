"""Packed files of version 1 load as long as there is a version 1, and answer as they did when they were written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from packed_files import InTurn
from qkernels.ops import library

FILES = Path(__file__).parent / "files_v1"


@pytest.mark.parametrize("name", ["resnet", "efficientnet_lite", "vit", "in_turn"])
def test_an_old_file_answers_as_it_did(name):
    """To the bit where it was written; elsewhere sums are taken in another order."""
    expected = load_file(FILES / name / "expected.safetensors")
    ensemble = qk.PackedEnsemble.load(FILES / name, InTurn() if name == "in_turn" else None)
    logits = ensemble.member_logits(expected["images"])
    made_with = json.loads((FILES / "made_with.json").read_text())
    if made_with == {"torch": torch.__version__, "cpu": library.cpu_features()}:
        assert torch.equal(logits, expected["logits"]), (logits - expected["logits"]).abs().max()
    atol = 1e-4 * expected["logits"].abs().max().item()
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=atol)

"""What it takes to load five ResNet-50 of 7 bits: time, and memory beside what the process has already."""

import json
import subprocess
import sys
from statistics import median

import pytest
import timm
import torch

import qkernels as qk

PROCESSES = 5
MOST = 1.3  # times the tensors, at the peak

LOAD = """
import json, re, sys, time, torch
import qkernels as qk
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
qk.PackedEnsemble.load(sys.argv[1] + "/small")(torch.zeros(1, 4))
before, began = peak(), time.perf_counter()
ensemble = qk.PackedEnsemble.load(sys.argv[1] + "/large")
print(json.dumps([time.perf_counter() - began, (peak() - before) / ensemble.nbytes, ensemble.nbytes]))
"""


def network(name: str) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 2)) if name == "small" else timm.create_model("resnet50")


@pytest.mark.nightly
def test_loading_takes_little_more_than_the_tensors(tmp_path, figures):
    for name, members in (("small", 1), ("large", 5)):
        models = [network(name) for _ in range(members)]
        for model in models:
            qk.quantize_(model, qk.QConfig(weight_bits=7, last_layer="same"))
        qk.PackedEnsemble.from_models(models).save(tmp_path / name)
    measured = []
    for _ in range(PROCESSES):
        arguments = [sys.executable, "-c", LOAD, str(tmp_path)]
        measured.append(json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout))
    seconds, peak, nbytes = (median(column) for column in zip(*measured, strict=True))
    told = {"MiB of tensors": round(nbytes / 2**20), "ms to load": round(1000 * seconds)}
    figures("loading five ResNet-50", PROCESSES, told | {"% of the tensors at the peak": round(100 * peak)})
    assert peak <= MOST

"""10,000 mutated packed files: none becomes code, none ends a process, none raises what its reader does not expect."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

COUNT, SEED, SECONDS = 10_000, 0, 3600
BATCH = 250  # files that one process reads, so that what kills one is found quickly
MEMORY = 3 << 30  # of a process, beside what PyTorch maps when it is imported
ROOT = Path(__file__).parents[2]

READ = """
import json, resource, shutil, signal, sys, tempfile
from collections import Counter
from pathlib import Path

root, first, last, memory = sys.argv[1], *map(int, sys.argv[2:])
sys.path[:0] = [root, f"{root}/tests"]
import torch
from safetensors.torch import load_file

import qkernels as qk
from hostile_files import mutate
from packed_files import InTurn

torch.set_num_threads(1)
files = Path(root) / "tests/qkernels/packed/files_v1"
names = ("resnet", "efficientnet_lite", "vit", "in_turn")
model = lambda name: InTurn() if name == "in_turn" else None
images = {name: load_file(files / name / "expected.safetensors")["images"] for name in names}
before = {name: qk.PackedEnsemble.load(files / name, model(name)).member_logits(images[name]) for name in names}
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))


def outcome(seed, place):
    name = names[seed % len(names)]
    folder, marker = place / "packed", place / "marker"
    shutil.copytree(files / name, folder)
    what = mutate(folder, seed, marker)
    signal.alarm(60)
    try:
        ensemble = qk.PackedEnsemble.load(folder, model(name))
    except qk.PackedFileError:
        return "refused"
    except BaseException as error:
        return f"load: {type(error).__name__}"
    try:
        logits = ensemble.member_logits(images[name])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"no answer ({what})"
    return f"{'the same' if torch.equal(logits, before[name]) else 'another'} answer ({what})"


found = {}
for seed in range(first, last):
    print(seed, file=sys.stderr, flush=True)  # the last one of a process that dies
    with tempfile.TemporaryDirectory() as place:
        found[seed] = outcome(seed, Path(place))
        found[seed] = "code" if (Path(place) / "marker").exists() else found[seed]
print(json.dumps(found))
"""


@pytest.mark.nightly
@pytest.mark.timeout(SECONDS)
def test_mutated_files(figures):
    outcomes: Counter[str] = Counter()
    findings = {}
    for first in range(SEED, SEED + COUNT, BATCH):
        arguments = [sys.executable, "-c", READ, str(ROOT), str(first), str(first + BATCH), str(MEMORY)]
        result = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if result.returncode != 0:
            last = next((line for line in reversed(result.stderr.splitlines()) if line.isdigit()), str(first))
            findings[last] = f"exit {result.returncode}: {result.stderr[-2000:]}"
            outcomes["a process ended"] += 1
            continue
        for seed, what in json.loads(result.stdout).items():
            outcomes[what] += 1
            # An answer that depends on nothing that was changed must be the same.
            if what == "code" or what.startswith("load:") or what == "another answer (told)":
                findings[seed] = what
    figures("mutated packed files", COUNT, dict(outcomes.most_common()))
    assert not findings, findings

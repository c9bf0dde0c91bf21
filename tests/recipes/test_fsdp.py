"""The recipe of FSDP2 in two gloo processes: the losses of one, resumed before and after the switch, a packed file."""

import os
from unittest import mock

import pytest
import torch
from torch import distributed

import qkernels as qk
from recipe import STEPS, Interrupted, Recording, plain, quantized, recording, run
from two_processes import in_two_processes


def worker(rank, folder):
    os.chdir(folder)
    there_is_one = (mock.patch(f"torch.distributed.{what}_process_group") for what in ("init", "destroy"))
    with next(there_is_one), next(there_is_one), recording() as seen:
        recipe = run("FSDP2")
    again = folder / "again"
    again.mkdir(exist_ok=True)
    os.chdir(again)
    with recording(10) as interrupted, pytest.raises(Interrupted):
        recipe.train(0)
    for epoch in (1, 3):  # the switch is between them
        with recording() as resumed:
            end = recipe.train(0, epoch)
        assert interrupted.losses[: 3 * epoch] + resumed.losses == seen.losses[:STEPS]
    parts = [Recording(), Recording()]
    distributed.all_gather_object(parts, seen)
    if rank == 0:
        found = of_one_process(recipe, parts)
        found |= {"answers": recipe.answers, "images": recipe.images, "ends": [recipe.states[0], end]}
        torch.save(found, folder / "found.pt")


def of_one_process(recipe, parts):
    """Losses of the first member in the recipe and in plain loops over whole batches; logits of all members."""
    found = {"losses": torch.tensor([part.losses[:STEPS] for part in parts]).mean(0)}
    both = Recording(
        images=[torch.cat(pair) for pair in zip(*(part.images[:STEPS] for part in parts), strict=True)],
        labels=[torch.cat(pair) for pair in zip(*(part.labels[:STEPS] for part in parts), strict=True)],
    )
    for name, switch in (("plain", 6), ("float", None)):
        torch.manual_seed(0)
        model = quantized(recipe.network())
        optimizer = torch.optim.AdamW(qk.param_groups(model, lr=1e-3, weight_decay=0.01, scale_lr=1e-4))
        found[name] = torch.tensor(plain(model, optimizer, both, switch))
    with torch.no_grad():
        found["logits"] = torch.stack([model(recipe.images) for model in recipe.models])
    return found


@pytest.mark.slow
def test_fsdp(tmp_path):
    in_two_processes(worker, tmp_path)
    found = torch.load("found.pt", weights_only=True)
    torch.testing.assert_close(found["losses"], found["plain"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["losses"][:6], found["float"][:6], rtol=1e-6, atol=1e-6)
    assert (found["losses"][6] - found["float"][6]).abs() > 1e-5
    end, again = found["ends"]
    assert all(torch.equal(value, again[name]) for name, value in end.items())
    ensemble = qk.PackedEnsemble.load("packed")
    assert torch.equal(found["answers"], ensemble(found["images"]))
    apart = (ensemble.member_logits(found["images"]) - found["logits"]).abs().max() / found["logits"].abs().max()
    assert apart < 1e-4

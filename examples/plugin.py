"""A loss, a step rule, a method, a data set and a backbone of one's own: see docs/extending.md."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from qtdog import plugins
from qtdog.plugins import DomainSet, Loss, Method, StepRule, TensorDomain, number


@plugins.register_loss("vrex")
@dataclass
class VREx(Loss):
    """The mean of the domains' losses, and their variance as a penalty (Krueger et al. 2021)."""

    least_domains, whole_minibatch = 2, True
    vrex_penalty: float = number(1.0, "weight of the variance between the domains' losses", least=0)

    def __call__(self, model, minibatches):
        losses = torch.stack([cross_entropy(model(images), labels) for images, labels in minibatches])
        return losses.mean() + self.vrex_penalty * losses.var(unbiased=False)


@plugins.register_step("centered")
@dataclass
class Centered(StepRule):
    """Gradients of matrices and kernels less their mean over the inputs (Yong et al. 2020)."""

    def __call__(self, loss, model, optimizer, scaler=None):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        for p in model.parameters():
            if p.grad is not None and p.dim() > 1:
                p.grad -= p.grad.mean(tuple(range(1, p.dim())), keepdim=True)
        optimizer.step()
        return value.detach()


plugins.register_method("vrex+qtdog", Method("VREx + QT-DoG", loss="vrex", quantizer="lsq"))


@plugins.register_dataset("Bars", steps=200, checkpoint_freq=50, switch_step=80, backbone="tiny")
def bars(data_dir):
    """80 images of noise a domain with a bar in the row of their class; the domains differ in how bright it is."""
    labels, domains = torch.arange(80) % 4, []
    for brightness in (40, 80, 120):
        pixels = torch.randint(0, 130, (80, 1, 8, 8), generator=torch.Generator().manual_seed(brightness))
        pixels[range(80), 0, 2 * labels] += brightness
        domains.append(TensorDomain(str(brightness), pixels.byte(), labels))
    return DomainSet("Bars", "made of noise", ["first", "third", "fifth", "seventh"], domains, (1, 8, 8))


@plugins.register_backbone("tiny")
def tiny(channels, classes):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, classes))

"""Layers of TableDiT against a loop over columns, and gradients of all its parameters."""

from __future__ import annotations

import math

import pytest
import torch

from anystate.model.table_dit import Numerical, NumericalFeatures, TableDiT


def test_number_features_are_those_of_each_column():
    torch.manual_seed(0)
    part = NumericalFeatures(3, 4, 5)
    x = torch.randn(6, 3)
    made = part(x[..., None])
    assert made.shape == (6, 3, 5)
    for b in range(6):
        for c in range(3):
            angles = [float(x[b, c]) * f for f in part.frequency[c].tolist()]
            features = [float(x[b, c]), *map(math.cos, angles), *map(math.sin, angles)]
            expected = torch.tensor(features) @ part.linear.weight[c] + part.linear.bias[c]
            torch.testing.assert_close(made[b, c], expected)


@pytest.mark.parametrize("sinusoids", [0, 4])
def test_outputs_depend_on_numbers_and_all_parameters_have_gradients(sinusoids):
    torch.manual_seed(0)
    net = TableDiT({"num": Numerical(3)}, 8, 1, 2, ["num"], observed=True, sinusoids=sinusoids)
    for weight in net.parameters():  # modulations are zero at first, which makes blocks the identity
        torch.nn.init.normal_(weight, std=0.3)
    x = torch.randn(4, 3, requires_grad=True)
    out = net({"num": x}, {"num": torch.full((4,), 0.5)}, observed={"num": torch.ones(4, 3, dtype=torch.bool)})["num"]
    assert out.shape == (4, 3)
    (out**2).sum().backward()
    assert (x.grad != 0).all()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in net.parameters())

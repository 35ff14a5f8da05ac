"""The ε loss with regenerated noise, and its gradient."""

import pytest
import torch

from anystate.kernels import eps_mse, gaussian_perturb, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 2, 11, 7), (2, 1100), (4, 1)])
def test_loss_and_gradient(shape, dtype, random, keys, check_gradients):
    k = keys(shape[0])
    check_gradients(
        lambda eps: eps_mse(eps, k, backend="triton"),
        lambda eps: reference.eps_mse(eps, k),
        [random(*shape, dtype=dtype)],
    )


def test_transposed_input(random, keys):
    eps = random(3, 5, 8).transpose(1, 2)
    assert (eps_mse(eps, keys(3), backend="triton") - reference.eps_mse(eps, keys(3))).abs().max() < 1e-6


def test_zero_for_the_noise_itself(random, keys):
    k = keys(3)
    noise = gaussian_perturb(random(3, 50), 0.0, 1.0, k, backend="triton")
    assert eps_mse(noise, k, backend="triton").max() < 1e-12


def test_gradcheck_of_the_reference(keys):
    eps, k = torch.randn(2, 3, dtype=torch.float64, requires_grad=True), keys(2).cpu()
    assert torch.autograd.gradcheck(lambda e: reference.eps_mse(e, k), eps)

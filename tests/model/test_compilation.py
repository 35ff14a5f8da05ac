"""Settings of torch.compile and their effect on the generated code."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from anystate import kernels
from anystate.model import compilation

pytestmark = pytest.mark.skipif(compilation.compiler_missing(torch.device("cpu")) is not None, reason="no C++ compiler")


class FeedForward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gelu = torch.nn.functional.gelu
        return gelu(self.narrow(gelu(self.wide(x))))


@pytest.mark.parametrize("training", [False, True])
def test_bias_is_fused_with_the_next_operation(training):
    """Without gradients, no bias is written out before its matrix product (addmm); training code is not changed."""
    torch._dynamo.reset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FeedForward()
        x = torch.randn(4, 8)
    assert compilation.compile_net(net, torch.device("cpu"), demanded=True)
    with torch.set_grad_enabled(training):
        y, code = run_and_get_code(net, x)
        expected = net.forward(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert ("addmm(" in code[0]) == training
    if training:
        found, expected_grads = (
            torch.autograd.grad(out.square().sum(), list(net.parameters())) for out in (y, expected)
        )
        torch.testing.assert_close(found, expected_grads, rtol=1e-4, atol=1e-5)


def test_a_small_function_runs_the_reference_with_narrow_attention():
    """Compiled without our kernels, and with attention as sums of products; equal within rounding, gradients too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 5, 2, 6, requires_grad=True) for _ in range(3))
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list):
        graphs.append(module.code)
        return module.forward

    attend = lambda: kernels.joint_attention(q, k, v)  # noqa: E731
    out, expected = compilation.compile_small(attend, backend)(), attend()
    torch.testing.assert_close(out, expected)
    found, gradients = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    assert "softmax" in graphs[0]
    assert "bmm" not in graphs[0]
    assert "scaled_dot_product" not in graphs[0]

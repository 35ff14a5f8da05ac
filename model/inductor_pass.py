"""An additional pass of Inductor on the CPU.

There `addmm` copies the bias into its result before it multiplies, a fifth of the time of the narrow layers here; a
product and a sum instead let it make the sum one with whatever comes next.
"""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

VIEWS = {getattr(torch.ops.aten, name).default for name in ("view", "reshape", "unsqueeze", "permute", "alias")}


class BiasAfterwards(CustomGraphPass):
    """addmm(b, x, w) becomes mm(x, w) + b, unless it is kept for a backward pass and so written out in any case."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
            if node.kwargs or is_returned(node):  # scaled, or kept
                continue
            bias, x, w = node.args
            with graph.inserting_before(node):
                product = graph.call_function(torch.ops.aten.mm.default, (x, w))
                total = graph.call_function(torch.ops.aten.add.Tensor, (product, bias))
            product.meta, total.meta = dict(node.meta), dict(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def is_returned(node: torch.fx.Node) -> bool:
    """Whether a graph returns a node, or a view of it."""
    return any(u.op == "output" or (u.target in VIEWS and is_returned(u)) for u in node.users)

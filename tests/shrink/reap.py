"""REAP as published (Lasby et al. 2025, arXiv 2510.13999, eq. 9), for Qwen3 mixtures, without a line of secateurs.

The saliency of an expert is the mean, over the tokens that are sent to it, of its gate value times the length of its output. All are
measured in one pass of the whole model; of every block those with the least go, with their rows of the router.
"""

import torch


def saliency(x_TH, router_EH, gate_up_EOH, down_EHI, active, normalized=True):
    """Of every expert of a block, by a loop over experts in fp64; 0 of one without tokens."""
    x_TH = x_TH.double()
    probability_TE = torch.softmax(x_TH @ router_EH.double().T, 1)
    values_TK, chosen_TK = probability_TE.topk(active)
    if normalized:
        values_TK = values_TK / values_TK.sum(1, keepdim=True)
    scores = []
    for e in range(len(router_EH)):
        mine_T = (chosen_TK == e).any(1)
        gate_NI, up_NI = (x_TH[mine_T] @ gate_up_EOH[e].double().T).chunk(2, 1)
        out_NH = (gate_NI * torch.sigmoid(gate_NI) * up_NI) @ down_EHI[e].double().T
        value_N = (values_TK * (chosen_TK == e)).sum(1)[mine_T]
        scores.append(float((value_N * out_NH.norm(dim=1)).mean()) if mine_T.any() else 0.0)
    return scores


@torch.no_grad()
def prune(model, windows, gone):
    """Remove so many experts of every block, in place. windows: token windows [N, S]. Returns which, by block."""
    seen = [[] for _ in model.model.layers]
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].flatten(0, 1)))
        for block, found in zip(model.model.layers, seen, strict=True)
    ]
    for part in windows.split(32):
        model(input_ids=part, use_cache=False)
    for hook in hooks:
        hook.remove()
    removed = []
    for block, found in zip(model.model.layers, seen, strict=True):
        gate, experts = block.mlp.gate, block.mlp.experts
        scores = saliency(
            torch.cat(found), gate.weight, experts.gate_up_proj, experts.down_proj, gate.top_k, gate.norm_topk_prob
        )
        order = sorted(range(len(scores)), key=lambda e: scores[e])
        stays = sorted(order[gone:])
        gate.weight = torch.nn.Parameter(gate.weight[stays])
        experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[stays])
        experts.down_proj = torch.nn.Parameter(experts.down_proj[stays])
        gate.num_experts = experts.num_experts = len(stays)
        removed.append(sorted(order[:gone]))
    return removed

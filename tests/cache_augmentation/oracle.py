"""The cache written from its definition: loops over tokens, fp64, one row. Independent of the package's arithmetic."""

import math

import torch
from torch import Tensor


def cache(hidden: Tensor, documents: list[int], weights: dict[str, Tensor], *, length: int, latents: int, heads: int):
    """x + W_o(read) of one row.

    Args:
        hidden: (T, D).
        documents: id of each token.
        weights: the module's parameters by name, whole.
        length, latents, heads: S, L, H.
    """
    tokens, width = hidden.shape
    head = width // heads
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights["norm.weight"]
    extra = weights["importance_weight"].numel() // heads
    projected = (normed @ weights["projection.weight"].t()).view(tokens, heads, -1)
    position = weights["position_bias"].view(heads, latents, length)
    out = torch.zeros(tokens, heads, head, dtype=hidden.dtype)
    for h in range(heads):
        q, k, v, e, p = projected[:, h].split([head, head, head, extra, latents], -1)
        a, c = weights["importance_weight"].view(heads, -1)[h], weights["importance_bias"][h]
        held: list[tuple[int, Tensor, Tensor, Tensor]] = []  # document, key, value, importance
        inside = 0
        for t in range(tokens):
            inside = 0 if t == 0 or documents[t] != documents[t - 1] else inside
            logits, values = [q[t] @ weights["null_key"].view(heads, -1)[h] / math.sqrt(head)], [torch.zeros_like(v[t])]
            for document, key, value, importance in held:
                if document == documents[t]:
                    logits.append(q[t] @ key / math.sqrt(head) + importance.log())
                    values.append(value)
            out[t, h] = torch.stack(logits).softmax(0) @ torch.stack(values)
            inside += 1
            if inside == length:
                segment = slice(t - length + 1, t + 1)
                for latent in range(latents):
                    w = (p[segment, latent] + position[h, latent]).softmax(0)
                    z = w @ e[segment]
                    importance = torch.sigmoid((z * torch.sigmoid(z)) @ a + c)
                    held.append((documents[t], w @ k[segment], w @ v[segment], importance))
                inside = 0
    return hidden + out.flatten(1) @ weights["output.weight"].t()

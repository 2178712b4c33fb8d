"""Arctic from its equations, in plain torch and float32 or float64: what both hosts are compared with. Takes weights by
Snowflake's names.
"""

import pytest
import torch
from torch.nn.functional import silu


def norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, positions, theta):
    """``x [T, heads, D]``: pairs (i, i + D/2) turned by positions * theta ** (-2i / D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None].to(x.dtype) * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attention(x, w, prefix, c, window=None):
    tokens, dim = x.shape[0], c["head_dim"]
    q, k, v = ((x @ w[f"{prefix}.{name}_proj.weight"].T).view(tokens, -1, dim) for name in "qkv")
    positions = torch.arange(tokens)
    q, k = rotate(q, positions, c["rope_theta"]), rotate(k, positions, c["rope_theta"])
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / dim**0.5
        scores = scores.masked_fill(positions[None] > positions[:, None], float("-inf"))
        out[:, head] = scores.softmax(-1) @ v[:, head // group]
    return out.reshape(tokens, -1) @ w[f"{prefix}.o_proj.weight"].T


def mlp(x, w, prefix):
    return (silu(x @ w[f"{prefix}.w1.weight"].T) * (x @ w[f"{prefix}.w3.weight"].T)) @ w[f"{prefix}.w2.weight"].T


def moe(x, w, prefix, c):
    probabilities = (x @ w[f"{prefix}.gate.weight"].T).softmax(-1)
    out = torch.zeros_like(x)
    for token in range(len(x)):
        best = probabilities[token].argsort(descending=True)[: c["top_k"]]
        weights = probabilities[token][best]
        if c["top_k"] > 1:
            weights = weights / weights.sum()
        for weight, expert in zip(weights, best.tolist(), strict=True):
            out[token] += weight * mlp(x[token], w, f"{prefix}.experts.{expert}")
    return out


def logits(ids, w, c):
    """``ids [T]`` -> ``[T, vocabulary]``; ``c``: layers, frequency, hybrid, top_k, head_dim, rope_theta, eps."""
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(c["layers"]):
        prefix = f"model.layers.{layer}"
        a = x + attention(norm(x, w[f"{prefix}.input_layernorm.weight"], c["eps"]), w, f"{prefix}.self_attn", c)
        after = w[f"{prefix}.post_attention_layernorm.weight"]
        if (layer + 1) % c["frequency"]:
            x = a + mlp(norm(a, after, c["eps"]), w, f"{prefix}.block_sparse_moe.mlp")
        elif c["hybrid"]:
            residual = mlp(norm(a, w[f"{prefix}.residual_layernorm.weight"], c["eps"]), w, f"{prefix}.residual_mlp")
            x = a + residual + moe(norm(x, after, c["eps"]), w, f"{prefix}.block_sparse_moe", c)
        else:
            x = a + moe(norm(a, after, c["eps"]), w, f"{prefix}.block_sparse_moe", c)
    return norm(x, w["model.norm.weight"], c["eps"]) @ w["lm_head.weight"].T


@pytest.fixture(scope="session")
def equations():
    """A function of an ``ArcticConfig`` and weights by Snowflake's names that gives the model: ids, a list or tensor
    [T], -> logits [T, vocabulary].
    """

    def model(config, weights):
        embedding = weights["model.embed_tokens.weight"]
        weights, choices = {"lm_head.weight": embedding, **weights}, choices_of(config)
        return lambda ids: logits(torch.as_tensor(ids), weights, choices)

    return model


def choices_of(config):
    """What :func:`logits` wants to know, of an ``ArcticConfig``."""
    return {
        "layers": config.num_hidden_layers,
        "frequency": config.moe_layer_frequency,
        "hybrid": config.parallel_attn_mlp_res,
        "top_k": config.num_experts_per_tok,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rope_theta": config.rope_parameters["rope_theta"],
        "eps": config.rms_norm_eps,
    }

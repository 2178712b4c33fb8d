"""Capacity and auxiliary losses against what they say they compute."""

import torch
from arctic_plugins_moe.router import Capacity, expert_load, load_balancing_loss, router_entropy, z_loss


def test_first_choices_and_early_tokens_come_first():
    index = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]])
    weights = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1], [0.5, 0.5]])
    kept, scaled = Capacity(0.75).apply(index, weights, 3)  # two rows for each expert
    assert Capacity(0.75).rows(4, 2, 3) == 2
    assert kept.tolist() == [[0, 1], [0, 2], [3, 3], [1, 3]], (
        "the third token wants experts that are full, the last one's second choice as well"
    )
    assert torch.allclose(scaled, torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.0, 0.0], [1.0, 0.0]]))


def test_a_single_choice_keeps_its_weight():
    kept, weights = Capacity(0.5, min_capacity=1).apply(
        torch.tensor([[0], [0], [1]]), torch.tensor([[0.3], [0.4], [0.5]]), 2
    )
    assert kept.tolist() == [[0], [2], [1]]
    assert torch.allclose(weights, torch.tensor([[0.3], [0.0], [0.5]]))


def test_enough_capacity_changes_nothing():
    weights, index = torch.randn(64, 8).softmax(-1).topk(2)
    kept, same = Capacity(8.0).apply(index, weights, 8)
    assert torch.equal(kept, index)
    assert torch.allclose(same, weights)


def test_the_balance_of_a_layer():
    torch.manual_seed(0)
    layers = [torch.randn(12, 4) for _ in range(3)]
    expected = 0.0
    for logits in layers:
        probabilities = logits.softmax(-1)
        chosen = probabilities.topk(2).indices
        shares = torch.stack([(chosen == expert).any(-1).float().mean() for expert in range(4)])
        expected += 4 * (shares * probabilities.mean(0)).sum()
    assert torch.allclose(load_balancing_loss(layers, 2), expected)
    assert torch.allclose(load_balancing_loss([torch.zeros(8, 4)], 1), torch.tensor(1.0)), "no preference"
    mask = torch.tensor([[1] * 5 + [0], [1] * 3 + [0] * 3])
    kept = mask.reshape(-1).bool()
    assert torch.allclose(
        load_balancing_loss(layers, 2, mask), load_balancing_loss([logits[kept] for logits in layers], 2)
    )
    assert torch.allclose(z_loss(layers, mask), z_loss([logits[kept] for logits in layers]))
    assert torch.allclose(z_loss(layers), sum((logits.exp().sum(-1).log() ** 2).mean() for logits in layers))


def test_figures():
    assert torch.allclose(expert_load(torch.tensor([[0, 1], [0, 4]]), 4), torch.tensor([2 / 3, 1 / 3, 0, 0]))
    assert torch.allclose(router_entropy(torch.zeros(3, 4)), torch.tensor(4.0).log())

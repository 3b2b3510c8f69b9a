"""Expert-balanced self-sampling: the formula by brute force, its sign, and balance per layer."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from alphaquant.texts.balanced import Written, imbalance, write_balanced

V, E, LAYERS = 3, 4, 2


class Toy:
    """A model whose next token and experts depend on the last two tokens, by a drawn table."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.log_probs = torch.randn(V, V, V, generator=generator).mul(2).log_softmax(-1)
        self.experts = torch.randint(0, E, (LAYERS, V, V), generator=generator)
        self.prefixes: list[list[int]] = []

    def last_two(self, prefix: list[int]) -> tuple[int, int]:
        return (prefix[-2] if len(prefix) > 1 else 0), prefix[-1]

    def usage_of(self, prefix: list[int], layer: int) -> list[float]:
        """How often a whole prefix chose each expert of a layer."""
        found = [0.0] * E
        for end in range(1, len(prefix) + 1):
            a, b = self.last_two(prefix[:end])
            found[int(self.experts[layer, a, b])] += 1
        return found

    def say(self, n_new: int) -> Written:
        rows = [self.log_probs[self.last_two(p)] for p in self.prefixes]
        usage = []
        for layer in range(LAYERS):
            new, old = (
                torch.tensor([self.usage_of(p[: len(p) - cut], layer) for p in self.prefixes])
                for cut in (0, n_new)
            )
            usage.append(new - old)
        return Written(torch.stack(rows), usage)

    def begin(self, tokens: Tensor) -> Written:
        self.prefixes = tokens.tolist()
        return self.say(tokens.shape[1])

    def go_on(self, prefixes: Tensor, tokens: Tensor) -> Written:
        pairs = zip(prefixes.tolist(), tokens.tolist(), strict=True)
        self.prefixes = [[*self.prefixes[row], token] for row, token in pairs]
        return self.say(1)


def sigma(toy: Toy, prefix: list[int]) -> float:
    """By the formula, layer by layer."""
    total = 0.0
    for layer in range(LAYERS):
        u = [n / len(prefix) for n in toy.usage_of(prefix, layer)]
        mean = sum(u) / E
        total += math.sqrt(sum((x - mean) ** 2 for x in u) / (E - 1))
    return total / LAYERS


def score(toy: Toy, prefix: list[int], token: int, temperature: float) -> float:
    """Of a prefix with a token behind it, by the formula."""
    told = sum(
        float(toy.log_probs[toy.last_two(prefix[:end])][prefix[end]])
        for end in range(1, len(prefix))
    )
    told += float(toy.log_probs[toy.last_two(prefix)][token])
    return -told / (len(prefix) + 1) + sigma(toy, prefix) / temperature


def by_hand(toy: Toy, first: int, n_tokens: int, width: int, temperature: float) -> list[int]:
    """Beams kept one by one."""
    beams = [[first]]
    while len(beams[0]) < n_tokens:
        scored = sorted(
            (score(toy, beam, token, temperature), [*beam, token])
            for beam, token in product(beams, range(V))
        )
        beams = [prefix for _, prefix in scored[:width]]
    return beams[0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("width", "temperature"), [(1, 1.2), (4, 1.2), (4, 0.05)])
def test_beams_are_those_of_the_formula(seed: int, width: int, temperature: float) -> None:
    toy = Toy(seed)
    starts = torch.tensor([[0], [1], [2]])
    found = write_balanced(toy, starts, 7, width=width, temperature=temperature)
    for row, first in zip(found.tokens.tolist(), (0, 1, 2), strict=True):
        assert row == by_hand(toy, first, 7, width, temperature)


def test_as_many_beams_as_there_are_prefixes_find_the_least_score_of_all() -> None:
    # With every prefix kept the last step chooses among all texts: brute force over V^4 of them.
    toy = Toy(3)
    found = write_balanced(toy, torch.tensor([[1]]), 5, width=V**4)
    texts = [[1, *rest] for rest in product(range(V), repeat=4)]
    best = min(texts, key=lambda text: score(toy, text[:-1], text[-1], 1.2))
    assert found.tokens.tolist() == [best]
    assert float(found.scores) == pytest.approx(score(toy, best[:-1], best[-1], 1.2), abs=1e-5)


class Even(Toy):
    """Token 1 is likelier; token 0 goes to another expert every time, token 1 to the same."""

    def __init__(self) -> None:
        super().__init__(0)
        self.log_probs[:] = torch.tensor([0.45, 0.5, 0.05]).log()
        self.experts[:] = 0
        self.experts[:, 0, 1], self.experts[:, 1, 0] = 1, 2
        self.experts[:, 0, 0] = 3


def test_balance_wins_over_likelihood_as_its_temperature_falls() -> None:
    likely = write_balanced(Even(), torch.tensor([[1]]), 9, temperature=1e6)
    balanced = write_balanced(Even(), torch.tensor([[1]]), 9, temperature=0.01)
    assert likely.tokens.tolist() == [[1] * 9]
    spread = [sigma(Even(), t.tolist()[0]) for t in (likely.tokens, balanced.tokens)]
    assert spread[1] < spread[0]  # the lowest scores are kept: the other sign would give more
    assert likely.log_probs > balanced.log_probs


def test_each_layer_is_balanced_by_itself() -> None:
    # One layer's lack is another's excess: summed over layers they would look even.
    usage = [torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
    assert float(imbalance(usage, 4)) == pytest.approx(math.sqrt(0.5))
    assert float(imbalance([usage[0] + usage[1]], 8)) == 0.0


def test_the_example_of_the_header_is_right() -> None:
    usage = [torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 2.0]])]
    assert float(imbalance(usage, 4)) == pytest.approx(0.1768, abs=1e-4)

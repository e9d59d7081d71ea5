import torch
from hypothesis import given
from hypothesis import strategies as st

from dancegrpo.noise import generator, key, normal

ints = st.integers(0, 10**9)


def test_a_row_does_not_depend_on_its_neighbours():
    together = normal((3, 2), 7, "step", [(0, g, s) for g in range(3) for s in range(4)])
    alone = torch.cat([normal((3, 2), 7, "step", [(0, g, s)]) for g in range(3) for s in range(4)])
    assert torch.equal(together, alone)


@given(ints, ints, ints)
def test_keys_do_not_confuse_neighbouring_fields(seed, a, b):
    keys = {key(seed, "x", a, b), key(seed, "xa", b), key(seed, "x", int(f"{a}{b}")), key(seed, "x", a, b, 0)}
    assert len(keys) == 4


def test_the_noise_is_standard_normal():
    noise = normal((100,), 0, "start", [(i,) for i in range(1000)]).flatten()
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / len(noise)) ** 0.5


def test_neighbouring_keys_are_uncorrelated():
    rows = normal((4096,), 0, "step", [(0, 0, 0, t) for t in range(16)])
    correlation = torch.corrcoef(rows) - torch.eye(16)
    assert correlation.abs().max() < 5 / 4096**0.5


def test_generator_repeats():
    assert torch.equal(torch.rand(5, generator=generator(1, "a", 2)), torch.rand(5, generator=generator(1, "a", 2)))

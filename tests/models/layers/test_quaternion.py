"""Quaternion layers against the algebra: norms, associativity, the real matrix, and what a layer starts from."""

import itertools
import math

import pytest
import torch

from companion.models.layers.quaternion import QuaternionLinear, hamilton, modulus, real_matrix
from tests.models.common import numbers, refuses


def quaternions(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_units_multiply_as_hamilton_carved_them():
    one, i, j, k = torch.eye(4, dtype=torch.float64)
    assert torch.equal(hamilton(hamilton(i, j), k), -one)
    for a, b, c in ((i, j, k), (j, k, i), (k, i, j)):
        assert torch.equal(hamilton(a, b), c) and torch.equal(hamilton(b, a), -c)
        assert torch.equal(hamilton(a, a), -one) and torch.equal(hamilton(one, a), a)


def test_norms_multiply_and_the_product_is_associative_but_not_commutative():
    p, q, r = (quaternions(5, 24, seed=s) for s in range(3))
    torch.testing.assert_close(modulus(hamilton(p, q)), modulus(p) * modulus(q))
    torch.testing.assert_close(hamilton(hamilton(p, q), r), hamilton(p, hamilton(q, r)))
    assert (hamilton(p, q) - hamilton(q, p)).abs().max() > 0.1


def test_the_blocks_of_the_real_matrix():
    r, i, j, k = weight = quaternions(4, 3, 5)
    rows = [[r, i, j, k], [-i, r, k, -j], [-j, -k, r, i], [-k, j, -i, r]]
    assert torch.equal(real_matrix(weight), torch.cat([torch.cat(row, 1) for row in rows]))


def test_a_layer_is_a_sum_of_hamilton_products_with_the_weight_on_the_left():
    layer = QuaternionLinear(12, 8).double()
    torch.nn.init.normal_(layer.bias)
    x = quaternions(2, 7, 12)
    expected = layer.bias.repeat(2, 7, 1)
    for n, m in itertools.product(range(3), range(2)):
        expected[..., m::2] += hamilton(layer.weight[:, n, m], x[..., n::3])
    torch.testing.assert_close(layer(x), expected)


def test_a_quarter_of_the_parameters_and_sizes_that_are_no_quaternions():
    for inputs, outputs, count in ((1024, 512, 131_584), (1024, 768, 197_376), (8, 4, 12)):
        assert numbers(QuaternionLinear(inputs, outputs)) == count == inputs * outputs // 4 + outputs
    refuses(*((lambda sizes=sizes: QuaternionLinear(*sizes), "of 4") for sizes in ((6, 8), (8, 6), (0, 4), (4, -4))))
    refuses((lambda: QuaternionLinear(4, 4, layers=-1), "layers"))


def test_a_stack_is_its_layers_one_by_one_values_and_gradients():
    torch.manual_seed(0)
    stack = QuaternionLinear(8, 12, layers=3).double()
    torch.testing.assert_close(stack.weight[0], stack.weight[2], rtol=0, atol=0)  # they start equal
    torch.nn.init.normal_(stack.weight)
    torch.nn.init.normal_(stack.bias)
    x = quaternions(3, 2, 5, 8)
    y = stack(x)
    y.square().sum().backward()
    assert y.shape == (3, 2, 5, 12)
    for n in range(3):
        one = QuaternionLinear(8, 12).double()
        one.weight.data, one.bias.data = stack.weight.data[n].clone(), stack.bias.data[n].clone()
        alone = one(x[n])
        alone.square().sum().backward()
        torch.testing.assert_close(y[n], alone)
        torch.testing.assert_close(stack.weight.grad[n], one.weight.grad)
        torch.testing.assert_close(stack.bias.grad[n], one.bias.grad)


def test_the_start_has_the_released_statistics():
    """s, the spread of the four components and E|w|², as the released initialisation has them."""
    torch.manual_seed(0)
    layer = QuaternionLinear(1024, 512)
    s = 1 / math.sqrt(2 * (256 + 128))
    spread = layer.weight.flatten(1).std(1) / s
    torch.testing.assert_close(spread, torch.tensor([math.sqrt(2)] + [math.sqrt(2 / 3)] * 3), rtol=0.02, atol=0)
    assert layer.weight.flatten(1).mean(1).abs().max() < 1e-3
    assert layer.weight.square().sum(0).mean().item() == pytest.approx(4 * s**2, rel=0.02)
    assert not layer.bias.any()

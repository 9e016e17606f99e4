"""Quaternion layers against the algebra: norms, associativity, the real matrix, and what a layer starts from."""

import math

import pytest
import torch

from companion.errors import BadParameter
from companion.models.layers.quaternion import QuaternionLinear, hamilton, modulus, real_matrix


def quaternions(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(p, q):
    """i² = j² = k² = ijk = -1, a product at a time, for single quaternions."""
    table = (
        {(0, n): (n, 1) for n in range(4)} | {(n, 0): (n, 1) for n in range(4)} | {(n, n): (0, -1) for n in (1, 2, 3)}
    )
    for a, b, c in ((1, 2, 3), (2, 3, 1), (3, 1, 2)):  # ij = k, jk = i, ki = j, and the other way round the minus
        table |= {(a, b): (c, 1), (b, a): (c, -1)}
    out = [0.0] * 4
    for (a, b), (c, sign) in table.items():
        out[c] += sign * p[a] * q[b]
    return out


def test_the_units_multiply_as_hamilton_carved_them():
    one, i, j, k = torch.eye(4, dtype=torch.float64)
    for unit in (i, j, k):
        assert torch.equal(hamilton(unit, unit), -one)
    assert torch.equal(hamilton(hamilton(i, j), k), -one)
    assert torch.equal(hamilton(i, j), k) and torch.equal(hamilton(j, i), -k)
    p, q = quaternions(4), quaternions(4, seed=1)
    torch.testing.assert_close(hamilton(p, q), torch.tensor(by_hand(p.tolist(), q.tolist()), dtype=torch.float64))


def test_norms_multiply_and_the_product_is_associative_but_not_commutative():
    p, q, r = (quaternions(5, 24, seed=s) for s in range(3))
    torch.testing.assert_close(modulus(hamilton(p, q)), modulus(p) * modulus(q))
    torch.testing.assert_close(hamilton(hamilton(p, q), r), hamilton(p, hamilton(q, r)))
    assert (hamilton(p, q) - hamilton(q, p)).abs().max() > 0.1


def test_the_blocks_of_the_real_matrix():
    R, I, J, K = weight = quaternions(4, 3, 5)  # noqa: E741 - the field's names
    rows = [[R, I, J, K], [-I, R, K, -J], [-J, -K, R, I], [-K, J, -I, R]]
    assert torch.equal(real_matrix(weight), torch.cat([torch.cat(row, 1) for row in rows]))


def test_a_layer_is_a_sum_of_hamilton_products_with_the_weight_on_the_left():
    layer = QuaternionLinear(12, 8).double()
    torch.nn.init.normal_(layer.bias)
    x = quaternions(2, 7, 12)
    expected = torch.zeros(2, 7, 8, dtype=torch.float64)
    for n in range(3):
        for m in range(2):
            weight, quaternion = layer.weight[:, n, m], x[..., n::3]
            expected[..., m::2] += hamilton(weight, quaternion)
    torch.testing.assert_close(layer(x), expected + layer.bias)


def test_one_quaternion_is_turned_and_stretched():
    """|W ⊗ x| = |W| |x| for a layer of one quaternion, and its real matrix is orthogonal up to |W|."""
    layer = QuaternionLinear(4, 4).double()
    x = quaternions(9, 4)
    size = layer.weight.norm()
    torch.testing.assert_close(layer(x).norm(dim=-1), size * x.norm(dim=-1))
    m = real_matrix(layer.weight)
    torch.testing.assert_close(m @ m.T, size**2 * torch.eye(4, dtype=torch.float64))


def test_composition_of_layers_is_the_product_of_their_matrices():
    """A quaternion matrix times a quaternion matrix is one again: the real form keeps the algebra."""
    a, b = quaternions(4, 3, 5), quaternions(4, 5, 2, seed=1)
    both = torch.zeros(4, 3, 2, dtype=torch.float64)
    for n in range(3):
        for m in range(2):
            for c in range(5):
                both[:, n, m] += hamilton(b[:, c, m], a[:, n, c])  # the second weight stands left of the first
    torch.testing.assert_close(real_matrix(a) @ real_matrix(b), real_matrix(both))


def test_half_zero_input_is_the_formula_of_four_blocks():
    layer = QuaternionLinear(16, 12).double()
    R, I, J, K = layer.weight  # noqa: E741
    c = quaternions(6, 8)
    c1, c2 = c.chunk(2, -1)
    blocks = [-c1 @ J - c2 @ K, c2 @ J - c1 @ K, c1 @ R - c2 @ I, c1 @ I + c2 @ R]
    padded = torch.cat([torch.zeros_like(c), c], -1)
    torch.testing.assert_close(layer(padded), torch.cat(blocks, -1) + layer.bias)


@pytest.mark.parametrize(("inputs", "outputs", "count"), [(1024, 512, 131_584), (1024, 768, 197_376), (8, 4, 12)])
def test_a_quarter_of_the_parameters(inputs, outputs, count):
    layer = QuaternionLinear(inputs, outputs)
    assert sum(p.numel() for p in layer.parameters()) == count == inputs * outputs // 4 + outputs


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


def test_gradients_by_finite_differences():
    layer = QuaternionLinear(8, 4).double()
    assert torch.autograd.gradcheck(layer, quaternions(3, 8).requires_grad_())


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


@pytest.mark.parametrize("sizes", [(6, 8), (8, 6), (0, 4), (4, -4)])
def test_sizes_that_are_no_quaternions(sizes):
    with pytest.raises(BadParameter, match="multiple of 4"):
        QuaternionLinear(*sizes)


def test_a_negative_number_of_layers():
    with pytest.raises(BadParameter, match="layers"):
        QuaternionLinear(4, 4, layers=-1)

"""Rules of blocks that were written for the purpose, one for each way in which attention can enter the stream."""

import pytest
import torch
from torch import nn

from squeeze.engine.residual import Call, find_residuals

HIDDEN = 32


class Attention(nn.Module):
    def __init__(self, adds_stream=False):
        super().__init__()
        self.inner, self.adds_stream = nn.Linear(HIDDEN, HIDDEN), adds_stream

    def forward(self, x, residual=None):
        made = self.inner(x)
        return (residual + made if self.adds_stream else made), None


class Block(nn.Module):
    """What blocks have in common; `way` says how attention's output is added."""

    def __init__(self, way, scale=1.0):
        super().__init__()
        self.way, self.scale = way, nn.Parameter(torch.tensor(scale))
        self.attn = Attention(way == "own")
        self.norm1, self.norm2, self.post = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.mlp, self.drop = nn.Sequential(nn.Linear(HIDDEN, 48), nn.GELU(), nn.Linear(48, HIDDEN)), nn.Dropout(0.5)
        self.bias = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x):
        way = self.way
        if way == "post":  # OLMo 2
            after = x + self.post(self.attn(x)[0])
            return after + self.mlp(after)
        attn = self.attn(self.norm1(x), x)[0]
        if way == "parallel":
            return x + self.drop(attn) + self.mlp(self.norm2(x))
        if way == "in place":  # Falcon
            made = self.mlp(self.norm2(x))
            made += attn
            return made + x
        if way == "own":
            after = attn
        elif way == "functional norm":
            after = x + nn.functional.rms_norm(attn, (HIDDEN,))
        elif way == "bias":
            after = x + attn + self.bias
        else:
            after = x + self.scale * attn
        return after + self.mlp(self.norm2(after))


def rules(blocks, scales=(), dtype=torch.float32, tokens=None, weaker=None):
    """Run blocks on two different tokens, and find their rules."""
    with torch.no_grad():
        for block in blocks:
            for parameter in block.parameters():
                if parameter.ndim:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        for parameter in weaker.parameters() if weaker is not None else ():
            parameter.mul_(1e-7)
    model, calls, givens = nn.Sequential(*blocks).to(dtype).eval(), [], []
    for module in model.modules():
        module.register_forward_pre_hook(lambda _, args: givens.append(args[0].float()))
        module.register_forward_hook(
            lambda module, _, output: calls.append(
                Call(module, givens.pop(), (output[0] if isinstance(output, tuple) else output).float().clone())
            )
        )
    with torch.no_grad():
        model((torch.randn(2, 1, HIDDEN) if tokens is None else tokens).to(dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 1.2e-2
    return find_residuals([(block.attn, block) for block in blocks], calls, scales, tolerance)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("way", "rule", "entry"),
    [
        ("pre", "x + attn", "norm1"),
        ("parallel", "x + attn", "norm1"),
        ("in place", "x + attn", "norm1"),
        ("post", "x + post", ""),
        ("own", "attn", "norm1"),
    ],
)
def test_ways_to_add(way, rule, entry, dtype):
    blocks = [Block(way) for _ in range(4)]
    for block, residual in zip(blocks, rules(blocks, dtype=dtype), strict=True):
        assert residual.rule == rule and residual.entry is block.get_submodule(entry)
        assert residual.branch is (block.post if way == "post" else block.attn)
        assert (residual.of_stream, residual.of_branch) == (way != "own", 1.0)


@pytest.mark.parametrize("way", ["post", "pre"])
def test_dimensions_of_the_stream_that_dwarf_all_others_do_not_hide_the_rule(way):
    """In bfloat16 their rounding alone is more than all that attention adds to the others."""
    tokens = torch.randn(2, 1, HIDDEN)
    tokens[..., 4:] = 3000.0
    (residual,) = rules([Block(way, 0.22)], scales=[0.22], dtype=torch.bfloat16, tokens=tokens)
    assert residual.rule == ("x + post" if way == "post" else "x + 0.22·attn")


@pytest.mark.parametrize("told", [True, False])
def test_scaled_branches(told):
    """The factor is the configuration's to the last digit where it says one, and else what fits."""
    found = rules([Block("pre", 0.22) for _ in range(3)], scales=[0.22] if told else [])
    for residual in found:
        assert residual.rule == "x + 0.22·attn"
        assert residual.of_branch == 0.22 if told else abs(residual.of_branch - 0.22) < 1e-4


def test_a_block_that_hardly_attends_has_the_rule_of_its_class():
    blocks = [Block("pre", 0.22) for _ in range(3)]
    found = rules(blocks, scales=[0.22], dtype=torch.bfloat16, weaker=blocks[0].attn)
    assert [residual.rule for residual in found] == ["x + 0.22·attn"] * 3


def test_each_block_may_have_a_factor_of_its_own():
    found = rules([Block("pre", 0.5), Block("pre", 1.0), Block("pre", 0.25)])
    assert [round(residual.of_branch, 3) for residual in found] == [0.5, 1.0, 0.25]


def test_blocks_of_different_ways_are_told_apart():
    found = rules([Block("pre"), Block("bias"), Block("pre")])
    assert [residual and residual.rule for residual in found] == ["x + attn", None, "x + attn"]


@pytest.mark.parametrize("way", ["functional norm", "bias"])
def test_what_is_not_such_a_sum_is_not_found(way):
    assert rules([Block(way), Block(way)]) == [None, None]

"""The four models: they take both image sizes, are small, and can be differentiated twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gam_fused.cli.models import MODELS, ImageShape

SHAPES = [ImageShape(1, 8, 10), ImageShape(1, 28, 10)]


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=["8x8", "28x28"])
def test_logits_for_both_image_sizes(name: str, shape: ImageShape) -> None:
    model = MODELS[name](shape)
    logits = model(torch.randn(3, shape.channels, shape.size, shape.size))
    assert logits.shape == (3, 10)
    assert sum(param.numel() for param in model.parameters()) < 180_000


def test_every_parameter_takes_part_in_a_hessian_vector_product(name: str) -> None:
    """Double backward works with respect to all parameters at once, and its result is symmetric: u·Hv = v·Hu."""
    torch.manual_seed(0)
    model = MODELS[name](SHAPES[0]).double()
    params = list(model.parameters())
    images, labels = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    state = torch.get_rng_state()

    def product(vector: list[torch.Tensor]) -> list[torch.Tensor]:
        torch.set_rng_state(state)  # the same dropout mask
        loss = nn.functional.cross_entropy(model(images), labels)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        return list(torch.autograd.grad(grads, params, grad_outputs=vector))

    u, v = ([torch.randn_like(param) for param in params] for _ in range(2))
    u_h_v, v_h_u = (sum((a * b).sum() for a, b in zip(x, product(y), strict=True)) for x, y in ((u, v), (v, u)))
    torch.testing.assert_close(u_h_v, v_h_u, rtol=1e-9, atol=1e-12)
    assert all(bool(part.any()) for part in product(v))


def test_images_do_not_influence_each_other_in_evaluation_mode(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name](SHAPES[1]).double().eval()
    images = torch.randn(4, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]))


@pytest.mark.parametrize(
    ("name", "layer"),
    [("mlp", nn.Dropout), ("cnn", nn.Dropout), ("resnet", nn.BatchNorm2d), ("vit", nn.GELU), ("vit", nn.LayerNorm)],
)
def test_has_the_layers_it_is_there_to_exercise(name: str, layer: type[nn.Module]) -> None:
    assert any(isinstance(module, layer) for module in MODELS[name](SHAPES[1]).modules())


def test_attention_agrees_with_pytorch() -> None:
    from gam_fused.cli.models import SelfAttention

    torch.manual_seed(0)
    ours = SelfAttention(width=8, heads=2).double()
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.inputs.weight.data, ours.inputs.bias.data
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.output.weight.data, ours.output.bias.data
    tokens = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(tokens), theirs(tokens, tokens, tokens, need_weights=False)[0])

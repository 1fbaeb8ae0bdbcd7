"""PyTorch networks with random weights and random batch-norm statistics, to import.

Nothing is downloaded: what matters for an importer is the graph. Statistics are drawn so that
activations stay of order one, as in a trained network.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

TORCHVISION = """
alexnet convnext_tiny convnext_small convnext_base convnext_large densenet121 densenet161
densenet169 densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3
efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_s
efficientnet_v2_m efficientnet_v2_l googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet0_75
mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf
regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf
regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf resnet18
resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d
shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0
squeezenet1_1 swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b vgg11 vgg11_bn vgg13 vgg13_bn
vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_l_16 vit_l_32 wide_resnet50_2
wide_resnet101_2 regnet_y_32gf vit_h_14 regnet_y_128gf
"""
TIMM = """
mobilenetv4_conv_small efficientnet_lite0 tf_efficientnetv2_b0 ghostnet_100 hardcorenas_a
mixnet_s fbnetc_100 semnasnet_100 lcnet_100 tinynet_a rexnet_100 resnest14d seresnet50
skresnet18 ecaresnet26t gernet_s res2net50_26w_4s dla34 hrnet_w18_small cspresnet50 darknet53
vovnet39a repvgg_a0 selecsls42 xception41 inception_v4 inception_resnet_v2 dpn68 nf_resnet50
convnextv2_atto tf_mobilenetv3_small_075 mobileone_s0 regnetz_005 legacy_seresnet18
"""
REQUIRED = """
resnet18 resnet50 resnext50_32x4d wide_resnet50_2 regnet_x_400mf regnet_y_400mf mobilenet_v2
mobilenet_v3_small mobilenet_v3_large mnasnet1_0 efficientnet_b0 efficientnet_v2_s densenet121
googlenet inception_v3 shufflenet_v2_x1_0 squeezenet1_1 vgg16 vgg16_bn alexnet convnext_tiny
vit_b_16
"""
SEGMENTATION = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large")
GROUPS = {
    "required": (*REQUIRED.split(), *SEGMENTATION),
    "torchvision": (*TORCHVISION.split(), *SEGMENTATION),
    "timm": tuple(f"timm:{name}" for name in TIMM.split()),
}
SIZES = {
    "inception_v3": 299,
    "timm:inception_v4": 299,
    "timm:inception_resnet_v2": 299,
    "timm:xception41": 299,
}
ONE_SIZE = ("alexnet", "maxvit_", "vgg", "vit_")
"""Networks that read images of one size, or whose pooling ONNX cannot have at another."""
SMALLEST = 128
"""Pixels that the networks for larger images need at least."""


def size_of(name: str, wanted: int | None = None) -> int:
    """Pixels along each side that a network is exported for."""
    if wanted is None or name.startswith(ONE_SIZE):
        return SIZES.get(name, 224)
    return max(wanted, SMALLEST) if name in SIZES else wanted


def network(name: str, size: int | None = None, seed: int = 0) -> Any:
    """The network in evaluation mode, its weights and statistics random.

    Args:
      name: of torchvision, or `timm:` and a name of timm.
      size: if given, the statistics are those of noise images of so many pixels instead, as ranges
        taken from them suppose.
      seed: of weights, statistics and noise.
    """
    import torch

    torch.manual_seed(seed)
    module = build(name).eval()
    randomise(module, seed)
    if size is not None:
        measure_statistics(module, size)
    return module


def build(name: str) -> Any:
    """The network as its library makes it, without weights."""
    models = torchvision_models()
    if name.startswith("timm:"):
        import timm

        return timm.create_model(name.removeprefix("timm:"), pretrained=False)
    options: dict[str, Any] = {"weights": None}
    if name in SEGMENTATION:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return models.get_model(name, **options)


def torchvision_models() -> Any:
    """`torchvision.models`, on builds whose operators for detection cannot load too."""
    from torch import library

    try:
        import torchvision
    except RuntimeError:
        declared = library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(declared)
        import torchvision
    return torchvision.models


KEPT: list[Any] = []
"""Libraries of operators live as long as something refers to them."""


def randomise(module: Any, seed: int) -> None:
    """Random batch norms, small noise for layers that start at zero."""
    import torch

    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in batch_norms(module):
            draw = lambda like: torch.rand(like.shape, generator=noise)
            part.running_mean.copy_(0.2 * draw(part.running_mean) - 0.1)
            part.running_var.copy_(0.5 + draw(part.running_var))
            if part.affine:
                part.weight.copy_(0.5 + draw(part.weight))
                part.bias.copy_(0.2 * draw(part.bias) - 0.1)
        for weight in module.parameters():
            if weight.ndim > 1 and not weight.any():
                weight.normal_(0, 0.02, generator=noise)


def batch_norms(module: Any) -> list[Any]:
    """Its batch norms that record statistics."""
    import torch

    kinds = torch.nn.BatchNorm1d | torch.nn.BatchNorm2d
    return [m for m in module.modules() if isinstance(m, kinds) and m.running_mean is not None]


def measure_statistics(module: Any, size: int, images: int = 4) -> None:
    """Batch norms take the statistics of a few images of noise, as training would leave them.

    Their shifts keep most units active. A deep random network is chaotic otherwise: it blows the
    smallest rounding up until nothing is left to compare, as no trained network does. For the same
    reason the last layer is scaled until scores spread as those of trained networks do.
    """
    import torch

    parts = batch_norms(module)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in parts:
            part.momentum = 1.0
            part.train()
            if part.affine:
                part.bias.copy_(1 + torch.rand(part.bias.shape, generator=noise))
        pixels = torch.randn(images, 3, size, size, generator=noise)
        module(pixels)
        for part in parts:
            part.eval()
        last, scores = last_layer(module, pixels)
        last.weight.mul_(SPREAD / scores.std())


SPREAD = 4.0
"""Deviation of the scores of classes."""


def last_layer(module: Any, pixels: Any) -> tuple[Any, Any]:
    """The convolution or linear layer that runs last, and what it makes of these images."""
    import torch

    ran: list[tuple[Any, Any]] = []
    layers = [m for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    hooks = [m.register_forward_hook(lambda m, _, out: ran.append((m, out))) for m in layers]
    module(pixels)
    for hook in hooks:
        hook.remove()
    return ran[-1]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and prints of exporters."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def pt2(module: Any, image: Any) -> bytes:
    """The network as a `.pt2` archive."""
    import torch

    with quiet():
        program = torch.export.export(module, (image,))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    return buffer.getvalue()


def onnx(module: Any, image: Any, opset: int) -> bytes:
    """The network as ONNX, batch norms kept."""
    import torch

    buffer: Any = io.BytesIO()
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(
            module,
            (image,),
            buffer,
            opset_version=opset,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            dynamo=False,
        )
    return buffer.getvalue()

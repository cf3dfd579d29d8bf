"""Networks as their libraries ship them, at their own width and depth or from small configurations, with random weights.

`REAL_NETWORKS` are those that every release should fit, predict and save: classifiers of images, one of pixels, and language models.
`CLASSIFIERS` are torchvision's, one of each family. timm, transformers and peft are not installed with the package:

    pip install timm transformers peft
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor] | dict[str, Tensor]
N_CLASSES = 10
N_TOKENS = 16
VOCABULARY = 1000


@dataclass(frozen=True)
class RealNetwork:
    """A network of another library, and batches for it.

    Attributes:
        title: the network and its configuration, in words.
        packages: what has to be installed beside torchvision.
        make: the network, with random weights by torch's generator.
        batch: random inputs and labels of some examples, by a generator.
        n: examples of a batch.
        options: of `Laplace`, where the defaults take too long.
        options_of_factors: of Kronecker posteriors, likewise.
        prediction: options of a prediction, likewise.
    """

    title: str
    packages: tuple[str, ...]
    make: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], Batch]
    n: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    options_of_factors: Mapping[str, Any] = field(default_factory=dict)
    prediction: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> str | None:
        """A sentence about the packages that are not installed; None where all are there."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: pip install {' '.join(missing)}" if missing else None

    def batches(self, n_batches: int, seed: int) -> list[Batch]:
        """Random batches."""
        generator = torch.Generator().manual_seed(seed)
        return [self.batch(self.n, generator) for _ in range(n_batches)]


def inputs_of(batch: Batch) -> Any:
    """What the network is called with, and a posterior."""
    return {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, dict) else batch[0]


def labels_of(batch: Batch) -> Tensor:
    """The targets."""
    return batch["labels"] if isinstance(batch, dict) else batch[1]


def outputs_of(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of a batch, `[n, C]`, or `[n, T, C]` with a label for each of T pixels."""
    outputs = model(inputs_of(batch))
    return outputs if isinstance(outputs, Tensor) else outputs.logits


# ------------------------------------------------------------------ images


def images(side: int, labels_per_side: int | None = None) -> Callable[[int, torch.Generator], Batch]:
    """Batches of images of three channels, with a label each, or one for each pixel."""

    def batch(n: int, generator: torch.Generator) -> Batch:
        shape = (n,) if labels_per_side is None else (n, labels_per_side**2)
        return torch.randn(n, 3, side, side, generator=generator), torch.randint(
            0, N_CLASSES, shape, generator=generator
        )

    return batch


def of_torchvision(name: str, title: str, side: int = 64, **options: Any) -> RealNetwork:
    """A classifier of torchvision."""

    def make() -> nn.Module:
        return torchvision.models.get_model(name, weights=None, num_classes=N_CLASSES, **options)

    return RealNetwork(f"torchvision's {title}, {side}×{side}", (), make, images(side))


def of_timm(name: str, title: str, side: int = 64, **options: Any) -> RealNetwork:
    """A classifier of timm."""

    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=N_CLASSES, **options)

    return RealNetwork(f"timm's {title}, {side}×{side}", ("timm",), make, images(side))


class PixelClasses(nn.Module):
    """A segmentation network of torchvision, whose outputs are those of each pixel, `[N, H·W, C]`."""

    def __init__(self, segmentation: nn.Module) -> None:
        super().__init__()
        self.segmentation = segmentation

    def forward(self, x: Tensor) -> Tensor:
        return self.segmentation(x)["out"].movedim(1, -1).flatten(1, 2)


def deeplab(backbone: str, title: str) -> RealNetwork:
    """A DeepLabV3 of torchvision: with a label for each pixel, the exact GGN and the variances of all outputs take thousands of passes."""

    def make() -> nn.Module:
        options = {"weights": None, "weights_backbone": None, "num_classes": N_CLASSES, "aux_loss": False}
        return PixelClasses(getattr(torchvision.models.segmentation, f"deeplabv3_{backbone}")(**options))

    return RealNetwork(
        f"torchvision's DeepLabV3 on a {title}, 32×32, a label for each pixel (random signs, prior precision 10⁴, factors of at most 4,608 "
        "rows, 5 networks drawn)",
        (),
        make,
        images(32, labels_per_side=32),
        n=2,
        options={"curvature": "ggn_mc_rademacher", "prior_precision": 1e4},
        options_of_factors={"max_factor_dim": 4608},
        prediction={"pred_type": "nn", "n_samples": 5},
    )


# ------------------------------------------------------------------ language


def taking_batches(model: nn.Module) -> nn.Module:
    """A model of Hugging Face as one that is called with a batch."""
    from laplace_ws.callbacks.huggingface import TakesBatch

    return TakesBatch(model)


def texts(n: int, generator: torch.Generator) -> Batch:
    """Texts of unequal length, padded, and a label for each."""
    lengths = torch.randint(N_TOKENS // 2, N_TOKENS + 1, (n,), generator=generator)
    lengths[0] = N_TOKENS
    mask = (torch.arange(N_TOKENS) < lengths[:, None]).long()
    tokens = torch.randint(3, VOCABULARY, (n, N_TOKENS), generator=generator)
    return {
        "input_ids": tokens * mask,
        "attention_mask": mask,
        "labels": torch.randint(0, N_CLASSES, (n,), generator=generator),
    }


TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_labels": N_CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def bert() -> nn.Module:
    """A BERT of two layers."""
    import transformers

    size: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 512,
    }
    config = transformers.BertConfig(**TOKENS, **size, max_position_embeddings=N_TOKENS)
    return taking_batches(transformers.BertForSequenceClassification(config))


def gpt2() -> nn.Module:
    """A GPT-2 of two layers."""
    import transformers

    config = transformers.GPT2Config(**TOKENS, n_embd=128, n_layer=2, n_head=2, n_positions=N_TOKENS)
    return taking_batches(transformers.GPT2ForSequenceClassification(config))


def llama_with_lora() -> nn.Module:
    """A Llama of two layers, frozen, with adapters of rank 8 and a head that are trained; the adapters do not start at zero."""
    import peft
    import transformers

    size: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 352,
    }
    llama = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TOKENS, **size))
    adapters = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    model = peft.get_peft_model(llama, adapters)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return taking_batches(model)


def of_transformers(title: str, make: Callable[[], nn.Module], *more: str) -> RealNetwork:
    """A classifier of texts of Hugging Face."""
    size = f"2 layers of width 128, {VOCABULARY:,} words, {N_TOKENS} tokens"
    return RealNetwork(f"Hugging Face's {title}: {size}", ("transformers", *more), make, texts)


REAL_NETWORKS: dict[str, RealNetwork] = {
    "resnet18": of_torchvision("resnet18", "ResNet-18"),
    "resnet50": of_torchvision("resnet50", "ResNet-50"),
    "vit_b_16": of_torchvision("vit_b_16", "ViT-B/16", image_size=64),
    "swin_t": of_torchvision("swin_t", "Swin-T"),
    "convnext_tiny": of_torchvision("convnext_tiny", "ConvNeXt-T"),
    "efficientnet_b0": of_torchvision("efficientnet_b0", "EfficientNet-B0"),
    "mobilenet_v3_small": of_torchvision("mobilenet_v3_small", "MobileNetV3 (small)"),
    "densenet121": of_torchvision("densenet121", "DenseNet-121"),
    "deeplabv3_mobilenet": deeplab("mobilenet_v3_large", "MobileNetV3"),
    "deeplabv3_resnet50": deeplab("resnet50", "ResNet-50"),
    "timm_resnet18": of_timm("resnet18", "ResNet-18"),
    "timm_vit": of_timm("vit_tiny_patch16_224", "ViT-Ti/16", img_size=64),
    "bert": of_transformers("BERT", bert),
    "gpt2": of_transformers("GPT-2", gpt2),
    "llama_lora": of_transformers("Llama with LoRA of rank 8 on queries and values", llama_with_lora, "peft"),
}
"""By name; in evaluation mode and with ten classes throughout."""

CLASSIFIERS = {
    "alexnet": 96,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_0": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11_bn": 64,
    "vit_b_16": 32,
    "wide_resnet50_2": 64,
}
"""torchvision's classifiers, one of each family, with sides of images as small as each allows."""


def make_network(name: str, seed: int) -> nn.Module:
    """One of `REAL_NETWORKS` in evaluation mode, the same for the same seed."""
    torch.manual_seed(seed)
    return REAL_NETWORKS[name].make().eval()


def classifier(name: str) -> tuple[nn.Module, Tensor]:
    """One of `CLASSIFIERS`, and three images."""
    side = CLASSIFIERS[name]
    options = {"image_size": side} if name.startswith("vit") else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=N_CLASSES, **options)
    return model, torch.randn(3, 3, side, side)

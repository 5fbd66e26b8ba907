"""How each zoo model is made: the real classes of their libraries, tiny configurations, seeded weights.

Libraries are imported inside the builders, so that collecting the tests stays fast.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.zoo.wrappers import FeaturesIn, MeanPooledText, PaddedEncoder, PixelsIn, TextIn, ValuesIn

HIDDEN, HEADS, LAYERS, MLP = 64, 4, 4, 128
IMAGE, PATCH, CLASSES, VOCAB, POSITIONS = 32, 4, 10, 101, 80
MEL_BINS, MEL_FRAMES = 16, 64

# Below 1 so that the residual stream, not what attention averages, tells the rows of post-norm models apart.
_GAIN = 0.7

Builder = Callable[[], nn.Module]

_TORCHVISION_STUBS: list[torch.library.Library] = []


def timm_missing() -> str | None:
    """Say why timm cannot be used here, or None."""
    for package in ("timm", "torchvision"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None


def _mend_torchvision() -> None:
    """Make an installed torchvision importable, as transformers and timm import it when they find it.

    A CUDA build beside a CPU torch stops with "operator torchvision::nms does not exist"; no model here calls it.
    """
    if _TORCHVISION_STUBS or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _TORCHVISION_STUBS.append(library)  # operators live as long as the library object
        importlib.import_module("torchvision")


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give ``module`` seeded weights of trained-like scale and put it in eval mode.

    The libraries initialise with a standard deviation of 0.02, which makes attention uniform and every row nearly
    alike: top-k choices and merges would then be decided by rounding.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)

    matrices = {
        id(layer.weight)
        for layer in module.modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if id(parameter) in matrices or name.endswith("in_proj_weight"):
                parameter.copy_(_GAIN * noise(parameter) / math.sqrt(parameter[0].numel()))
            elif parameter.dim() >= 2:  # embeddings, class tokens, position tables
                parameter.copy_(0.5 * noise(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise(parameter))
            else:  # norm weights and layer scales
                parameter.copy_(1 + 0.1 * noise(parameter))
    return module.eval()


def _sizes(**extra: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": MLP,
        **extra,
    }


def _image(**extra: Any) -> dict[str, Any]:
    return _sizes(image_size=IMAGE, patch_size=PATCH, **extra)


def _text(**extra: Any) -> dict[str, Any]:
    return _sizes(vocab_size=VOCAB, max_position_embeddings=POSITIONS, **extra)


def _hf(model: str, config: str, arguments: dict[str, Any], *, attention: str = "sdpa", **kwargs: Any) -> nn.Module:
    _mend_torchvision()
    import transformers

    made = getattr(transformers, config)(**arguments)
    made._attn_implementation = attention
    return randomise(getattr(transformers, model)(made, **kwargs))


_HIDDEN = ("last_hidden_state",)
_POOLED = ("last_hidden_state", "pooler_output")


def vit(attention: str = "sdpa") -> nn.Module:
    return PixelsIn(_hf("ViTModel", "ViTConfig", _image(), attention=attention), _POOLED).eval()


def vit_classifier() -> nn.Module:
    model = _hf("ViTForImageClassification", "ViTConfig", _image(num_labels=CLASSES))
    return PixelsIn(model, ("logits",)).eval()


def deit() -> nn.Module:
    return PixelsIn(_hf("DeiTModel", "DeiTConfig", _image()), _POOLED).eval()


def beit() -> nn.Module:
    arguments = _image(use_relative_position_bias=True, use_mean_pooling=False, layer_scale_init_value=0.1)
    return PixelsIn(_hf("BeitModel", "BeitConfig", arguments), _POOLED).eval()


def dinov2() -> nn.Module:
    return PixelsIn(_hf("Dinov2Model", "Dinov2Config", _image(mlp_ratio=2)), _POOLED).eval()


def dinov2_registers() -> nn.Module:
    arguments = _image(mlp_ratio=2, num_register_tokens=4)
    return PixelsIn(_hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", arguments), _POOLED).eval()


def clip_vision() -> nn.Module:
    return PixelsIn(_hf("CLIPVisionModel", "CLIPVisionConfig", _image()), _POOLED).eval()


def siglip_vision() -> nn.Module:
    return PixelsIn(_hf("SiglipVisionModel", "SiglipVisionConfig", _image()), _POOLED).eval()


def videomae() -> nn.Module:
    arguments = _sizes(image_size=IMAGE, patch_size=8, num_frames=8, tubelet_size=2)
    return PixelsIn(_hf("VideoMAEModel", "VideoMAEConfig", arguments), _HIDDEN).eval()


def swin() -> nn.Module:
    arguments = {
        "image_size": IMAGE,
        "patch_size": PATCH,
        "embed_dim": 32,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    return PixelsIn(_hf("SwinModel", "SwinConfig", arguments), _POOLED).eval()


def vision_mamba() -> nn.Module:
    """Its class token stands in the middle; the loop over the tokens is traced as it is published."""
    from tests.zoo.vim import Vim

    return Vim(side=IMAGE, patch=8, depth=LAYERS, width=HIDDEN // 2, form="loop", tokens_out=True)


def ast() -> nn.Module:
    arguments = _sizes(
        patch_size=PATCH,
        frequency_stride=PATCH,
        time_stride=PATCH,
        max_length=MEL_FRAMES,
        num_mel_bins=MEL_BINS,
    )
    return ValuesIn(_hf("ASTModel", "ASTConfig", arguments), _POOLED).eval()


def whisper_encoder() -> nn.Module:
    _mend_torchvision()
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        vocab_size=VOCAB,
        num_mel_bins=MEL_BINS,
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=MLP,
        max_source_positions=MEL_FRAMES,
    )
    config._attn_implementation = "sdpa"
    return FeaturesIn(randomise(WhisperEncoder(config)), _HIDDEN).eval()


def bert(attention: str = "sdpa") -> nn.Module:
    return TextIn(_hf("BertModel", "BertConfig", _text(), attention=attention), _POOLED).eval()


def bert_classifier() -> nn.Module:
    model = _hf("BertForSequenceClassification", "BertConfig", _text(num_labels=CLASSES))
    return TextIn(model, ("logits",)).eval()


def bert_mean_pooled() -> nn.Module:
    return MeanPooledText(_hf("BertModel", "BertConfig", _text(), add_pooling_layer=False)).eval()


def roberta() -> nn.Module:
    arguments = _text(pad_token_id=1, type_vocab_size=1)
    return TextIn(_hf("RobertaModel", "RobertaConfig", arguments), _POOLED).eval()


def distilbert() -> nn.Module:
    arguments = {
        "vocab_size": VOCAB,
        "max_position_embeddings": POSITIONS,
        "dim": HIDDEN,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "hidden_dim": MLP,
    }
    return TextIn(_hf("DistilBertModel", "DistilBertConfig", arguments), _HIDDEN).eval()


def electra() -> nn.Module:
    return TextIn(_hf("ElectraModel", "ElectraConfig", _text(embedding_size=32)), _HIDDEN).eval()


def mpnet() -> nn.Module:
    return TextIn(_hf("MPNetModel", "MPNetConfig", _text(pad_token_id=1), attention="eager"), _POOLED).eval()


def modernbert() -> nn.Module:
    arguments = _text(
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=8,
        global_attn_every_n_layers=2,
    )
    return TextIn(_hf("ModernBertModel", "ModernBertConfig", arguments), _HIDDEN).eval()


def torch_encoder(*, batch_first: bool, norm_first: bool) -> nn.Module:
    """``nn.TransformerEncoder``; its eager fast path differs from the exported slow path by about 1e-6."""
    layer = nn.TransformerEncoderLayer(
        HIDDEN, HEADS, MLP, dropout=0.0, activation="gelu", batch_first=batch_first, norm_first=norm_first
    )
    norm = nn.LayerNorm(HIDDEN) if norm_first else None
    encoder = nn.TransformerEncoder(layer, LAYERS, norm=norm, enable_nested_tensor=False)
    return PaddedEncoder(randomise(encoder)).eval()  # type: ignore[arg-type]


def _timm(**extra: Any) -> nn.Module:
    _mend_torchvision()
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    kind = VisionTransformerDistilled if extra.pop("distilled", False) else VisionTransformer
    model: nn.Module = kind(
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=HIDDEN,
        depth=LAYERS,
        num_heads=HEADS,
        mlp_ratio=MLP / HIDDEN,
        num_classes=CLASSES,
        **extra,
    )
    return PixelsIn(randomise(model), ("logits",)).eval()


def timm_vit() -> nn.Module:
    return _timm()


def timm_deit_distilled() -> nn.Module:
    return _timm(distilled=True)

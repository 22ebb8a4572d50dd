"""Features of DINOv2 and CLIP through transformers, from a folder or hub id of a model saved by `save_pretrained`.

Legend: B images or texts, D features, M edge of the position grid.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.data.encoders import hub
from gesso.errors import UsageError, error_summary
from gesso.evaluation.networks.base import FeatureNetwork, SampleConditions

DEFAULT_DINOV2 = "facebook/dinov2-large"
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
WEIGHTS_STEM = "model"
IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of pixels in [0, 1]."""


def preprocess(images: Tensor, resolution: int, mean_std: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """Return uint8 RGB images (B, 3, H, W) resized to (B, 3, resolution, resolution) and normalized.

    The filter is bicubic with antialiasing. Raises UsageError for images of another shape or dtype.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(
            f"feature networks read uint8 RGB images (B, 3, H, W); got {images.dtype} {tuple(images.shape)}"
        )
    x = F.interpolate(images.float() / 255, (resolution, resolution), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in mean_std)
    return (x - mean) / std


def _open_model(model_id: str, classes: dict[str, str], label: str) -> tuple[nn.Module, Path]:
    """Return the model in a folder or hub id, and the folder.

    Args:
        model_id: Folder or hub id.
        classes: Class of transformers by model_type.
        label: Name of the model in errors.

    Raises:
        UsageError: There is no such model, or it has another type.
    """
    folder = hub.model_folder(model_id, label, ("",), [*hub.model_file_patterns(WEIGHTS_STEM), "*.json", "*.txt"])
    model_type = hub.read_config(folder, label).get("model_type")
    if model_type not in classes:
        raise UsageError(f"{label}: the model has type {model_type}; it must be {' or '.join(classes)}")
    (model_class,) = hub.import_names("transformers", "text", [classes[model_type]])
    return hub.load_model(model_class, "transformers", folder, label), folder


INTERPOLATE_OFFSET = 0.1
"""`interpolate_offset` of the models in facebookresearch/dinov2: added to the edge of the new grid in the scale."""


def resize_pos_embed(table: Tensor, grid_size: int) -> Tensor:
    """Return DINOv2's position table (1, 1 + M^2, D) for another grid, (1, 1 + grid_size^2, D).

    Bicubic, with the scale of facebookresearch/dinov2.
    """
    M, D = round((table.shape[1] - 1) ** 0.5), table.shape[2]
    if grid_size == M:
        return table
    grid = table[:, 1:].float().reshape(1, M, M, D).permute(0, 3, 1, 2)
    scale = (grid_size + INTERPOLATE_OFFSET) / M
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, grid_size**2, D).to(table.dtype)], dim=1)


class DINOv2(FeatureNetwork):
    """Map uint8 RGB images (B, 3, H, W) to the class token after the last norm, (B, D) float32; D = 1024 for FD-DINOv2.

    Positions are interpolated as in facebookresearch/dinov2, with which published distances are computed; transformers
    leaves out its offset of 0.1.
    """

    model: Any  # a class of transformers

    def __init__(self, model_id: str = DEFAULT_DINOV2, device: torch.device | str = "cpu"):
        super().__init__()
        self.name, self.size = f"dinov2 ({model_id})", 224
        self.model, _ = _open_model(model_id, {"dinov2": "Dinov2Model"}, f"DINOv2 {model_id}")
        self.num_features = self.model.config.hidden_size
        embeddings = self.model.embeddings
        embeddings.position_embeddings = nn.Parameter(
            resize_pos_embed(embeddings.position_embeddings.detach(), self.size // self.model.config.patch_size), False
        )
        self.to(device)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, D)."""
        return self.model(preprocess(images, self.size, IMAGENET_MEAN_STD)).last_hidden_state[:, 0].float()


class CLIPImageFeatures(FeatureNetwork):
    """Map uint8 RGB images (B, 3, H, W) to CLIP embeddings (B, D) float32, not normalized; D = 768 for ViT-L/14."""

    model: Any  # a class of transformers

    def __init__(self, model_id: str = DEFAULT_CLIP, device: torch.device | str = "cpu"):
        super().__init__()
        self.name = f"clip image ({model_id})"
        self.model, _ = _open_model(model_id, {"clip": "CLIPModel"}, f"CLIP {model_id}")
        self.size, self.num_features = self.model.config.vision_config.image_size, self.model.config.projection_dim
        self.to(device)

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings (B, D)."""
        pooled = self.model.vision_model(pixel_values=preprocess(images, self.size, CLIP_MEAN_STD)).pooler_output
        return self.model.visual_projection(pooled).float()


class CLIPScore(FeatureNetwork):
    """Compute 100 max(cos, 0) of images and captions (Hessel et al. 2021, without their factor of 2.5)."""

    model: Any  # a class of transformers

    def __init__(self, model_id: str = DEFAULT_CLIP, device: torch.device | str = "cpu"):
        super().__init__()
        self.name, self.num_features, label = f"clip ({model_id})", 1, f"CLIP {model_id}"
        self.model, folder = _open_model(model_id, {"clip": "CLIPModel"}, label)
        (tokenizer,) = hub.import_names("transformers", "text", ["CLIPTokenizerFast"])
        try:
            self.tokenizer = tokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers raises many types for missing or damaged files
            raise UsageError(f"{label}: its tokenizer cannot be opened: {error_summary(error)}") from error
        self.size, self.max_tokens = (
            self.model.config.vision_config.image_size,
            self.model.config.text_config.max_position_embeddings,
        )
        self.to(device)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return embeddings (B, D) of length 1 of uint8 RGB images (B, 3, H, W)."""
        pooled = self.model.vision_model(pixel_values=preprocess(images, self.size, CLIP_MEAN_STD)).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=1)

    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """Return embeddings (B, D) of length 1; long captions are truncated."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.model.device)
        output = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return F.normalize(self.model.text_projection(output.pooler_output), dim=1)

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Return scores (B,)."""
        return 100 * (self.embed_images(images) * self.embed_texts(captions)).sum(dim=1).clamp(min=0)

    def extract_features(self, images: Tensor, conditions: SampleConditions) -> Tensor:
        """Return scores (B, 1) of images and their captions, on the CPU."""
        assert conditions.captions is not None  # Metric.needs has captions
        return self(images, conditions.captions)[:, None].cpu()

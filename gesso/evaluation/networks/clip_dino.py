"""Features of DINOv2 and CLIP, through transformers: a folder or hub id of a model saved by `save_pretrained`.

Legend: B images or texts, D features, R resolution that a network reads.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.data.encoders import hub
from gesso.errors import UsageError

DEFAULT_DINOV2 = "facebook/dinov2-large"
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
WEIGHTS_STEM = "model"
IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""mean and standard deviation of pixels in [0, 1]"""


def preprocess(images: Tensor, resolution: int, mean_std: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """uint8 RGB (B, 3, H, W) -> (B, 3, size, size), bicubic with antialiasing, then normalized.

    Raises UsageError for other images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(f"features are of uint8 RGB images (B, 3, H, W); got {images.dtype} {tuple(images.shape)}")
    x = F.interpolate(images.float() / 255, (resolution, resolution), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in mean_std)
    return (x - mean) / std


def _open_model(model_id: str, classes: dict[str, str], label: str) -> tuple[nn.Module, Path]:
    """The model of a folder or hub id. kinds: model_type -> class of transformers. Raises UsageError."""
    folder = hub.model_folder(model_id, label, ("",), [*hub.model_file_patterns(WEIGHTS_STEM), "*.json", "*.txt"])
    kind = hub.read_config(folder, label).get("model_type")
    if kind not in classes:
        raise UsageError(f"{label}: a model of type {kind}, where one of {', '.join(classes)} is needed")
    (model,) = hub.import_names("transformers", "text", [classes[kind]])
    return hub.load_model(model, "transformers", folder, label), folder


INTERPOLATE_OFFSET = 0.1
"""interpolate_offset of dinov2's hub models, added to the edge of the new grid where the scale is computed"""


def resize_pos_embed(table: Tensor, grid_size: int) -> Tensor:
    """Resize DINOv2's position table (1, 1 + M^2, D) to a grid of edge^2, bicubic, as the hub's model does: (1, 1 + edge^2, D)."""
    M, D = round((table.shape[1] - 1) ** 0.5), table.shape[2]
    if grid_size == M:
        return table
    grid = table[:, 1:].float().reshape(1, M, M, D).permute(0, 3, 1, 2)
    scale = (grid_size + INTERPOLATE_OFFSET) / M
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, grid_size**2, D).to(table.dtype)], dim=1)


class DINOv2(nn.Module):
    """uint8 RGB (B, 3, H, W) -> the class token after the last norm, (B, D) float32, as FD-DINOv2 is computed (D = 1024).

    Positions are interpolated as by the hub's model (facebookresearch/dinov2), on which published distances are measured; that of
    transformers leaves its offset of .1 out.
    """

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
        return self.model(preprocess(images, self.size, IMAGENET_MEAN_STD)).last_hidden_state[:, 0].float()


class CLIPImageFeatures(nn.Module):
    """uint8 RGB (B, 3, H, W) -> CLIP's embedding of the image, (B, D) float32, of any length (D = 768 of ViT-L/14)."""

    def __init__(self, model_id: str = DEFAULT_CLIP, device: torch.device | str = "cpu"):
        super().__init__()
        self.name = f"clip image ({model_id})"
        self.model, _ = _open_model(model_id, {"clip": "CLIPModel"}, f"CLIP {model_id}")
        self.size, self.num_features = self.model.config.vision_config.image_size, self.model.config.projection_dim
        self.to(device)

    def forward(self, images: Tensor) -> Tensor:
        seen = self.model.vision_model(pixel_values=preprocess(images, self.size, CLIP_MEAN_STD)).pooler_output
        return self.model.visual_projection(seen).float()


class CLIPScore(nn.Module):
    """100 max(cos, 0) of pictures and captions, (B,) (Hessel et al. 2021, without their factor of 2.5)."""

    def __init__(self, model_id: str = DEFAULT_CLIP, device: torch.device | str = "cpu"):
        super().__init__()
        self.name, self.num_features, what = f"clip ({model_id})", 1, f"CLIP {model_id}"
        self.model, folder = _open_model(model_id, {"clip": "CLIPModel"}, what)
        (tokenizer,) = hub.import_names("transformers", "text", ["CLIPTokenizerFast"])
        try:
            self.tokenizer = tokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # of any kind: missing or damaged files
            raise UsageError(f"{what}: its tokenizer cannot be opened: {hub.error_summary(error)}") from error
        self.size, self.max_tokens = (
            self.model.config.vision_config.image_size,
            self.model.config.text_config.max_position_embeddings,
        )
        self.to(device)

    def embed_images(self, images: Tensor) -> Tensor:
        """uint8 RGB (B, 3, H, W) -> (B, D) of length 1."""
        seen = self.model.vision_model(pixel_values=preprocess(images, self.size, CLIP_MEAN_STD)).pooler_output
        return F.normalize(self.model.visual_projection(seen), dim=1)

    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """(B, D) of length 1; of long captions the beginning is read."""
        told = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.model.device)
        read = self.model.text_model(input_ids=told["input_ids"], attention_mask=told["attention_mask"]).pooler_output
        return F.normalize(self.model.text_projection(read), dim=1)

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return 100 * (self.embed_images(images) * self.embed_texts(captions)).sum(dim=1).clamp(min=0)

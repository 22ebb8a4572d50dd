"""Features of DINOv2 and CLIP, through transformers: a folder or hub id of a model saved by `save_pretrained`.

Legend: B images or texts, D features, R resolution that a network reads.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.data import pretrained
from gesso.errors import UsageError

DINOV2 = "facebook/dinov2-large"
CLIP = "openai/clip-vit-large-patch14"
STEM = "model"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""mean and standard deviation of pixels in [0, 1]"""


def scaled(images: Tensor, size: int, pixels: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """uint8 RGB (B, 3, H, W) -> (B, 3, size, size), bicubic with antialiasing, then normalized.

    Raises UsageError for other images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(f"features are of uint8 RGB images (B, 3, H, W); got {images.dtype} {tuple(images.shape)}")
    x = F.interpolate(images.float() / 255, (size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in pixels)
    return (x - mean) / std


def _opened(where: str, kinds: dict[str, str], what: str) -> tuple[nn.Module, Path]:
    """The model of a folder or hub id. kinds: model_type -> class of transformers. Raises UsageError."""
    folder = pretrained.folder(where, what, ("",), [*pretrained.fetchable(STEM), "*.json", "*.txt"])
    kind = pretrained.config(folder, what).get("model_type")
    if kind not in kinds:
        raise UsageError(f"{what}: a model of type {kind}, where one of {', '.join(kinds)} is needed")
    (model,) = pretrained.library("transformers", "text", [kinds[kind]])
    return pretrained.opened(model, "transformers", folder, what), folder


OFFSET = 0.1
"""interpolate_offset of dinov2's hub models, added to the edge of the new grid where the scale is computed"""


def hub_positions(table: Tensor, edge: int) -> Tensor:
    """Resize DINOv2's position table (1, 1 + M^2, D) to a grid of edge^2, bicubic, as the hub's model does: (1, 1 + edge^2, D)."""
    M, D = round((table.shape[1] - 1) ** 0.5), table.shape[2]
    if edge == M:
        return table
    grid = table[:, 1:].float().reshape(1, M, M, D).permute(0, 3, 1, 2)
    scale = (edge + OFFSET) / M
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, edge**2, D).to(table.dtype)], dim=1)


class DINOv2(nn.Module):
    """uint8 RGB (B, 3, H, W) -> the class token after the last norm, (B, D) float32, as FD-DINOv2 is computed (D = 1024).

    Positions are interpolated as by the hub's model (facebookresearch/dinov2), on which published distances are measured; that of
    transformers leaves its offset of .1 out.
    """

    def __init__(self, where: str = DINOV2, device: torch.device | str = "cpu"):
        super().__init__()
        self.name, self.size = f"dinov2 ({where})", 224
        self.model, _ = _opened(where, {"dinov2": "Dinov2Model"}, f"DINOv2 {where}")
        self.features = self.model.config.hidden_size
        embeddings = self.model.embeddings
        embeddings.position_embeddings = nn.Parameter(
            hub_positions(embeddings.position_embeddings.detach(), self.size // self.model.config.patch_size), False
        )
        self.to(device)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(scaled(images, self.size, IMAGENET)).last_hidden_state[:, 0].float()


class CLIPImages(nn.Module):
    """uint8 RGB (B, 3, H, W) -> CLIP's embedding of the image, (B, D) float32, of any length (D = 768 of ViT-L/14)."""

    def __init__(self, where: str = CLIP, device: torch.device | str = "cpu"):
        super().__init__()
        self.name = f"clip image ({where})"
        self.model, _ = _opened(where, {"clip": "CLIPModel"}, f"CLIP {where}")
        self.size, self.features = self.model.config.vision_config.image_size, self.model.config.projection_dim
        self.to(device)

    def forward(self, images: Tensor) -> Tensor:
        seen = self.model.vision_model(pixel_values=scaled(images, self.size, CLIP_PIXELS)).pooler_output
        return self.model.visual_projection(seen).float()


class CLIPScore(nn.Module):
    """100 max(cos, 0) of pictures and captions, (B,) (Hessel et al. 2021, without their factor of 2.5)."""

    def __init__(self, where: str = CLIP, device: torch.device | str = "cpu"):
        super().__init__()
        self.name, self.features, what = f"clip ({where})", 1, f"CLIP {where}"
        self.model, folder = _opened(where, {"clip": "CLIPModel"}, what)
        (tokenizer,) = pretrained.library("transformers", "text", ["CLIPTokenizerFast"])
        try:
            self.tokenizer = tokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # of any kind: missing or damaged files
            raise UsageError(f"{what}: its tokenizer cannot be opened: {pretrained.brief(error)}") from error
        self.size, self.length = (
            self.model.config.vision_config.image_size,
            self.model.config.text_config.max_position_embeddings,
        )
        self.to(device)

    def images(self, images: Tensor) -> Tensor:
        """uint8 RGB (B, 3, H, W) -> (B, D) of length 1."""
        seen = self.model.vision_model(pixel_values=scaled(images, self.size, CLIP_PIXELS)).pooler_output
        return F.normalize(self.model.visual_projection(seen), dim=1)

    def texts(self, captions: Sequence[str]) -> Tensor:
        """(B, D) of length 1; of long captions the beginning is read."""
        told = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        read = self.model.text_model(input_ids=told["input_ids"], attention_mask=told["attention_mask"]).pooler_output
        return F.normalize(self.model.text_projection(read), dim=1)

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return 100 * (self.images(images) * self.texts(captions)).sum(dim=1).clamp(min=0)

"""ViT-MSN: ViT's layers and CLS token, without a pooler."""

from .vit import ViTFamily

VIT_MSN = ViTFamily(model_type="vit_msn", root="vit")

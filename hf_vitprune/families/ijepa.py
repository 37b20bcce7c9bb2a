"""I-JEPA: ViT's layers over patches alone."""

from .vit import ViTFamily

IJEPA = ViTFamily(model_type="ijepa", root="ijepa", extra_tokens=0)

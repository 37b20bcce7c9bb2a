"""DeiT: ViT with a second, distillation token; the WithTeacher class has a classifier on each of the two."""

from .vit import ViTFamily

DEIT = ViTFamily(model_type="deit", root="deit", extra_tokens=2)

"""OFT and HRA: orthogonal maps of a layer's input, which need all of it."""

from .kind import AdapterKind, register_kind


class OftKind(AdapterKind):
    name = "OFT"
    changes_inputs = True


class HraKind(OftKind):
    name = "HRA"


register_kind(OftKind())
register_kind(HraKind())

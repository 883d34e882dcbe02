"""Names under which configurations choose networks and encoders. A network of your own needs no entry: give its dotted path."""

from collections.abc import Mapping

NETS: Mapping[str, str] = {
    "mlp": "robopolicy.nets.mlp:MLP",
    "unet1d": "robopolicy.nets.unet1d:UNet1d",
    "dit": "robopolicy.nets.dit:DiT",
}

ENCODERS: Mapping[str, str] = {
    "multimodal": "robopolicy.nets.encoders.rgb:MultimodalEncoder",
    "state": "robopolicy.nets.encoders.state:StateEncoder",
}

"""Names under which configurations choose methods. One of your own needs no entry: give its dotted path."""

from collections.abc import Mapping

METHODS: Mapping[str, str] = {
    "same_noise": "robopolicy.distill.methods.same_noise:SameNoise",
    "consistency": "robopolicy.distill.methods.consistency:Consistency",
    "ctm": "robopolicy.distill.methods.ctm:CTM",
    "meanflow": "robopolicy.distill.methods.meanflow:MeanFlow",
    "shortcut": "robopolicy.distill.methods.shortcut:Shortcut",
    "reflow": "robopolicy.distill.methods.reflow:Reflow",
    "regression": "robopolicy.distill.methods.regression:Regression",
    "mip": "robopolicy.distill.methods.mip:MIP",
}

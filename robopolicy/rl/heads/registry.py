"""Names under which configurations choose methods. One of your own needs no entry: give its dotted path."""

from collections.abc import Mapping

HEADS: Mapping[str, str] = {
    "dppo": "robopolicy.rl.heads.dppo:DPPO",
    "fpo": "robopolicy.rl.heads.fpo:FPO",
    "reinflow": "robopolicy.rl.heads.reinflow:ReinFlow",
    "policyflow": "robopolicy.rl.heads.policyflow:PolicyFlow",
    "gaussian": "robopolicy.rl.heads.gaussian:Gaussian",
}

"""Parameters, FLOPs, memory and time, from the configuration alone. Imports no torch."""

from vishwamai_mp.planning.flops import flops_per_token, training_flops_per_token
from vishwamai_mp.planning.parameters import parameter_count, total_parameters

__all__ = ["flops_per_token", "parameter_count", "total_parameters", "training_flops_per_token"]

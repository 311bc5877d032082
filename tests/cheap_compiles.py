"""Flags of XLA under which the tests compile, which is most of their time."""

from importlib.metadata import version

# the lowest level of optimisation takes half of it, without the emitters of fused loops a third of
# that; XLA of jax 0.11 has no such flag, and ends a process that gives it one
CHEAP = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    CHEAP += " --xla_cpu_use_fusion_emitters=false"

"""Flags of XLA under which the tests compile, which is most of their time."""

# the lowest level of optimisation takes half of it, without the emitters of fused loops a third of
# that
CHEAP = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

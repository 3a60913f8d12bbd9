"""A camera's knobs, steered by the network's gradient: OneAdapt (Du et al., SoCC 2023)."""

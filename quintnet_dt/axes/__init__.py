"""Which dims of a Graph's tensors are one axis: axes.py applies a rule an operator
(rules/) to their factors (factors.py)."""

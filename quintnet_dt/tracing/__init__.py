"""A model's forward, recorded: model -> Graph. trace.py runs it once on a copy
(ghost.py), and fills the Graph."""

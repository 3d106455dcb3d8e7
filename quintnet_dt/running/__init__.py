"""What a split model does as it runs: hooks on modules (hooks.py) and around calls
(calls.py) run its Programs."""

"""What a split model does as it runs: hooks.py on modules and calls.py on single calls carry out their programs (program.py)."""

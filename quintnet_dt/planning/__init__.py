"""Graph and axes -> what is sharded, shown right: planner.py chooses, layout.py places
the collectives, programs.py makes programs, prove.py runs them on fake shards."""

"""Graph and axes -> what is sharded, shown right: planner.py chooses, layout.py places the
collectives, compile.py makes programs, prove.py runs them on fake shards."""

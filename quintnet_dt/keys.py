"""What the keys of dicts are, for annotations: plain types, named by what they stand
for."""

from typing import TypeAlias

ParamName: TypeAlias = str  # a parameter's name in the model: "layers.0.q_proj.weight"
# a module's name in the model: "layers.0", the root's is ""
ModulePath: TypeAlias = str
ValueId: TypeAlias = int  # a Value of a Graph
CallIndex: TypeAlias = int  # a Call of a Graph, counted through the whole forward
CallNumber: TypeAlias = int  # a call of one run of one module, counted within it
# where a tensor lies in arguments or results: (0, "x")
ArgPath: TypeAlias = tuple[int | str, ...]

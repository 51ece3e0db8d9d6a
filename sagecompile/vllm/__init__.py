"""vLLM: the same decision and the same kernels at run time, through vLLM's own hooks. Importing this loads nothing.

In a server, from the plugin to a kernel: plugin.py registers the backend by its name, which is imported where it is
asked for (asked.py); backend.py gives each batch a plan (plan.py, by choice.py on layer.py's facts); attention.py
carries it out, called by the op (op.py), which graph_pass.py put into the compiled graph, or by the backend itself.
What differs between versions, and what it means that a name of vLLM's is missing, is in versions.py.
"""

"""`tools/gpu_check.py`: does everything work on the GPU of this machine, and how fast? In one process, in nine minutes.

`program.py` has the list of stages. Each stage is a module with a function that yields its checks; `stages.py` runs
them, each stage within its own time, and writes what they found; `table.py` prints it.
"""

"""What a run will take, before it is started: FLOPs, memory, disk space, time."""

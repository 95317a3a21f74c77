"""DeepSpeed groups: several processes, on one machine or many, that train as one."""

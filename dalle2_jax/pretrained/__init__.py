"""Public weights: import into a model folder, export from one."""

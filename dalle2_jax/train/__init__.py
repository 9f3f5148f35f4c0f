"""One trainer for every stage: it knows the `Task` protocol and no stage by name."""

"""One file a stage: its loss, its frozen inputs, its preview."""

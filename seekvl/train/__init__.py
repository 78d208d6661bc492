"""Learning: what a stage trains, how fast, on which batches, and how an interrupted run goes on."""

"""Learning one task after another: methods against forgetting, and the gate, the metrics and the store around them."""

"""What gossip sends."""

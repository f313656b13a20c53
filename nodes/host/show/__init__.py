"""What the host shows and does for nodes that sample by themselves."""

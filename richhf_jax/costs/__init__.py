"""What a compiled program costs: FLOPs, bytes and collectives, and what a chip can do."""

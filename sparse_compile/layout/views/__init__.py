"""Which orders of tokens make a mask blockwise dense, and what they cost."""

"""Values: the game on an image, its coalitions and its patches."""

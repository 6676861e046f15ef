"""What a bundle carries to the board: runner, host operations in C and numpy; Python 3.8 and numpy suffice."""

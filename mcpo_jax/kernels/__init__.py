"""Monte Carlo kernels that draw the negatives, and their exact laws."""

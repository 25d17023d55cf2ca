"""The verb `compare`: rows of settings beside each other, over seeds."""

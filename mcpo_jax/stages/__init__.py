"""Stages of a run, in the order that `stages` of a config names them."""

"""Plans of runs: what a config costs on devices that are not here."""

"""Studies: a grid of runs, repeated over seeds, with verdicts that say how sure they are."""

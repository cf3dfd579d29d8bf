"""The parts of the study of K-FAC as an optimiser."""

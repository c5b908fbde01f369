"""Measurements: attention kernels, quality of the methods, serving under load.

Holds one module a benchmark and, under `results/`, committed results with their provenance. May
import every other package; none imports this one.
"""

"""Measure a student next to its teacher: closeness, variety, calibration; compare evaluations; draw conclusions."""

"""Fitting a calibration, `python -m client.calibrate`: probabilities from a judge's log-odds, for each template."""
